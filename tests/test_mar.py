"""MAR: sets, orders, what a step may see, masks of training, learning, published sizes."""

import math

import pytest
import torch
from generators import CLASSES, grid_spec, latent_spec, make, tokens_of

from vgen.conditioning import Cond
from vgen.guidance import Count, Progress, Unguided, guidance
from vgen.heads import DrawRule
from vgen.masking import masked_layout, random_order, set_sizes
from vgen.models.mar import MAR
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

BOTH = pytest.mark.parametrize("name", ["mar", "mar_flow"])
LABELS = torch.tensor([0, 3, CLASSES])


@pytest.mark.parametrize("curve", ["cosine", "arccos"])
@pytest.mark.parametrize("tokens", [1, 4, 16, 256])
def test_sets_follow_the_curve(tokens, curve):
    """Every number of steps decides every token, at least one a step; where they can, floor(N curve) stay open."""
    for steps in range(1, tokens + 1):
        sizes = set_sizes(tokens, steps, curve)
        assert len(sizes) == steps and sum(sizes) == tokens and min(sizes) >= 1
        left = tokens
        for step, size in enumerate(sizes[:-1], 1):
            share = math.cos(math.pi / 2 * step / steps) if curve == "cosine" else math.acos(step / steps) * 2 / math.pi
            assert left - size == max(1, min(left - 1, int(tokens * share)))
            left -= size
    assert set_sizes(tokens, tokens, curve) == (1,) * tokens
    with pytest.raises(ValueError, match=f"steps={tokens + 1}"):
        set_sizes(tokens, tokens + 1, curve)


def test_orders_are_the_samples_own():
    seeds = sample_seeds(0, 0, 50)
    orders = random_order(SampleNoise(seeds), 16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(50, -1))
    assert torch.equal(random_order(SampleNoise(seeds[7:9]), 16), orders[7:9])
    assert len({tuple(order) for order in orders.tolist()}) == 50
    many = random_order(SampleNoise(sample_seeds(1, 0, 20_000)), 4)
    counts = torch.stack([(many == cell).double().mean(0) for cell in range(4)])
    assert (counts - 0.25).abs().max() < 0.015  # every cell at every place equally often


def test_arrange_and_restore_are_inverse():
    model = make("mar")
    tokens = tokens_of(model, 3)
    order = random_order(SampleNoise(sample_seeds(0, 0, 3)), 16)
    canvas = model.arrange(tokens, order)
    assert torch.equal(canvas.tokens[1, 5], tokens[1, order[1, 5]])
    assert torch.equal(model.restore(canvas), tokens) and torch.equal(model.restore(model.arrange(tokens)), tokens)


@BOTH
def test_a_step_sees_the_decided_tokens_alone(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    order = random_order(SampleNoise(sample_seeds(0, 0, 3)), 16)
    canvas = model.arrange(tokens, order)
    for step in range(model.layout.steps):
        a, b = model.layout.written(step, step + 1)
        h = model(canvas, cond, step, step + 1)
        assert h.shape[1] == b - a
        later = model.arrange(tokens, order)
        later.tokens[:, a:] += 1
        assert torch.equal(model(later, cond, step, step + 1), h)
        for place in range(a):
            earlier = model.arrange(tokens, order)
            earlier.tokens[:, place] += 1
            assert not torch.allclose(model(earlier, cond, step, step + 1), h, atol=1e-4)


@BOTH
def test_the_order_of_the_decided_tokens_does_not_matter(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    order = random_order(SampleNoise(sample_seeds(0, 0, 3)), 16)
    a, _ = model.layout.written(3, 4)
    turned = torch.cat([order[:, :a].flip(1), order[:, a:]], dim=1)
    h = model(model.arrange(tokens, order), cond, 3, 4)
    torch.testing.assert_close(model(model.arrange(tokens, turned), cond, 3, 4), h, rtol=1e-4, atol=1e-5)


@BOTH
def test_a_sampling_is_its_steps_drawn_by_hand(name):
    model, noise = make(name), SampleNoise(sample_seeds(0, 0, 3))
    guide, rule = guidance(2.0, "count"), DrawRule(temperature=0.9)
    cond = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
    done = model.sampler(model, cond, noise=noise, guide=guide, rule=rule)
    order = random_order(noise, 16)
    assert torch.equal(done.order, order)
    latents = torch.zeros(3, 16, model.head.channels)  # in raster order
    rows = torch.arange(3)[:, None]
    for step in range(model.layout.steps):
        a, b = model.layout.written(step, step + 1)
        cells = order[:, a:b]
        known = latents[rows, order[:, :a]]
        h = model.states(known.repeat(2, 1, 1), order[:, :a].repeat(2, 1), cond)
        h = h[torch.arange(6)[:, None], cells.repeat(2, 1)]
        progress = Progress(step, model.layout.steps, a / 16, b / 16)
        settings = {"guide": guide, "noise": noise, "position": cells, "rule": rule, "progress": progress}
        with torch.no_grad():
            latents[rows, cells] = model.head.draw(h, (b - a,), **settings)
    top = float(latents.abs().max())
    torch.testing.assert_close(model.restore(done), latents, rtol=1e-3, atol=1e-4 * top)


def test_the_share_that_is_hidden_has_the_truncated_normal():
    """Against rejection sampling: N(1, 0.25) kept in [0.7, 1], ceil(256 r) hidden."""
    with torch.device("meta"):
        spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, None, 16),), 256)
        model = MAR(spec, 10, depth=1, width=16, heads=2, head_depth=1, head_width=16)
    counts = model.hidden_count(SampleNoise(sample_seeds(0, 0, 20_000)))
    normal = 1 + 0.25 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    want = (256 * normal[(normal >= 0.7) & (normal <= 1)]).ceil()
    assert counts.min() >= math.ceil(0.7 * 256) and counts.max() == 256
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(float(counts.double().quantile(q)) - float(want[:50_000].quantile(q))) <= 1


