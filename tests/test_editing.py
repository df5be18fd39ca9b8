"""Token constraints: what is given stays, the rest is what free sampling would have drawn, for every family."""

from dataclasses import replace

import pytest
import torch
from generators import CLASSES, FAMILIES, MASKED, OWN_INPUT, flexvar, make, tokens_of
from test_generators import assert_same, draw

from vgen.editing import composite, constrain, has_places, kept_cells, prefix, region, swap_parts
from vgen.flow_draw import pinned
from vgen.heads import DrawRule
from vgen.latents import scale_map
from vgen.masking import random_order
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

JOINT = ("xar_image", "flowar", "flowar_cross", "ecar")  # the tokens of a step flow together
LABELS = torch.tensor([0, 3, CLASSES])
every_family = pytest.mark.parametrize("name", FAMILIES)
every_placed = pytest.mark.parametrize("name", [name for name in FAMILIES if has_places(make(name).spec.layout)])


def right_half(side: int = 24) -> torch.Tensor:
    """The pixels of the left half and of a strip at the bottom are kept."""
    keep = torch.zeros(side, side, dtype=torch.bool)
    keep[:, : side // 2], keep[-side // 4 :] = True, True
    return keep


def completed(model, canvas, seeds, labels=LABELS):
    before = canvas.tokens.clone()
    return before, draw(model, labels, seeds, canvas=canvas)


@every_placed
def test_kept_tokens_come_out_unchanged_and_the_others_are_drawn(name):
    model, seeds = make(name), sample_seeds(0, 0, 3)
    tokens = tokens_of(model, 3)
    canvas = region(model, tokens, SampleNoise(seeds), right_half(), keep_scales=1)
    known = canvas.known.clone()
    assert bool(known.any()) and not bool(known.all())
    before, after = completed(model, canvas, seeds)
    assert torch.equal(after.tokens[known], before[known])
    kept = kept_cells(model.spec.layout, right_half(), 1)
    if model.restore(after).shape == tokens.shape:
        last = model.spec.layout.sides[-1]
        fine = torch.tensor([model.spec.layout.sides[s] == last for s, _, _ in model.spec.layout.coords]) & kept
        assert torch.equal(model.restore(after)[:, fine], tokens[:, fine])
    unknown = ~known
    assert bool((after.tokens[unknown] != before[unknown]).any())


@every_family
def test_everything_kept_returns_the_tokens(name):
    model, seeds = make(name), sample_seeds(0, 0, 3)
    tokens = tokens_of(model, 3)
    canvas = constrain(
        model, tokens, SampleNoise(seeds), lambda canvas: torch.ones(canvas.layout.length, dtype=torch.bool)
    )
    assert torch.equal(model.restore(completed(model, canvas, seeds)[1]), tokens)


@every_family
def test_nothing_kept_is_free_sampling(name):
    model, seeds = make(name), sample_seeds(0, 0, 3)
    canvas = prefix(model, tokens_of(model, 3), SampleNoise(seeds), 0)
    assert canvas.known is None
    assert torch.equal(draw(model, LABELS, seeds, canvas=canvas).tokens, draw(model, LABELS, seeds).tokens)
    if has_places(model.spec.layout):
        nothing = torch.zeros(24, 24, dtype=torch.bool)
        assert region(model, tokens_of(model, 3), SampleNoise(seeds), nothing, keep_scales=0).known is None


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MASKED])
def test_any_part_of_an_own_sample_brings_back_the_sample(name):
    """The noise belongs to a token's place: with the same context, the missing tokens are drawn as they were. (xAR,
    FlowAR, E-CAR: whole steps, since given tokens change how the rest of their step flows. MAR and MaskGIT see given
    tokens from the first step on.)"""
    model, seeds = make(name), sample_seeds(0, 0, 3)
    sample = draw(model, LABELS, seeds)
    drawer = torch.Generator().manual_seed(4)
    if name in OWN_INPUT or name in JOINT:
        known = torch.rand(3, model.layout.steps, generator=drawer)[:, model.layout.steps_of_tokens()] < 0.5
    else:
        known = torch.rand(3, model.layout.length, generator=drawer) < 0.5
    shown = known if sample.tokens.dim() == 2 else known.unsqueeze(-1)
    canvas = replace(sample, tokens=torch.where(shown, sample.tokens, torch.zeros_like(sample.tokens)), known=known)
    assert_same(draw(model, LABELS, seeds, canvas=canvas).tokens, sample.tokens)


