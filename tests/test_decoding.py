"""Fast paths of decoding against the plain ones: the unordered top-k race, one rotation of queries and keys, bf16."""

import copy

import pytest
import torch
from generators import make, tokens_of
from tape import Tape
from test_generators import LABELS, assert_same, draw

from vgen.conditioning import Cond
from vgen.guidance import ClassifierFree, Progress, guidance
from vgen.heads import DrawRule, draw_ids, survivors
from vgen.samplers.graphs import GraphSampler
from vtok import counters
from vtok.layers.attention import Attention, attend_naive
from vtok.layers.rope import rope_1d, rotate
from vtok.noise import SampleNoise, sample_seeds


@pytest.mark.parametrize("top_k", [1, 2, 7, 63, 64, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_race_among_unordered_survivors_has_the_same_winner(top_k, temperature):
    torch.manual_seed(0)
    logits, noise, position = torch.randn(5, 6, 64), SampleNoise(sample_seeds(0, 0, 5)), torch.arange(6)
    got = draw_ids(logits, DrawRule(top_k=top_k, temperature=temperature), noise, position, Progress(0, 1))
    kept, ids = survivors(logits / temperature, top_k, 1.0)
    winner = (kept + noise.gumbel(position, ids)).argmax(-1, keepdim=True)
    assert torch.equal(got, ids.gather(-1, winner).squeeze(-1))


@pytest.mark.parametrize("rows", [None, 2], ids=["shared tables", "a table a row"])
def test_queries_and_keys_turned_together_are_what_they_are_turned_apart(rows):
    torch.manual_seed(0)
    layer, x = Attention(dim=16, heads=2), torch.randn(2, 5, 16)
    cos, sin = rope_1d(torch.arange(5.0) if rows is None else torch.rand(rows, 5) * 9, 8)
    q, k, v = layer.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    want = attend_naive(rotate(q, cos, sin), rotate(k, cos, sin), v)
    want = layer.out(want.transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(layer(x, position=(cos, sin, None)), want)


@pytest.mark.parametrize("name", ["llamagen", "var", "rar", "flexvar"])
@pytest.mark.parametrize("rule", [DrawRule(temperature=0), DrawRule(top_k=9)], ids=["greedy", "sampled"])
def test_cached_tokens_are_those_of_whole_prefixes(name, rule):
    model, seeds = make(name), sample_seeds(3, 0, 3)
    fast = draw(model, LABELS, seeds, guidance(3.0), rule)
    assert torch.equal(fast.tokens, draw(model, LABELS, seeds, guidance(3.0), rule, cached=False).tokens)


def test_var_adds_one_map_a_step_to_a_sum_with_the_bits_of_all_maps_added_anew(monkeypatch):
    model, added = make("var"), []
    canvas, steps = model.arrange(tokens_of(model, 3)), model.layout.steps
    codes, contribution = model.quantizer.lookup(canvas.tokens), model.quantizer._contribution
    want = [model.quantizer.maps(codes, k, k + 1) for k in range(1, steps)]
    monkeypatch.setattr(model.quantizer, "_contribution", lambda *given: added.append(given[1]) or contribution(*given))
    cache = model.cache(3)
    cache.commit(model.layout.reads[0])
    for k in range(1, steps):
        if k == 2:  # a step that is run again before it is committed reads the tokens anew
            other = model.arrange((canvas.tokens + 1) % 24)
            assert not torch.equal(model.next_map(other, k, cache), want[k - 1])
        assert torch.equal(model.next_map(canvas, k, cache), want[k - 1])
        cache.commit(model.layout.reads[k])
    assert added == [0, 1, 1, 2]
    cache.truncate(model.layout.read(0, 2)[1])
    assert torch.equal(model.next_map(canvas, 2, cache), want[1])
    cache.take(torch.tensor([2, 0, 1]))
    turned = model.arrange(canvas.tokens[[2, 0, 1]])
    torch.testing.assert_close(model.next_map(turned, 3, cache), want[2][[2, 0, 1]])
    added.clear()
    draw(model, LABELS, sample_seeds(3, 0, 3), guidance(3.0), DrawRule(top_k=9))
    assert added == list(range(steps - 1)), "each map once an image"


@pytest.mark.parametrize(
    "name", ["llamagen", "var", "rar", "hita", "flexvar", "maskgit", "mar", "xar_cell", "flowar", "llamagen_factorised"]
)
@pytest.mark.parametrize(
    ("graphs", "greedy"), [(False, False), (False, True), (True, False)], ids=["plain", "greedy", "recorded"]
)
def test_null_rows_end_with_the_last_guided_step_and_the_images_stay(name, graphs, greedy, monkeypatch):
    model, seeds, rows = make(name), sample_seeds(3, 0, 3), []
    guide, rule = guidance(3.0, "interval", high=0.5), DrawRule(top_k=9) if model.spec.discrete else DrawRule()
    if greedy:
        rule = DrawRule(temperature=0)
    if graphs and name == "maskgit":
        pytest.skip("MaskGIT has no steps to record")
    steps, ramp = model.layout.steps, max(model.layout.steps - 1, 1)
    guided = sum(k / ramp <= 0.5 for k in range(steps))

    def run():
        counters.reset()
        sampler = GraphSampler(model, capture=Tape) if graphs else model.sampler
        streams = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
        return sampler(model, streams, noise=SampleNoise(seeds), guide=guide, rule=rule).tokens, counters.read()

    model.register_forward_pre_hook(lambda _, given: rows.append(len(given[1].start)))
    got, counts = run()
    times = 2 if graphs else 1  # once to warm up, once recorded
    assert (counts["rows.guided"], counts["rows.single"]) == (times * guided, times * (steps - guided))
    once = rows[: len(rows) // times]
    assert once == sorted(once, reverse=True) and set(once) == {6, 3}
    with monkeypatch.context() as patch:
        patch.setattr("vgen.samplers.ancestral.guided_steps", lambda guide, layout: [True] * layout.steps)
        want, counts = run()
    assert "rows.single" not in counts
    assert torch.equal(got, want) if model.spec.discrete else torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["maskgit", "maskgit_uvit", "mar", "dtm", "var"])
def test_without_a_cache_null_rows_run_in_guided_steps_alone(name):
    model, seeds, rows = make(name), sample_seeds(3, 0, 3), []
    guide, steps = guidance(3.0, "interval", low=0.3, high=0.8), model.layout.steps
    options = {"cached": False} if model.caches else {}
    streams = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
    model.register_forward_pre_hook(lambda _, given: rows.append(len(given[1].start)))
    got = model.sampler(model, streams, noise=SampleNoise(seeds), guide=guide, **options).tokens
    want = [6 if 0.3 <= k / (steps - 1) <= 0.8 else 3 for k in range(steps)]
    assert rows == (want[1:] if name == "dtm" else want) and len(set(want)) == 2  # DTM's first level is noise
    blind = ClassifierFree(lambda progress: guide.schedule(progress))  # asked in its step, with null rows in all
    whole = model.sampler(model, streams, noise=SampleNoise(seeds), guide=blind, **options).tokens
    assert set(rows[len(rows) // 2 :]) == {6}
    assert_same(got, whole)


@pytest.mark.parametrize("name", ["llamagen", "var", "rar", "hita"])
def test_bf16_trunk_is_within_its_rounding(name):
    """Eight bits of mantissa through two blocks: a few percent of the largest logit, on every position."""
    model = make(name)
    light = copy.deepcopy(model)
    light.trunk.to(torch.bfloat16)
    canvas, cond = model.arrange(tokens_of(model, 3)), model.conditioner(LABELS)
    want = model.head.logits(model(canvas, cond))[0].detach()
    got = light.head.logits(light(canvas, cond))[0].detach()
    assert got.dtype == torch.float32
    assert float((got - want).abs().max() / want.abs().max()) < 0.05
