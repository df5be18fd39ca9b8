"""Transition Matching: the laws of the levels, what each variant sees, and chains through a perfect head."""

import pytest
import torch
from generators import CHANNELS, CLASSES, FAMILIES, make, tokens_of

from vgen.conditioning import Cond
from vgen.generator import Canvas
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.models.transition import DTM
from vgen.samplers.ancestral import ancestral
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

LABELS = torch.tensor([0, 3, CLASSES])


def changed(model, canvas, place):
    tokens = canvas.tokens.clone()
    tokens[:, place] += 1
    before = model(canvas, model.conditioner(LABELS))
    after = model(Canvas(tokens, canvas.layout), model.conditioner(LABELS))
    moved = ~torch.isclose(before, after, rtol=1e-4, atol=1e-5).all(-1).all(0)
    return set(moved.nonzero()[:, 0].tolist())


def test_what_a_token_reaches():
    """N = 16. DTM: all of the next level, nothing else. ARTM: also later tokens of its own level, no level after the
    next. FHTM: everything after it."""
    dtm, artm, fhtm = make("dtm"), make("artm"), make("fhtm")
    assert changed(dtm, dtm.arrange(tokens_of(dtm, 3)), 20) == set(range(32, 48))
    assert changed(artm, artm.arrange(tokens_of(artm, 3)), 0) == set(range(16, 32))
    assert changed(artm, artm.arrange(tokens_of(artm, 3)), 20) == set(range(21, 48))
    assert changed(artm, artm.arrange(tokens_of(artm, 3)), 15) == set(range(16, 32))
    assert changed(fhtm, fhtm.arrange(tokens_of(fhtm, 3)), 0) == set(range(16, 48))
    assert changed(fhtm, fhtm.arrange(tokens_of(fhtm, 3)), 20) == set(range(21, 48))


def test_layouts_read_the_class_then_the_levels():
    artm, fhtm = make("artm").layout, make("fhtm").layout
    assert artm.sizes == fhtm.sizes == (16, *(1,) * 32)
    assert artm.reads == (1, 16, *(1,) * 15, 16, *(1,) * 15) and fhtm.reads == (1, 16, *(1,) * 31)
    assert fhtm.pattern() == "causal" and make("dtm").layout.sizes == (16,) * 5


def test_levels_have_noise_of_their_own():
    model, data = make("fhtm"), torch.full((4000, 16, CHANNELS), 2.0)
    levels = model.chain(data, SampleNoise(sample_seeds(0, 0, 4000))).unflatten(1, (3, 16))
    means, spreads = levels.mean((0, 2, 3)), levels.std((0, 2, 3))
    torch.testing.assert_close(means, torch.tensor([0.0, 1.0, 2.0]), rtol=0, atol=0.02)
    torch.testing.assert_close(spreads, torch.tensor([1.0, 0.5, 0.0]), rtol=0, atol=0.02)
    first, second = (levels[:, i] - levels[:, i].mean() for i in (0, 1))
    assert abs(float((first * second).mean())) < 0.02


@pytest.mark.parametrize("steps", [1, 4])
def test_the_difference_chain_of_a_perfect_head_ends_at_the_data(monkeypatch, steps):
    model = (
        FAMILIES["dtm"]().eval()
        if steps == 4
        else DTM(make("dtm").spec, CLASSES, levels=1, depth=1, width=16, heads=2, head_width=16)
    )
    data, noise = tokens_of(model, 3), SampleNoise(sample_seeds(0, 0, 3))
    start = noise.normal(torch.arange(16), CHANNELS)
    monkeypatch.setattr(model.head, "draw", lambda h, sizes, **options: data - start)
    done = ancestral(model, model.conditioner(LABELS), noise=noise)
    assert torch.equal(done.tokens[:, :16], start) and model.cache(3) is None
    torch.testing.assert_close(model.restore(done), data, rtol=1e-5, atol=1e-5)
    half = done.tokens[:, 16 * (steps // 2) :][:, :16]
    share = (steps // 2) / steps
    torch.testing.assert_close(half, (1 - share) * start + share * data, rtol=1e-5, atol=1e-5)


def test_training_levels_of_dtm_are_uniform_and_its_target_is_the_difference(monkeypatch):
    model, seen = FAMILIES["dtm"](), []
    monkeypatch.setattr(model, "read", lambda x, time, cond, level: seen.append((x, time, level)) or x)
    monkeypatch.setattr(model, "run", lambda x: x.new_zeros(len(x), 16, 16))
    targets = []
    monkeypatch.setattr(
        model.head, "loss", lambda h, target, sizes, noise: targets.append(target) or (target**2).mean(-1)
    )
    data = torch.randn(4000, 16, CHANNELS)
    labels = torch.zeros(4000, dtype=torch.int64)
    model.loss({"tokens": data, "label": labels, "key": sample_seeds(0, 0, 4000)})
    (x, time, level), target = seen[0], targets[0]
    assert torch.equal(level, 5 - (4 * time).long())  # the one that follows
    counts = torch.stack([(time == t).sum() for t in (1.0, 0.75, 0.5, 0.25)])
    assert counts.sum() == 4000 and (counts - 1000).abs().max() < 120  # 4 sigma
    torch.testing.assert_close(x + time[:, None, None] * target, data, rtol=1e-4, atol=1e-4)


def test_guidance_acts_on_the_velocity_of_the_token_head():
    model, noise = make("fhtm"), SampleNoise(sample_seeds(0, 0, 3))
    cond, null = model.conditioner(LABELS), model.conditioner.null(3)
    rule = DrawRule(solver_steps=1)
    done = ancestral(model, Cond.cat([cond, null]), noise=noise, guide=guidance(2.5), rule=rule)
    start, one = noise.normal(torch.arange(48), CHANNELS), torch.ones(3, 32)
    c, u = (model.head.mlp(start[:, 16:], one, model(done, row)[:, 16:]) for row in (cond, null))
    torch.testing.assert_close(done.tokens[:, 16:], start[:, 16:] - (u + 2.5 * (c - u)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dtm", "artm", "fhtm"])
def test_mistakes_are_named(name):
    with pytest.raises(ValueError, match="levels=0"):
        type(make(name))(make(name).spec, CLASSES, levels=0, depth=1, width=16, heads=2)
    with pytest.raises(ValueError, match="tokens are ids"):
        type(make(name)).accepts(TokenSpec(SequenceLayout.raster(4, 4), (Part(16, 8, 4),), 32))
