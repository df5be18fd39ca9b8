"""Attention, cache and rope against the definitions."""

import functools
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import generators
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from generators import FAMILIES, also_read, tokens_of
from torch._subclasses.fake_tensor import FakeTensorMode

from vtok import counters
from vtok.acceleration import compile_blocks
from vtok.layers.attention import (
    MASKS,
    Attention,
    _flex,
    attend,
    attend_blocks,
    attend_naive,
    block_mask,
    block_mask_of,
    spans,
)
from vtok.layers.block import FeedForward, Gated
from vtok.layers.cache import KVCache
from vtok.layers.rope import rope_1d, rope_2d, rotate
from vtok.layers.trunk import Inputs, Trunk, pays
from vtok.layout import SequenceLayout, visible


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ranks_mask():
    ranks = SequenceLayout.levels((1, 2, 4)).ranks()
    return visible(ranks, ranks)


@pytest.mark.parametrize("mask", [None, "causal", ranks_mask(), (1, 3, 7)], ids=["full", "causal", "ranks", "blocks"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attend_equals_naive_softmax(mask, scale):
    q, k, v = torch.randn(3, 2, 3, 7, 8, dtype=torch.float64).unbind(0)
    got = attend(q, k, v, mask=mask, scale=scale)
    torch.testing.assert_close(got, attend_naive(q, k, v, mask=mask, scale=scale), rtol=1e-12, atol=1e-12)


def test_attend_refuses_what_it_cannot_do():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="as many queries"):
        attend(q[:, :, :2], q, q, mask="causal")
    with pytest.raises(ValueError, match="CUDA"):
        attend(q, q, q, mask=object())


@pytest.mark.parametrize("sides", [(1, 2, 3), (1, 2, 5, 7, 7), (8, 8)], ids=["14", "128", "128 alone"])
def test_added_positions_of_a_block_mask_are_not_seen(sides):
    """FlexAttention by its definition, which the CPU has: as under the bool mask of the positions that are there."""
    from torch.nn.attention.flex_attention import flex_attention

    ranks = torch.cat([torch.full((side * side,), k) for k, side in enumerate(sides)])
    q, k, v = torch.randn(3, 2, 2, len(ranks), 16).unbind(0)
    mask = block_mask(ranks)
    assert mask.shape[-2:] == (128, 128) and torch._dynamo.config.recompile_limit >= 64
    got = attend_blocks(flex_attention, q, k, v, mask=mask, scale=0.3)
    torch.testing.assert_close(got, attend_naive(q, k, v, mask=visible(ranks, ranks), scale=0.3), rtol=1e-5, atol=1e-5)


def test_block_masks_past_dynamos_limit_are_an_error_and_no_slow_pass(monkeypatch):
    """Two lengths where one may be compiled; dynamo's eager backend in the place of the kernels."""
    masks = [block_mask(torch.arange(length)) for length in (100, 200)]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    _flex.cache_clear()
    kernel = _flex()
    _flex.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for mask, length in zip(masks, (100, 200)):
            q, k, v = torch.randn(3, 1, 2, length, 16).unbind(0)
            with nullcontext() if length == 100 else pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                got = attend_blocks(kernel, q, k, v, mask=mask, scale=None)
                torch.testing.assert_close(got, attend_naive(q, k, v, mask="causal"), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def on_cuda(layout, start=0, stop=None):
    """Inputs of a training pass that say that they lie on CUDA."""
    x = SimpleNamespace(is_cuda=True, shape=(1, sum(layout.reads[start:stop]), 16))
    return Inputs(x, layout.ranks(start, stop, device=torch.device("cpu")), layout.pattern(start, stop))


def test_block_masks_are_built_once_for_a_shape(monkeypatch):
    """For each layout and range of steps, whichever trunk asks; no more than MASKS of them are kept."""
    from torch.nn.attention import flex_attention

    built, build = [], flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, **o: built.append(a) or build(*a, **o))
    block_mask_of.cache_clear()
    first, second = (Trunk(dim=16, depth=1, heads=2, hidden=32).train() for _ in range(2))
    layout, same = SequenceLayout.levels((1, 2, 4)), SequenceLayout.scales((1, 2))
    with torch.inference_mode():
        mask = first.mask(on_cuda(layout), None)
    assert all(first.mask(on_cuda(layout), None) is mask for _ in range(3)) and len(built) == 1
    assert second.mask(on_cuda(SequenceLayout.levels((1, 2, 4))), None) is mask and len(built) == 1
    seen = visible(layout.ranks(), layout.ranks())
    places = torch.arange(7)
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places), seen)
    assert not mask.kv_num_blocks.is_inference()
    others = [on_cuda(layout, 0, 2), on_cuda(layout, 1, 3), on_cuda(same)]  # other ranges of steps, another layout
    for count, inputs in enumerate(others * 2, start=2):
        got = first.mask(inputs, None)
        places = torch.arange(len(inputs.rank))
        seen = visible(inputs.rank, inputs.rank)
        assert got is not mask and torch.equal(got.mask_mod(0, 0, places[:, None], places), seen)
        assert len(built) == min(count, 4)
    first.mask(replace(on_cuda(layout), pattern="ranks"), None)  # ranks that only the device knows
    assert len(built) == 5
    for last in range(2, MASKS + 10):  # lists of scales, drawn anew every step
        first.mask(on_cuda(SequenceLayout.levels((1, 1, last))), None)
    assert block_mask_of.cache_info().currsize == MASKS
    first.mask(on_cuda(layout), None)
    assert len(built) == 5 + MASKS + 8 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a CUDA device")
