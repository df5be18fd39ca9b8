"""xAR: orders of entities, noisy context, the solver's context at time 0, guidance on the velocity, sizes."""

from dataclasses import replace

import pytest
import torch
from generators import CHANNELS, CLASSES, latent_spec, make, tokens_of, xar

from vgen.conditioning import Cond
from vgen.generator import Canvas
from vgen.guidance import ClassifierFree, Constant, Linear
from vgen.heads import DrawRule
from vgen.latents import entity_layout
from vgen.models.xar import XAR
from vgen.samplers.ancestral import ancestral
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

LABELS = torch.tensor([0, 3, CLASSES])


def test_entities_are_these_cells():
    cells = entity_layout(4, 4, "cell", None)
    assert cells.sizes == (4,) * 4 and [c[1:] for c in cells.coords[4:8]] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    spread = entity_layout(4, 6, "subsample", 2)
    assert spread.sizes == (6,) * 4
    assert [c[1:] for c in spread.coords[6:12]] == [(r, c) for r in (0, 2) for c in (1, 3, 5)]
    assert entity_layout(16, 16, "scale", None).sizes == (1, 4, 16, 64, 256)
    assert entity_layout(16, 16, "scale", 2).sizes == (64, 256)
    assert entity_layout(4, 4, "image", None).sizes == (16,) and entity_layout(2, 3, "token", None).sizes == (1,) * 6


@pytest.mark.parametrize(
    "entity, size", [("token", None), ("cell", 1), ("subsample", 2), ("image", None), ("scale", 2)]
)
def test_arrange_finds_every_cell_in_any_order_of_the_tokenizer(entity, size):
    columns = SequenceLayout((1,) * 16, tuple((0, r, c) for c in range(4) for r in range(4)))
    model = xar(entity, size, spec=TokenSpec(columns, (Part(16, None, CHANNELS),), 32))
    tokens = torch.tensor([[r, c] for _, r, c in columns.coords], dtype=torch.float32)[None].repeat(2, 1, CHANNELS // 2)
    canvas = model.arrange(tokens)
    want = torch.tensor([[r, c] for _, r, c in model.layout.coords], dtype=torch.float32)
    if entity == "scale":  # the mean row of cells 2i and 2i + 1 is 2i + 1/2
        want[: model.layout.sizes[0]] = 2 * want[: model.layout.sizes[0]] + 0.5
    torch.testing.assert_close(canvas.tokens[0, :, :2], want)
    assert torch.equal(model.restore(canvas), tokens)


@pytest.mark.parametrize("name", ["xar_cell", "xar_subsample", "xar_scale", "xar_token"])
def test_a_noised_step_against_the_cache_equals_one_pass_with_clean_context(name):
    model = make(name)
    cond, canvas = model.conditioner(LABELS), model.arrange(tokens_of(model, 3))
    cache, layout = model.cache(3), model.layout
    for k in range(layout.steps):
        a, b = layout.written(k, k + 1)
        for t in (0.9, 0.35):  # the cache is provisional: the second write takes the place of the first
            noised, time = canvas.tokens.clone(), torch.zeros(3, layout.steps)
            noised[:, a:b] += torch.randn(3, b - a, CHANNELS, generator=torch.Generator().manual_seed(k))
            time[:, k] = t
            there = Canvas(noised, layout, time=time)
            whole = model(there, cond, 0, k + 1)[:, a:]
            torch.testing.assert_close(model(there, cond, k, k + 1, cache), whole, rtol=1e-4, atol=1e-4)
        model(canvas, cond, k, k + 1, cache)
        cache.commit(layout.reads[k])
        clean = model(Canvas(canvas.tokens, layout), cond, 0, k + 1)[:, a:]
        assert not torch.allclose(whole, clean, atol=1e-2), "the time must matter"


def test_noisy_context_has_independent_logit_normal_times_and_straight_paths():
    model = make("xar_cell")
    canvas, keys = model.arrange(torch.randn(2000, 16, CHANNELS)), sample_seeds(0, 0, 2000)
    noised, velocity = model.corrupt(canvas, keys)
    logits = noised.time.logit()
    torch.testing.assert_close(logits.mean(0), torch.zeros(4), rtol=0, atol=0.1)  # 4 sigma of 2,000 draws
    torch.testing.assert_close(logits.T.cov(), torch.eye(4), rtol=0, atol=0.15)
    t = noised.time[:, model.entities, None]
    torch.testing.assert_close(noised.tokens - t * velocity, canvas.tokens, rtol=1e-4, atol=1e-4)
    noise = noised.tokens + (1 - t) * velocity
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02
    part, _ = model.corrupt(Canvas(canvas.tokens[50:60], canvas.layout), keys[50:60])
    assert torch.equal(part.tokens, noised.tokens[50:60]) and torch.equal(part.time, noised.time[50:60])


def test_one_euler_step_by_hand_with_guidance_and_a_given_cell():
    """x_0 = e - v: each cell's velocity at time 1 given clean cells, its scale rising; a given cell stays."""
    model, seeds = make("xar_cell"), sample_seeds(0, 0, 3)
    noise, layout = SampleNoise(seeds), model.layout
    cond, null = model.conditioner(LABELS), model.conditioner.null(3)
    given = model.arrange(tokens_of(model, 3))
    given.known = (torch.arange(16) < 4).expand(3, -1)
    want, tokens = given.tokens.clone(), given.tokens.clone()
    for k in range(1, 4):
        a, b = layout.written(k, k + 1)
        start, time = noise.normal(torch.arange(a, b), CHANNELS), torch.zeros(3, 4)
        tokens, time[:, k] = want.clone(), 1.0
        tokens[:, a:b] = start
        c, u = (model.head(model(Canvas(tokens, layout, time=time), row, 0, k + 1)[:, a:b]) for row in (cond, null))
        want[:, a:b] = start - (u + (1 + 2.0 * k / 3) * (c - u))
    rule, guide = DrawRule(solver="euler", solver_steps=1), ClassifierFree(Linear(3.0))
    done = ancestral(model, Cond.cat([cond, null]), noise=noise, guide=guide, rule=rule, canvas=given)
    torch.testing.assert_close(done.tokens, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_the_first_cell_runs_no_null_rows_but_where_they_are_kept(cached, monkeypatch):
    """A rising scale is 1 there: 4 velocities of 3 rows; then each finished cell's encoding and 4 velocities with null
    rows. The tokens are those of a guidance that is asked everywhere; edits may know all rows, and get them."""
    model, noise, rule = make("xar_cell"), SampleNoise(sample_seeds(0, 0, 3)), DrawRule(solver_steps=4)
    cond, rows = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)]), []
    model.trunk.register_forward_pre_hook(lambda _, args: rows.append(len(args[0].x)))
    guide, again = ClassifierFree(Linear(3.0)), 1 if cached else 0
    run = lambda given: ancestral(model, given, noise=noise, guide=guide, rule=rule, cached=cached).tokens  # noqa: E731
    got, fewer = run(cond), rows.copy()
    assert fewer == [3] * 4 + [6] * 3 * (4 + again)
    rows.clear()
    edited = run(replace(cond, at={0: lambda h, place: h}))
    monkeypatch.setattr("vgen.flow_draw.reads_null", lambda *_: True)
    want = run(replace(cond, at={0: lambda h, place: h}))
    assert set(rows) == {6}
    for other in (edited, want):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)