@every_family
def test_an_edit_does_not_depend_on_its_batch(name):
    model, seeds = make(name), sample_seeds(0, 0, 3)
    tokens, count = tokens_of(model, 3), 3
    together = draw(model, LABELS, seeds, canvas=prefix(model, tokens, SampleNoise(seeds), count))
    alone = prefix(model, tokens[1:2], SampleNoise(seeds[1:2]), count)
    alone = draw(model, LABELS[1:2], seeds[1:2], canvas=alone)
    assert_same(model.restore(alone), model.restore(together)[1:2])


@every_family
def test_a_prefix_is_kept_and_its_length_checked(name):
    model, seeds = make(name), sample_seeds(0, 0, 2)
    tokens = tokens_of(model, 2)
    canvas = prefix(model, tokens, SampleNoise(seeds), 5)
    levels = max(1, model.layout.length // model.spec.layout.length)
    assert canvas.known.sum(1).tolist() == [5 * levels] * 2
    known = canvas.known.clone()
    before, after = completed(model, canvas, seeds, LABELS[:2])
    assert torch.equal(after.tokens[known], before[known])
    with pytest.raises(ValueError, match="keep=1000"):
        prefix(model, tokens, SampleNoise(seeds), 1000)


def test_masks_of_scales_are_kept_by_area():
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:, :5] = True  # 5/8 of the picture
    layout = SequenceLayout.scales((1, 2, 4))
    rows4 = [True, True, False, False]  # of the third column half is kept, which is not more than half
    want = [True] + [True, False] * 2 + rows4 * 4
    assert kept_cells(layout, keep).tolist() == want
    keep[:, 2:5] = False
    assert kept_cells(layout, keep).tolist() == [False] + [False] * 4 + [True, False, False, False] * 4
    assert kept_cells(layout, keep, 1).tolist()[:5] == [True] + [False] * 4
    assert kept_cells(layout, keep, 2).tolist()[:6] == [True] * 6
    assert kept_cells(layout, keep, 9).tolist()[5:] == [True, False, False, False] * 4  # never all of the last scale


def test_queries_beside_a_grid_stand_for_the_whole_picture():
    coords = tuple((0, 0, i) for i in range(3)) + tuple((1, r, c) for r in range(2) for c in range(2))
    layout = SequenceLayout((1,) * 7, coords)
    keep = torch.tensor([[True, False], [False, False]])
    assert kept_cells(layout, keep).tolist() == [False] * 3 + [True, False, False, False]
    assert kept_cells(layout, keep, 1).tolist() == [True] * 3 + [True, False, False, False]


def test_given_tokens_come_first_in_an_order_of_the_sample():
    model, seeds = make("mar"), sample_seeds(3, 0, 2)
    canvas = region(model, tokens_of(model, 2), SampleNoise(seeds), right_half())
    count = int(canvas.known[0].sum())
    assert bool(canvas.known[:, :count].all()) and not bool(canvas.known[:, count:].any())
    free = random_order(SampleNoise(seeds), 16)
    kept = kept_cells(model.spec.layout, right_half())
    for row in range(2):  # both halves keep the sample's own order
        want = [c for c in free[row].tolist() if kept[c]] + [c for c in free[row].tolist() if not kept[c]]
        assert canvas.order[row].tolist() == want


