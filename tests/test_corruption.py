"""Context corruption against brute force: which tokens, which codes, keyed by the sample, and what the loss does."""

import pytest
import torch
from generators import latent_spec, make, map_spec, parts_spec, tokens_of

from vgen.corruption import Corruption
from vtok.noise import sample_seeds
from vtok.quantize.parts import PartsQuantizer
from vtok.quantize.vq import VQ
from vtok.tokenizer import TokenSpec


def quantizer(vocabulary=24, channels=6):
    torch.manual_seed(0)
    made = VQ(vocab_size=vocabulary, channels=channels)
    torch.nn.init.normal_(made.codebook.weight)
    return made


def batch_of(spec: TokenSpec, rows: int):
    torch.manual_seed(1)
    length = spec.layout.length
    tokens = torch.randint(24, (rows, length)) if spec.discrete else torch.randn(rows, length, spec.parts[0].channels)
    return {"tokens": tokens, "key": sample_seeds(3, 0, rows), "label": torch.zeros(rows, dtype=torch.int64)}


@pytest.mark.parametrize("kind", ["random", "near", "noise"])
def test_draws_belong_to_the_sample_and_the_rate_is_met(kind):
    spec = map_spec()
    corrupt, batch = Corruption(spec, quantizer(), kind=kind, rate=0.4, near=3, sigma=3.0), batch_of(spec, 2000)
    out = corrupt(batch)
    assert torch.equal(out["tokens"], batch["tokens"]) and out["context"].min() >= 0 and out["context"].max() < 24
    share = (out["context"] != batch["tokens"]).float().mean()
    low, high = {"random": (0.36, 0.41), "near": (0.385, 0.415), "noise": (0.2, 0.41)}[kind]
    assert low < share < high  # a random code is the same one in 24; a noisy vector may stay
    alone = corrupt({name: value[7:9] for name, value in batch.items()})
    assert torch.equal(alone["context"], out["context"][7:9])


def test_near_codes_are_the_nearest_by_brute_force():
    spec, made = map_spec(), quantizer()
    batch = batch_of(spec, 50)
    context = Corruption(spec, made, kind="near", rate=1.0, near=4)(batch)["context"]
    table = made.codebook.table().detach()
    for right, wrong in zip(batch["tokens"].flatten().tolist()[:200], context.flatten().tolist()):
        order = (table - table[right]).norm(dim=1).argsort().tolist()
        assert order[0] == right and wrong in order[1:5]
    assert len(set(context[batch["tokens"] == 5].tolist())) == 4


def test_noise_moves_codes_to_the_nearest_and_small_noise_moves_none():
    spec = map_spec()
    batch = batch_of(spec, 50)
    still = Corruption(spec, quantizer(), kind="noise", rate=1.0, sigma=1e-4)(batch)["context"]
    assert torch.equal(still, batch["tokens"])


def test_continuous_tokens_take_noise_of_the_given_size():
    spec = latent_spec()
    batch = batch_of(spec, 500)
    moved = Corruption(spec, None, kind="noise", rate=0.25, sigma=0.5)(batch)["context"] - batch["tokens"]
    hit = moved.abs().sum(-1) > 0
    assert abs(hit.float().mean() - 0.25) < 0.02 and abs(moved[hit].std() - 0.5) < 0.02
    with pytest.raises(ValueError, match="continuous"):
        Corruption(spec, None, kind="near")


def test_parts_have_codes_of_their_own():
    spec = parts_spec()
    made = PartsQuantizer(quantizers=[quantizer(), quantizer()], counts=[spec.parts[0].count])
    assert Corruption(spec, made, kind="near", rate=1.0)(batch_of(spec, 3))["context"].shape == (3, 13)


@pytest.mark.parametrize("name", ["llamagen", "rar", "hita", "nbp_rows", "flexvar", "detailflow"])
def test_the_loss_reads_the_context_and_keeps_the_targets(name):
    model = make(name)
    batch = {"tokens": tokens_of(model, 3), "label": torch.zeros(3).long(), "key": sample_seeds(0, 0, 3)}
    wrong = Corruption(model.spec, None, kind="random", rate=0.5)(batch)
    logs = model.log_prob(
        model.arrange(batch["tokens"]), model.conditioner(batch["label"]), context=model.arrange(wrong["context"])
    )
    torch.testing.assert_close(model.loss(wrong)["nats"], -logs)


def test_mistakes_name_the_key():
    for options, word in (({"kind": "far"}, "kind"), ({"kind": "random", "rate": 0}, "rate")):
        with pytest.raises(ValueError, match=word):
            Corruption(map_spec(), quantizer(), **options)
    with pytest.raises(ValueError, match="use random"):
        Corruption(map_spec(), None, kind="near")
