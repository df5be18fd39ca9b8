"""Orthus: latents that enter by soft vector quantisation, drawn one after another by a diffusion head."""

import pytest
import torch
from generators import CHANNELS, make, tokens_of
from test_generators import LABELS

from vgen.models.orthus import Orthus, SoftCodes
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec


def test_soft_codes_are_the_mean_of_embeddings_by_distance():
    torch.manual_seed(0)
    soft, x = SoftCodes(codes=7, channels=3, dim=5, tau=0.5).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    centres, embeddings = soft.centres.weight.detach(), soft.embeddings.weight.detach()
    for i in range(2):
        for j in range(4):
            weights = [float((-((x[i, j] - c) ** 2).sum() / 0.5).exp()) for c in centres]
            want = sum(w / sum(weights) * e for w, e in zip(weights, embeddings))
            torch.testing.assert_close(soft(x)[i, j].detach(), want, rtol=1e-5, atol=1e-6)


def test_soft_codes_that_are_cold_are_those_of_the_nearest_centre():
    torch.manual_seed(0)
    soft, x = SoftCodes(codes=7, channels=3, dim=5, tau=1e-4), torch.randn(50, 3)
    nearest = torch.cdist(x, soft.centres.weight).argmin(1)
    torch.testing.assert_close(soft(x), soft.embeddings(nearest))


def test_its_loss_is_that_of_the_head_on_each_position():
    """Token by token through the cache, with the head's own loss of one token at its place."""
    model, tokens = make("orthus"), tokens_of(make("orthus"), 3)
    batch = {"tokens": tokens, "label": LABELS, "key": sample_seeds(0, 0, 3)}
    noise, cond, cache = SampleNoise(batch["key"]), model.conditioner(LABELS), model.cache(3)
    found = model.loss(batch)["nats"]
    for k in range(model.layout.steps):
        h = model(model.arrange(tokens), cond, k, k + 1, cache)
        cache.commit(1)
        place = torch.tensor([k])
        one = model.head.loss(h, tokens[:, k : k + 1], (1,), noise=noise, position=place)
        torch.testing.assert_close(one[:, 0], found[:, k], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"codes=1, tau=1\.0: at least two centres"):
        make("orthus", codes=1)
    with pytest.raises(ValueError, match="a temperature above 0"):
        make("orthus", tau=0.0)
    line = TokenSpec(SequenceLayout.line(16), (Part(16, None, CHANNELS),), 32)
    with pytest.raises(ValueError, match="Orthus needs latents that fill one grid"):
        Orthus(line, 5, depth=1, width=16, heads=2)