@pytest.mark.parametrize("name", JOINT)
def test_given_tokens_of_a_step_bend_the_flow_of_the_rest_of_it(name):
    """Kept is half of the last step alone: what is drawn before it is the free sample, and the rest of it depends on
    which image is kept."""
    model, seeds = make(name), sample_seeds(0, 0, 2)
    a, b = model.layout.written(model.layout.steps - 1, model.layout.steps)
    known = (torch.arange(model.layout.length) >= a) & (torch.arange(model.layout.length) < (a + b) // 2)
    free, results = draw(model, LABELS[:2], seeds).tokens, []
    for seed in (1, 2):
        canvas = constrain(model, tokens_of(model, 2, seed=seed), SampleNoise(seeds), lambda canvas: known)
        before, after = completed(model, canvas, seeds, LABELS[:2])
        assert torch.equal(after.tokens[:, known], before[:, known])
        torch.testing.assert_close(after.tokens[:, :a], free[:, :a], rtol=1e-4, atol=1e-4)
        results.append(after.tokens[:, (a + b) // 2 :])
    assert not torch.allclose(*results, atol=1e-3)


@pytest.mark.parametrize("heat", [1.0, 0.5])
def test_kept_tokens_of_ecar_lie_on_the_path_of_the_draw(heat):
    """Closed form: from where `path` starts stage k, at time high, the straight way to the data ends, at time low, at
    (1 - low) data + low e with the noise e = (start - (1 - high) coarse) / high."""
    model, seeds = make("ecar"), SampleNoise(sample_seeds(0, 0, 2))
    tokens, rule = tokens_of(model, 2), DrawRule(temperature=heat)
    data, held = model.arrange(tokens).tokens, model.hold(tokens, seeds, heat)
    layout = model.layout
    for k, (high, low) in enumerate(zip(model.starts, model.ends)):
        a, b = layout.written(k, k + 1)
        start, span = model.path(held, k, seeds, torch.arange(a, b), rule)
        assert span == (low, high)
        coarse = 0.0
        if k:  # nearest enlargement by hand
            coarse = scale_map(data, layout, k - 1).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        error = (start - (1 - high) * coarse) / high
        torch.testing.assert_close(held.tokens[:, a:b], (1 - low) * data[:, a:b] + low * error, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dtm", "artm", "fhtm"])
def test_kept_tokens_of_the_first_level_are_the_noise_of_the_draw(name):
    model, seeds, rule = make(name), sample_seeds(0, 0, 3), DrawRule(temperature=0.5)
    held = model.hold(tokens_of(model, 3), SampleNoise(seeds), 0.5)
    a, b = model.layout.written(0, 1)
    assert torch.equal(held.tokens[:, a:b], draw(model, LABELS, seeds, rule=rule, stop=1).tokens[:, a:b])


def test_a_pinned_velocity_sees_the_straight_path():
    """At time t a known token is (1 - t) token + t start, an unknown one what the solver has; with none known, nothing
    is changed."""
    x, tokens, start = torch.randn(3, 2, 4, 5).unbind()
    known = torch.tensor([[True, False, True, False], [False] * 4])
    found = pinned(lambda x, t: x, known, tokens, start)(x, 0.25)
    wanted = torch.where(known[..., None], torch.lerp(tokens, start, 0.25), x)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[1], x[1]) and pinned(torch.lerp, None, tokens, start) is torch.lerp


def test_free_lists_of_scales_are_edited_too():
    torch.manual_seed(0)
    model = flexvar(sides=[1, 3]).eval()
    tokens = tokens_of(make("flexvar"), 2)
    canvas = region(model, tokens, SampleNoise(sample_seeds(0, 0, 2)), right_half())
    assert canvas.tokens.shape == (2, 10) and canvas.known[0].tolist()[:4] == [True, True, False, False]
    after = draw(model, LABELS[:2], sample_seeds(0, 0, 2), canvas=canvas)
    assert torch.equal(model.restore(after)[:, 5], tokens[:, 5])


@pytest.mark.parametrize("name", ["gigatok", "har", "detailflow", "dar"])
def test_tokens_on_a_line_say_what_they_can_do(name):
    model = make(name)
    with pytest.raises(ValueError, match="task=prefix"):
        region(model, tokens_of(model, 1), SampleNoise(sample_seeds(0, 0, 1)), right_half())


def test_style_takes_the_first_part_of_the_other_image():
    layout = make("hita").spec.layout
    spec = TokenSpec(layout, (Part(4, 24, 6), Part(9, 24, 6)), 24)
    content, style = torch.arange(13)[None], torch.arange(100, 113)[None]
    assert swap_parts(spec, content, style).tolist() == [[100, 101, 102, 103, *range(4, 13)]]
    with pytest.raises(ValueError, match="two parts"):
        swap_parts(make("var").spec, content, style)


def test_composites_have_the_kept_pixels_of_the_original():
    edited, original = torch.zeros(2, 2, 2, 3, dtype=torch.uint8), torch.full((2, 2, 3), 9, dtype=torch.uint8)
    keep = torch.tensor([[True, False], [False, True]])
    assert composite(edited, original, keep)[1, :, :, 0].tolist() == [[9, 0], [0, 9]]