@pytest.mark.parametrize("shapes", ["of the batch", "of all batches"])
@BOTH
def test_the_loss_is_the_mean_over_hidden_tokens_and_keyed(name, shapes, monkeypatch):
    model = make(name)
    if shapes == "of all batches":  # as on CUDA
        monkeypatch.setattr(model, "shown", lambda kept: (0, model.most_kept))
    tokens, keys = tokens_of(model, 4), sample_seeds(0, 0, 4)
    labels = torch.tensor([0, 3, CLASSES, 1])
    out = model.loss({"tokens": tokens, "label": labels, "key": keys})
    torch.testing.assert_close(out["loss"], out["nats"].mean())
    for row in range(4):  # by hand, one sample at a time, without padding
        noise = SampleNoise(keys[row : row + 1])
        order, hidden = random_order(noise, 16), int(model.hidden_count(noise))
        seen, cells = order[:, : 16 - hidden], order[:, 16 - hidden :]
        known = tokens[row : row + 1][:, seen[0]]
        h = model.states(known, seen, model.conditioner(labels[row : row + 1]))
        losses = model.head.loss(h, tokens[row : row + 1], (), noise=noise)
        torch.testing.assert_close(out["nats"][row], losses[:, cells[0]].mean(1), rtol=1e-4, atol=1e-5)


def test_context_replaces_what_is_seen():
    model = make("mar")
    batch = {"tokens": tokens_of(model, 3), "label": LABELS, "key": sample_seeds(0, 0, 3)}
    plain, other = model.loss(batch)["nats"], model.loss(batch | {"context": tokens_of(model, 3, seed=9)})["nats"]
    assert torch.equal(model.loss(batch | {"context": batch["tokens"]})["nats"], plain)
    seen = model.hidden_count(SampleNoise(batch["key"])) < 16
    assert seen.any() and torch.equal((plain != other)[:, 0], seen)