def test_block_mask_equals_bool_mask_on_cuda():
    ranks = SequenceLayout.scales((1, 2, 4, 8, 10)).ranks(device="cuda")
    q, k, v = (torch.randn(2, 2, len(ranks), 64, device="cuda", requires_grad=True) for _ in range(3))
    grads = []
    for mask in (block_mask(ranks), visible(ranks, ranks)):
        out = attend(q, k, v, mask=mask)
        grads.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a CUDA device")
def test_drawn_lengths_share_kernels_on_cuda():
    """More lengths than dynamo compiles by itself, all of one or two tiles: two graphs, the values of the bool mask."""
    from torch._dynamo.utils import counters as compiled

    torch._dynamo.reset()
    before = compiled["stats"]["unique_graphs"]
    for last in range(20, 60, 2):  # 115 to 153 positions
        ranks = SequenceLayout.levels((1, 4, 90, last)).ranks(device="cuda")
        q, k, v = torch.randn(3, 1, 2, len(ranks), 64, device="cuda").unbind(0)
        want = attend(q, k, v, mask=visible(ranks, ranks))
        torch.testing.assert_close(attend(q, k, v, mask=block_mask(ranks)), want, rtol=1e-2, atol=1e-2)
    assert compiled["stats"]["unique_graphs"] - before <= 2


def test_rope_is_a_complex_rotation():
    x = torch.randn(2, 3, 5, 8)
    cos, sin = rope_1d(torch.arange(5), 8)
    turn = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    want = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(5, 4), turn)
    )
    torch.testing.assert_close(rotate(x, cos, sin), want.flatten(-2))


