"""LARP's prior: its equation, what gets gradients, scheduled sampling; on every discrete tokenizer of the tests."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import FAMILIES, images, make

from vtok.layers.trunk import Inputs
from vtok.layout import SequenceLayout
from vtok.losses.objective import TokenizerObjective
from vtok.losses.prior import ARPrior, codebook
from vtok.noise import SampleNoise
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, Reconstruction, TokenSpec

DISCRETE = sorted(name for name in FAMILIES if "kl" not in name)
KEY = torch.tensor([11, 12, 13])


def small(channels: int, length: int, **options) -> ARPrior:
    torch.manual_seed(0)
    return ARPrior(channels=channels, length=length, width=16, depth=2, heads=2, **{"dropout": 0.0} | options)


def test_published_size():
    with torch.device("meta"):
        prior = ARPrior(channels=16, length=1024)
    assert sum(p.numel() for p in prior.parameters()) == 21_700_240


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_tokenizer_can_have_it(name):
    tokenizer = make(name).train()
    parts = tokenizer.spec.parts
    for part in range(len(parts)) if len(parts) > 1 else (None,):
        count, vocab, channels = (parts[part or 0].count, parts[part or 0].vocab_size, parts[part or 0].channels)
        prior = small(channels, count, weight=1.0, part=part)
        objective = TokenizerObjective(pixel_weight=0.0, perceptual_weight=0.0, terms={"prior": prior})
        tokenizer.zero_grad(set_to_none=True)
        recon = objective.reconstruct(tokenizer, images(), key=KEY, progress=0.5)
        loss = prior(recon, images(), step=0, progress=0.5, key=KEY, tokenizer=tokenizer)["prior"]
        # cosines at temperature 1: no prediction is further than 2 from a flat one
        assert abs(loss.item() - math.log(vocab)) < 1.0
        loss.backward()
        moved = {k for k, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved or not any(p.requires_grad for k, p in tokenizer.named_parameters() if "encoder" in k)
        # IBQ's codes give the codebook gradients by definition, whatever reads them
        assert name == "cnn_ibq" or not any("codebook" in k for k in moved)
        assert all(p.grad is not None for p in prior.parameters())


def vq(rows: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [B, L, 4], ids and table of a VQ with 12 codes."""
    torch.manual_seed(3)
    quantizer = VQ(vocab_size=12, channels=4)
    found = quantizer(torch.randn(rows, length, 4))
    return found.codes.detach(), found.ids, codebook(quantizer)


class Holder:
    """As much of a tokenizer as the prior looks at."""

    def __init__(self, quantizer: VQ, length: int) -> None:
        part = Part(length, quantizer.vocab_size, quantizer.channels)
        self.quantizer, self.spec = quantizer, TokenSpec(SequenceLayout.line(length), (part,), 8)


def term(prior: ARPrior, progress: float, key: torch.Tensor = KEY) -> torch.Tensor:
    torch.manual_seed(3)
    quantizer = VQ(vocab_size=12, channels=4)
    found = quantizer(torch.randn(3, 7, 4))
    recon = Reconstruction(images(), found.ids, features={"codes": found.codes.detach()})
    rows = Holder(quantizer, 7)
    return prior(recon, images(), step=0, progress=progress, key=key, tokenizer=rows)["prior"]


def test_the_loss_is_the_cross_entropy_of_cosines():
    codes, ids, table = vq()
    prior = small(4, 7, weight=0.06, temperature=0.5)
    logits = prior.logits(codes[:, :-1], table)
    want = 0.0
    for b in range(3):
        for i in range(6):
            x = prior.embed(codes[b : b + 1, : i + 1]) + prior.position[:, : i + 1]
            h = prior.trunk(Inputs(x, torch.arange(i + 1), "causal"))[0, -1]  # from the codes up to i alone
            wanted = prior.head(h)
            cosines = torch.stack([(wanted @ code) / (wanted.norm() * code.norm()) for code in table]) / 0.5
            torch.testing.assert_close(logits[b, i], cosines, rtol=1e-4, atol=1e-5)
            want = want - F.log_softmax(cosines, 0)[ids[b, i + 1]] / 18
    torch.testing.assert_close(term(prior, 0.0), 0.06 * want, rtol=1e-4, atol=1e-6)


def test_the_second_round_reads_a_mixture():
    codes, ids, table = vq()
    prior = small(4, 7, weight=1.0, mix=0.5, mix_until=0.3)
    first = prior.logits(codes[:, :-1], table)
    noise, at = SampleNoise(KEY), torch.arange(6)
    for progress, share in ((0.15, 0.25), (0.3, 0.5), (1.0, 0.5)):
        mixed = codes.clone()
        for b in range(3):
            for i in range(6):
                if noise.uniform(at, 410)[b, i] <= share:
                    u, level, drawn = noise.uniform(at, 411)[b, i], 0.0, None
                    for code, p in enumerate(first[b, i].softmax(0)):  # inverse of the distribution function, by hand
                        level = level + p
                        if level >= u:
                            drawn = code
                            break
                    mixed[b, i + 1] = table[11 if drawn is None else drawn]
        assert not torch.equal(mixed, codes)
        second = prior.logits(mixed[:, :-1], table)
        each = [F.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in (first, second)]
        torch.testing.assert_close(term(prior, progress), sum(each) / 2)
    assert term(prior, 1.0) != term(prior, 1.0, KEY + 1)
    torch.testing.assert_close(term(small(4, 7, weight=1.0, rounds=1), 1.0), term(prior, 0.0))


def test_it_learns_a_predictable_sequence():
    """Codes that repeat: a hot enough prior falls far below log V; the codebook stays where it was."""
    torch.manual_seed(0)
    quantizer = VQ(vocab_size=8, channels=4)
    table = codebook(quantizer)
    ids = torch.arange(12).remainder(4).expand(4, -1)
    codes, prior = F.embedding(ids, table), small(4, 12, weight=1.0, rounds=1, temperature=0.1)
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(prior.logits(codes[:, :-1], table).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < math.log(8) - 1 and torch.equal(codebook(quantizer), table)


def test_mistakes_are_named():
    for options, word in (({"rounds": 0}, "rounds"), ({"mix": 2.0}, "mix"), ({"temperature": 0.0}, "temperature")):
        with pytest.raises(ValueError, match=word):
            small(4, 7, **options)
    with pytest.raises(ValueError, match="channels=5"):
        term(small(5, 7), 0.0)
    with pytest.raises(ValueError, match="length=6"):
        term(small(4, 6), 0.0)
    with pytest.raises(ValueError, match="part=1"):
        term(small(4, 7, part=1), 0.0)


def test_stochastic_codes_follow_the_softmax_of_cosines():
    torch.manual_seed(0)
    quantizer = VQ(vocab_size=5, channels=3, stochastic=0.5).train()
    z = torch.tensor([0.6, 0.0, 0.8])
    found = quantizer(z.expand(1, 20_000, 3))
    shares = torch.bincount(found.ids.flatten(), minlength=5) / 20_000
    want = (codebook(quantizer) @ z / 0.5).softmax(0)
    assert (shares - want).abs().max() < 4 * 0.5 / 20_000**0.5  # four standard errors
    assert torch.equal(found.codes, quantizer.lookup(found.ids))
    quantizer.eval()
    assert (quantizer(z.expand(1, 9, 3)).ids == want.argmax()).all()
    with pytest.raises(ValueError, match="l2_norm"):
        VQ(vocab_size=5, channels=3, stochastic=0.5, l2_norm=False)