@BOTH
def test_one_batch_of_latents_is_learned(name):
    """An image is known given its class: samples are much nearer to it than to those of other classes."""
    torch.manual_seed(0)
    wide = {"width": 32, "head_width": 64, "head_depth": 2, "solver_steps": 20, "repeats": 4}
    head = {"head": "flow"} if name == "mar_flow" else {"clip": 3.0}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "label_drop": 0.0}
    model = MAR(latent_spec(), CLASSES, depth=1, heads=2, buffer=2, steps=4, **wide, **head, **quiet).train()
    tokens, labels = tokens_of(model, 4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(250):
        optimizer.zero_grad()
        model.loss({"tokens": tokens, "label": labels, "key": sample_seeds(step, 0, 4)})["loss"].backward()
        optimizer.step()
        if step in (124, 187, 249):  # as soon as it is so
            model.eval()
            noise = SampleNoise(sample_seeds(0, 0, 4))
            drawn = model.restore(model.sampler(model, model.conditioner(labels), noise=noise, guide=Unguided()))
            errors = torch.stack([(drawn - tokens.roll(k, 0)).square().mean() for k in range(4)])
            if errors[0] < 0.6 * errors[1:].min():
                return
            model.train()
    pytest.fail(str(errors))


@BOTH
def test_given_tokens_are_seen_from_the_first_step_on(name):
    model = make(name)
    tokens, cond = tokens_of(model, 3), model.conditioner(LABELS)
    order = random_order(SampleNoise(sample_seeds(0, 0, 3)), 16)
    canvas = model.arrange(tokens, order)
    plain = model(canvas, cond, 2, 3)
    canvas.known = torch.zeros(3, 16, dtype=torch.bool)
    torch.testing.assert_close(model(canvas, cond, 2, 3), plain, rtol=1e-4, atol=1e-5)
    canvas.known[0, 12], canvas.known[1, 10:14] = True, True  # rows differ in how many; the third has none
    a, b = model.layout.written(0, 1)
    h = model(canvas, cond, 0, 1)
    for row, places in ((0, [12]), (1, [10, 11, 12, 13]), (2, [])):
        cells = order[row : row + 1, places]
        want = model.states(tokens[row : row + 1][:, cells[0]], cells, model.conditioner(LABELS[row : row + 1]))
        torch.testing.assert_close(h[row], want[0, order[row, a:b]], rtol=1e-4, atol=1e-5)
    done = model.sampler(model, cond, noise=SampleNoise(sample_seeds(0, 0, 3)), canvas=canvas)
    assert torch.equal(model.restore(done)[1, order[1, 10:14]], tokens[1, order[1, 10:14]])


def test_steps_may_be_chosen_after_training():
    for name, steps in (("mar", 7), ("maskgit", 3)):
        model = make(name)
        model.set_steps(steps)
        assert model.layout.steps == steps and sum(model.layout.sizes) == 16
        done = model.sampler(model, model.conditioner(LABELS), noise=SampleNoise(sample_seeds(0, 0, 3)))
        assert done.tokens.shape[:2] == (3, 16)
    with pytest.raises(ValueError, match="LlamaGen samples in 16 steps"):
        make("llamagen").set_steps(4)


def test_guidance_counts_decided_tokens():
    layout = masked_layout(SequenceLayout.raster(16, 16), 64, "cosine")
    scales = []
    for step in range(64):
        a, b = layout.written(step, step + 1)
        scales.append(Count(3.0, tokens=256)(Progress(step, 64, a / 256, b / 256)))
    open_ = [256 - layout.written(0, step + 1)[1] for step in range(63)] + [1]
    assert scales == pytest.approx([1 + 2 * (256 - n) / 256 for n in open_])
    assert Count(3.0)(Progress(63, 64, 0.9, 1.0)) == 3.0


def test_weights_of_the_trunk_may_be_bfloat16():
    model = make("mar")
    model.trunk.to(torch.bfloat16)
    noise = SampleNoise(sample_seeds(0, 0, 3))
    drawn = model.sampler(model, model.conditioner(LABELS), noise=noise).tokens
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_specs_that_do_not_fit_say_why():
    with pytest.raises(ValueError, match="these are ids"):
        MAR.accepts(grid_spec())
    with pytest.raises(ValueError, match="2 parts"):
        MAR.accepts(TokenSpec(SequenceLayout.line(4), (Part(2, None, 8), Part(2, None, 8)), 32))
    with pytest.raises(ValueError, match="head='mlp'"):
        make("mar", head="mlp")
    with pytest.raises(ValueError, match="steps=17"):
        make("mar", steps=17)


@pytest.mark.parametrize(
    "depth, width, heads, head_depth, head_width, count",
    [
        (12, 768, 12, 6, 1024, 207_924_768),
        (16, 1024, 16, 8, 1280, 478_326_304),
        (20, 1280, 16, 12, 1536, 942_403_104),
    ],
)
def test_published_parameter_counts(depth, width, heads, head_depth, head_width, count):
    spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, None, 16),), 256)
    sizes = {"depth": depth, "width": width, "heads": heads, "head_depth": head_depth, "head_width": head_width}
    with torch.device("meta"):
        model = MAR(spec, 1000, **sizes)
    assert sum(p.numel() for p in model.parameters()) == count