def test_rope_depends_on_relative_position_only():
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)

    def product(a, b):
        at = [rope_2d(torch.tensor([p[0]]), torch.tensor([p[1]]), 16) for p in (a, b)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(product((3, 5), (1, 2)), product((7, 4), (5, 1)), rtol=1e-4, atol=1e-5)


def test_zero_row_hides_the_position_from_every_query():
    """LlamaGen's class row: cos = sin = 0 makes its key the zero vector, so every query gives it logit 0."""
    x = torch.randn(1, 1, 4, 8)
    cos, sin = (torch.cat([torch.zeros(1, 4), t]) for t in rope_1d(torch.arange(3), 8))
    assert (rotate(x, cos, sin)[:, :, 0] == 0).all()


def test_l2_attention_scale_is_capped_at_100():
    layer = Attention(dim=8, heads=2, qk_norm="l2")
    assert torch.allclose(layer.log_scale.exp(), torch.tensor(4.0)) and layer.scale == 1.0
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        layer.log_scale.fill_(math.log(100))
        capped = layer(x)
        layer.log_scale.fill_(50.0)
        assert torch.equal(layer(x), capped)


def trunk(**options):
    return Trunk(dim=16, depth=2, heads=2, hidden=32, **options).eval()


@pytest.mark.parametrize("qk_norm", ["none", "l2", "rms", "layer"])
@pytest.mark.parametrize("modulation", ["none", "own", "shared"])
def test_cached_steps_equal_one_pass(qk_norm, modulation):
    layout = SequenceLayout.levels((1, 2, 4))
    model = trunk(qk_norm=qk_norm, modulation=modulation, norm="layer", ffn="gelu_tanh", bias="qkv")
    x, vector = torch.randn(3, 7, 16), None if modulation == "none" else torch.randn(3, 1, 16)
    whole = model(Inputs(x, layout.ranks(), layout.pattern(), vector=vector))
    cache, parts = model.cache(3, 7, dtype=torch.float32, device="cpu"), []
    for k in range(layout.steps):
        a, b = layout.read(k, k + 1)
        parts.append(model(Inputs(x[:, a:b], layout.ranks(k, k + 1), "full", vector=vector), cache))
        cache.commit(b - a)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_gated_layers_have_the_values_and_gradients_of_their_formula(kind):
    """Finite differences, and PyTorch's own gradients of down(act(gate) * value); x that is a slice, too."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Gated.apply(x, kind), x)
    assert torch.autograd.gradcheck(lambda x: Gated.apply(x[:, 1:, ::2], kind), x)
    layer, given = FeedForward(dim=6, hidden=10, kind=kind, bias=True).double(), torch.randn(2, 4, 6).double()
    y = given.clone().requires_grad_()
    layer(y).square().sum().backward()
    gate, value = (F.linear(given, w, b) for w, b in zip(layer.up.weight.chunk(2), layer.up.bias.chunk(2)))
    want = layer.down((F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * value)
    torch.testing.assert_close(layer(y), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(y), want)
    z, weight = given.clone().requires_grad_(), layer.up.weight.detach().clone().requires_grad_()
    gate, value = F.linear(z, weight, layer.up.bias).chunk(2, dim=-1)
    layer.down((F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * value).square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
    torch.testing.assert_close(layer.up.weight.grad, weight.grad)


def test_dropped_paths_keep_their_rows_and_means():
    """A modulated block either adds its branches, at 1 / (1 - rate) of their size, or leaves a row alone."""
    torch.manual_seed(0)
    model, x, vector = trunk(modulation="own").blocks[0], torch.randn(64, 4, 16), torch.randn(64, 1, 16)
    options = {"vector": vector, "position": None, "mask": None, "cache": None, "layer": 0}
    model.ffn.down.weight.data.zero_()
    whole = model(x, **options) - x  # attention's branch alone
    model.drop_path.rate = 0.25
    found = model.train()(x, **options) - x
    kept = found.abs().amax((1, 2)) > 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(found[kept], whole[kept] / 0.75, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modulation", ["own", "shared"])
def test_a_condition_that_stays_is_projected_once_a_cache(modulation):
    """As often as the layers are called; a vector that is another tensor, or a new cache, is projected anew."""
    model, layout = trunk(modulation=modulation), SequenceLayout.levels((1, 2, 4, 4))
    layers = [model.final, *([model.shared] if modulation == "shared" else [b.modulation for b in model.blocks])]
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, out: calls.append(layer))
    x, first, second = torch.randn(3, 11, 16), torch.randn(3, 1, 16), torch.randn(3, 1, 16)

    def walk(vectors):
        cache, parts = model.cache(3, 11, dtype=torch.float32, device="cpu"), []
        for k, vector in enumerate(vectors):
            a, b = layout.read(k, k + 1)
            parts.append(model(Inputs(x[:, a:b], layout.ranks(k, k + 1), "full", vector=vector), cache))
            cache.commit(b - a)
        return torch.cat(parts, 1)

    with torch.no_grad():
        counters.reset()
        kept = walk([first] * 4)
        assert len(calls) == len(layers) and counters.read()["modulation.kept"] == 3
        anew = walk([first.clone() for _ in range(4)])
        assert len(calls) == 5 * len(layers) and counters.read()["modulation.kept"] == 3
        assert torch.equal(kept, anew)
        mixed = walk([first, first, second, second])
        assert len(calls) == 7 * len(layers) and counters.read()["modulation.kept"] == 5
        torch.testing.assert_close(mixed, walk([first, first.clone(), second, second.clone()]), rtol=0, atol=0)
        assert not torch.allclose(mixed[:, 3:], kept[:, 3:])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_cache_wider_than_its_heads_changes_nothing(scale, ragged):
    """Heads of 10 numbers in a cache of 16, as those of 100 are in one of 104 on CUDA."""
    model = Trunk(dim=20, depth=2, heads=2, hidden=24, attention_scale=scale, bias="qkv").eval()
    layout, x, parts = SequenceLayout.levels((1, 2, 4)), torch.randn(3, 7, 20), []
    whole = model(Inputs(x, layout.ranks(), layout.pattern()))
    options = {"dtype": torch.float32, "device": "cpu"}
    cache = model.cache(3, 7, kind=functools.partial(KVCache, width=16), **options)
    cache.ragged = ragged
    assert cache.keys.shape[-1] == 16 and model.cache(3, 7, **options).keys.shape[-1] == 10
    for k in range(layout.steps):
        a, b = layout.read(k, k + 1)
        parts.append(model(Inputs(x[:, a:b], layout.ranks(k, k + 1), "full"), cache))
        cache.commit(b - a)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert not cache.keys[..., 10:].any() and not cache.values[..., 10:].any()
    fake = FakeTensorMode()
    with fake:
        for width, wide in ((100, 104), (64, 64)):
            assert KVCache(1, 1, 1, 4, width, dtype=torch.bfloat16, device="cuda").keys.shape[-1] == wide


BLOCKS = [
    (1, 5, 14, 30, 55, 91, 155, 255, 424, 680),
    (64, 128, 192, 256),
    (200, 256),
    (3, 300),
    tuple(range(8, 300, 4)),
]


@pytest.mark.parametrize("ends", BLOCKS)
def test_spans_of_blocks_are_their_mask_in_few_calls(ends):
    """Every query is in one span, and values and gradients are those of the definition."""
    found, length = spans(ends), ends[-1]
    borders = [0, *(b for _, b, _ in found.parts)]
    assert [(a, b) for a, b, _ in found.parts] == list(itertools.pairwise(borders)) and borders[-1] == length
    assert set(borders[1:]) <= set(ends) and len(found.parts) <= 6
    q, k, v = (torch.randn(2, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for run, mask in ((attend, found), (attend_naive, ends)):
        y = run(q, k, v, mask=mask, scale=0.7)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [255, 256, 301])
def test_causal_attention_in_halves_is_causal_attention(length):
    """With a dropout of which nothing is dropped: a rate below 1/65536 is none on the CPU."""
    q, k, v = (torch.randn(2, 2, length, 4, requires_grad=True) for _ in range(3))
    results = []
    for rate in (0.0, 1e-9):
        y = attend(q, k, v, mask="causal", dropout=rate)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    dropped = torch.stack([attend(q, k, v, mask="causal", dropout=0.5) for _ in range(200)]).mean(0)
    assert (dropped - results[0][0]).abs().mean() < 0.1


@pytest.mark.parametrize("compiled", [False, True])
def test_training_has_spans_where_they_pay(compiled):
    layout, few = SequenceLayout.levels((1, 16, 64, 100, 120)), SequenceLayout.levels((1, 16, 64, 100))
    torch._dynamo.reset()
    for given, path in ((layout, "spans"), (few, "mask")):
        model, x = trunk(modulation="own").train(), torch.randn(2, given.length, 16)
        vector = torch.randn(2, 1, 16)
        if compiled:
            compile_blocks(model, backend="eager")
        counters.reset()
        out = model(Inputs(x, given.ranks(), given.pattern(), vector=vector))
        taken = counters.read()
        assert taken[f"attention.{path}"] == 1 and "block.plain" not in taken
        with torch.no_grad():
            counters.reset()
            torch.testing.assert_close(model(Inputs(x, given.ranks(), "ranks", vector=vector)), out)
            assert counters.read()["attention.mask"] == 1


@pytest.mark.parametrize("qk_norm", ["none", "l2"])
def test_a_call_a_step_equals_a_mask_in_memory(qk_norm):
    layout, x = SequenceLayout.levels((1, 16, 20)), torch.randn(3, 37, 16, dtype=torch.float64)
    model, paths = trunk(qk_norm=qk_norm).double(), {"prefixes": layout.pattern(), "mask": "ranks"}
    found = []
    with torch.no_grad():
        for path, pattern in paths.items():
            counters.reset()
            found.append(model(Inputs(x, layout.ranks(), pattern)))
            assert counters.read()[f"attention.{path}"] == 1
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    results = []
    for model.prefixes, path in ((False, "mask"), (True, "prefixes")):  # training is faster with the mask, on the CPU
        counters.reset()
        out = model(Inputs(x, layout.ranks(), layout.pattern()))
        assert counters.read()[f"attention.{path}"] == 1
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_call_a_block_drops_weights_in_every_block():
    """Values of one and equal weights: n keys at rate p give a binomial share, of mean 1, variance p / (n (1 - p))."""
    ends, rate = (2, 5, 9), 0.25
    zeros, ones = torch.zeros(500, 8, 9, 4), torch.ones(500, 8, 9, 4)
    got = attend(zeros, zeros, ones, mask=ends, dropout=rate)
    for start, end in zip((0, *ends), ends):
        found, spread = got[:, :, start:end, 0], rate / (end * (1 - rate))
        assert abs(float(found.mean()) - 1) < 5 * (spread / found.numel()) ** 0.5  # five standard errors
        assert abs(float(found.var()) / spread - 1) < 0.1
    assert torch.equal(attend(zeros, zeros, ones, mask=ends), ones)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_with_dropout_training_on_cuda_has_a_call_a_block(training, monkeypatch):
    """Every call with the rate and without a mask; blocks of few positions have one call under a mask in memory."""
    kernel, calls = F.scaled_dot_product_attention, []

    def spy(q, k, v, mask=None, dropout=0.0, **options):
        calls.append((q.shape[2], k.shape[2], mask is None, dropout))
        return kernel(q, k, v, mask, dropout, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    rate = 0.1 if training else 0.0
    for sizes, path in (((1, 16, 20), "prefixes"), ((1, 2, 4), "mask")):
        layout = SequenceLayout.levels(sizes)
        length = layout.length
        model = Trunk(dim=16, depth=2, heads=2, hidden=32, attention_dropout=0.1).train(training)
        batch = {"x": torch.empty(3, length, 16), "rank": layout.ranks()}
        calls.clear()
        counters.reset()
        with fake_cuda(model, batch) as batch, nullcontext() if training else torch.no_grad():
            model(Inputs(batch["x"], batch["rank"], layout.pattern()))
        assert counters.read()[f"attention.{path}"] == 1
        each = [(n, end, True, rate) for n, end in zip(sizes, layout.pattern())]
        assert calls == (2 * each if path == "prefixes" else 2 * [(length, length, False, rate)])


def test_a_call_a_block_is_for_blocks_of_many_positions():
    assert pays(SequenceLayout.scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).pattern())
    assert not pays((256, *range(257, 289))), "32 queries in turn behind a grid"
    assert not pays(SequenceLayout.levels((1, 2, 4)).pattern())


def test_several_causal_positions_against_a_cache():
    layout = SequenceLayout.line(6)
    model, x = trunk(), torch.randn(2, 6, 16)
    whole = model(Inputs(x, layout.ranks(), "causal"))
    cache = model.cache(2, 6, dtype=torch.float32, device="cpu")
    model(Inputs(x[:, :2], layout.ranks(0, 2), "causal"), cache)
    cache.commit(2)
    torch.testing.assert_close(model(Inputs(x[:, 2:], layout.ranks(2, 6), "causal"), cache), whole[:, 2:])


def test_uncommitted_positions_are_overwritten():
    model, x = trunk(), torch.randn(2, 3, 16)
    ranks = SequenceLayout.line(3).ranks()
    cache = model.cache(2, 3, dtype=torch.float32, device="cpu")
    model(Inputs(x[:, :1], ranks[:1], "full"), cache)
    cache.commit(1)
    first = model(Inputs(x[:, 1:2], ranks[1:2], "full"), cache)
    model(Inputs(x[:, 2:], ranks[1:2], "full"), cache)
    assert torch.equal(model(Inputs(x[:, 1:2], ranks[1:2], "full"), cache), first)


def test_ragged_rows_equal_each_row_alone():
    model = trunk()
    x = torch.randn(2, 5, 16)
    lengths = torch.tensor([1, 3])
    ranks = SequenceLayout.line(5).ranks()
    cache = model.cache(2, 6, dtype=torch.float32, device="cpu")
    model(Inputs(x[:, :3], ranks[:3], "causal"), cache)
    cache.commit(lengths)
    window = lengths[:, None] + torch.arange(2)
    inputs = Inputs(x, ranks, "causal").window(window)
    got = model(inputs, cache)
    for row, length in enumerate(lengths.tolist()):
        alone = model(Inputs(x[row : row + 1, : length + 2], ranks[: length + 2], "causal"))
        torch.testing.assert_close(got[row : row + 1], alone[:, length:], rtol=1e-5, atol=1e-5)


def test_cache_rows_can_be_taken_in_place():
    cache = KVCache(1, 3, 1, 4, 2, dtype=torch.float32, device="cpu")
    cache.extend(0, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 2), torch.zeros(3, 1, 1, 2))
    cache.commit(1)
    address = cache.keys.data_ptr()
    cache.take(torch.tensor([2, 2, 0]))
    assert cache.keys[0, :, 0, 0, 0].tolist() == [2, 2, 0] and cache.keys.data_ptr() == address
    with pytest.raises(ValueError, match="holds 4 positions"):
        cache.extend(0, torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2))


def test_checkpointing_changes_no_gradient():
    layout, x = SequenceLayout.levels((1, 3)), torch.randn(2, 4, 16)
    plain = Trunk(dim=16, depth=2, heads=2, hidden=32)
    recomputed = Trunk(dim=16, depth=2, heads=2, hidden=32, checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    for model in (plain, recomputed):
        model(Inputs(x, layout.ranks(), layout.pattern())).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_training_attention_in_bfloat16_on_the_cpu_runs_in_float32():
    """Output and gradients are those of float32 on the same rounded values, rounded once at the end."""
    q, k, v = (torch.randn(2, 2, 9, 8).bfloat16().requires_grad_() for _ in range(3))
    wanted = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, v, mask="causal")
    exact = attend_naive(*wanted, mask="causal")
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=8e-3, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), wanted)):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("light", [False, True], ids=["float32", "autocast"])
def test_queries_keys_and_values_have_one_dtype(light, monkeypatch):
    """Norms of q and k leave float32 under autocast. In every family, a loss or an image coded and decoded."""
    seen = []

    def door(q, k, v, **options):
        seen.append({x.dtype for x in (q, k, v)})
        return attend(q, k, v, **options)

    for module in ("attention", "dit", "qformer"):
        monkeypatch.setattr(f"vtok.layers.{module}.attend", door)
    normed = set()
    for make, name in [(generators.make, n) for n in FAMILIES] + [(tokenizers.make, n) for n in tokenizers.FAMILIES]:
        model = make(name)
        if not any(getattr(part, "qk_norm", "none") != "none" or hasattr(part, "q_norm") for part in model.modules()):
            continue
        normed.add(f"{make.__module__}.{name}")
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=light):
            if make is tokenizers.make:
                model.decode(model.encode(tokenizers.images(2)))
            else:
                batch = {"tokens": tokens_of(model, 2), "label": torch.tensor([0, 1]), "key": torch.arange(2)}
                model.loss(batch | also_read(model, 2), progress=0.5)
        assert all(len(dtypes) == 1 for dtypes in seen), (name, seen)
        assert ({torch.bfloat16} in seen) == light and ({torch.float32} in seen or light), (name, seen)
    assert normed >= {f"generators.{name}" for name in ("var", "flexvar", "rar", "gigatok_adaln")}
    assert normed >= {f"tokenizers.{name}" for name in ("restok", "dar", "flextok")}