def test_an_image_drawn_in_one_step_is_guided_in_it():
    """The only step is the last one: a rising scale is its whole there, as a constant one."""
    model, noise = make("xar_image"), SampleNoise(sample_seeds(0, 0, 3))
    cond = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
    guides = [ClassifierFree(Linear(5.0)), ClassifierFree(Constant(5.0)), ClassifierFree(Constant(1.0))]
    rising, full, off = (ancestral(model, cond, noise=noise, guide=guide, rule=DrawRule()).tokens for guide in guides)
    assert torch.equal(rising, full) and not torch.allclose(rising, off, atol=1e-3)


def test_one_vector_for_many_positions_is_that_vector_at_each():
    torch.manual_seed(0)
    trunk = Trunk(dim=16, depth=2, heads=2, hidden=24, modulation="own", ffn="geglu").eval()
    x, vector, each = torch.randn(2, 5, 16), torch.randn(2, 3, 16), torch.tensor([0, 0, 1, 2, 2])
    shared = Inputs(x=x, rank=each, vector=vector, each=each)
    torch.testing.assert_close(trunk(shared), trunk(Inputs(x=x, rank=each, vector=vector[:, each])))
    window = torch.tensor([[1, 3], [1, 3]])
    assert torch.equal(shared.window(window).vector, vector[:, [0, 2]])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_vectors_of_runs_of_positions_are_those_at_each_of_them(norm):
    """In values and gradients, where paths are dropped, behind a prefix, and in windows."""
    torch.manual_seed(0)
    options = {"modulation": "own", "ffn": "geglu", "norm": norm, "drop_path": 0.5, "dropout": 0.1}
    trunk = Trunk(dim=16, depth=3, heads=2, hidden=24, **options)
    x, vector, rank = torch.randn(8, 6, 16), torch.randn(8, 3, 16), torch.tensor([0, 0, 1, 1, 2, 2])
    ways = ({"vector": vector}, {"vector": vector, "each": rank}, {"vector": vector.repeat_interleave(2, 1)})
    found, gradients = [], []
    for given in ways:
        trunk.zero_grad()
        torch.manual_seed(1)
        found.append(trunk(Inputs(x=x, rank=rank, **given)))
        found[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in trunk.parameters() if p.grad is not None])
    for got, other in zip(found[1:], gradients[1:], strict=True):
        torch.testing.assert_close(got, found[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    trunk.eval()
    prefix, window = torch.randn(8, 2, 16), torch.tensor([[0, 2, 5]] * 8)
    fronted = [trunk(Inputs(x=x, rank=rank, **given).behind(prefix)) for given in ways]
    seen = [Inputs(x=x, rank=rank, **given).window(window).vector for given in ways]
    for i in (1, 2):
        torch.testing.assert_close(fronted[i], fronted[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(seen[i], seen[0]) and torch.equal(seen[0], vector[:, [0, 1, 2]])


def test_geglu_by_definition():
    torch.manual_seed(0)
    ffn = Trunk(dim=8, depth=1, heads=1, hidden=12, ffn="geglu", bias="qkv").blocks[0].ffn
    x = torch.randn(3, 8)
    gate, value = (x @ ffn.up.weight.T + ffn.up.bias).split(12, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(ffn(x), (gelu * value) @ ffn.down.weight.T + ffn.down.bias)


@pytest.mark.parametrize(
    "depth, width, heads, count",
    [(8, 768, 12, 172_638_224), (16, 1024, 16, 608_397_968), (20, 1280, 16, 1_186_024_096)],
)
def test_published_sizes(depth, width, heads, count):
    spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, None, 16),), 256)
    with torch.device("meta"):
        model = XAR(spec, 1000, depth=depth, width=width, heads=heads)
    assert model.layout.sizes == (64,) * 4 and sum(p.numel() for p in model.parameters()) == count


def test_mistakes_are_named():
    discrete = TokenSpec(SequenceLayout.raster(4, 4), (Part(16, 8, 4),), 32)
    line = TokenSpec(SequenceLayout.line(16), (Part(16, None, 4),), 32)
    for spec, words in ((discrete, "tokens are ids"), (line, "one grid")):
        with pytest.raises(ValueError, match=words):
            XAR.accepts(spec)
    wrong = (("token", 2, "no entity_size"), ("cell", 3, "does not divide"), ("cells", None, "choose"))
    wrong += tuple(
        (entity, size, f"entity_size={size}") for entity in ("cell", "subsample", "scale") for size in (0, -2)
    )
    for entity, size, words in wrong:
        with pytest.raises(ValueError, match=words):
            xar(entity, size)
    with pytest.raises(ValueError, match="halved 2 times, not 3"):
        xar("scale", 4)
    with pytest.raises(ValueError, match="solver='rk4'"):
        xar("cell", solver="rk4")
    model = make("xar_cell")
    with pytest.raises(ValueError, match="top_k"):
        ancestral(model, model.conditioner(LABELS), noise=SampleNoise(sample_seeds(0, 0, 3)), rule=DrawRule(top_k=3))
    with pytest.raises(ValueError, match="solver_steps are for continuous"):
        model = make("llamagen")
        ancestral(
            model, model.conditioner(LABELS), noise=SampleNoise(sample_seeds(0, 0, 3)), rule=DrawRule(solver_steps=3)
        )


def test_a_bf16_trunk_beside_float32_embeddings():
    model, labels = make("xar_cell"), LABELS[:2]
    canvas = model.arrange(tokens_of(model, 2))
    want = model.head(model(canvas, model.conditioner(labels)))
    model.trunk.to(torch.bfloat16)
    got = model.head(model(canvas, model.conditioner(labels)))
    assert got.dtype == torch.float32 and (got - want).norm() < 0.05 * want.norm()
    assert latent_spec().parts[0].channels == got.shape[2]
