"""Layouts: masks against brute force, spans, and the plain-data form."""

import pytest
import torch
from patterns import seen_by

from vtok.layout import SequenceLayout, behind, visible

LAYOUTS = {
    "line": SequenceLayout.line(7),
    "raster": SequenceLayout.raster(3, 4),
    "rows": SequenceLayout.tiles(4, 4, 1, 4),
    "cells": SequenceLayout.tiles(4, 6, 2, 3),
    "scales": SequenceLayout.scales((1, 2, 3, 4)),
    "levels": SequenceLayout.levels((1, 1, 2, 4)),
    "two_in_one_out": SequenceLayout(
        (1,) * 5, tuple((0, 0, i) for i in range(5)), (2, 1, 1, 1, 1), (True,) + (False,) * 4
    ),
    "causal_first": SequenceLayout((4, 4), tuple((0, 0, i) for i in range(8)), causal=(True, False)),
}


def brute_force(layout: SequenceLayout) -> torch.Tensor:
    """Every pair of read positions, by the words of the rule: earlier steps are seen, later ones are not, and inside a
    step all are seen, or only earlier ones where the step is causal."""
    places = [(step, i) for step, count in enumerate(layout.reads) for i in range(count)]
    seen = torch.zeros(len(places), len(places), dtype=torch.bool)
    for a, (step_q, inside_q) in enumerate(places):
        for b, (step_k, inside_k) in enumerate(places):
            causal = bool(layout.causal) and layout.causal[step_q]
            seen[a, b] = step_k < step_q or (step_k == step_q and (inside_k <= inside_q or not causal))
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_equal_brute_force(name):
    layout = LAYOUTS[name]
    ranks = layout.ranks()
    assert torch.equal(visible(ranks, ranks), brute_force(layout))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pattern_says_what_the_ranks_say(name):
    layout = LAYOUTS[name]
    for start in range(layout.steps):
        for stop in range(start + 1, layout.steps + 1):
            a, b = layout.read(start, stop)
            block = brute_force(layout)[a:b, a:b]
            if block.all() or torch.equal(block, torch.ones_like(block).tril()):
                assert layout.pattern(start, stop) == ("full" if block.all() else "causal")
                continue
            ends = layout.pattern(start, stop)
            assert ends[-1] == b - a and list(ends) == sorted(set(ends))
            for first, last in zip((0, *ends), ends):  # a block's queries see the keys up to its end, and no others
                assert block[first:last, :last].all() and not block[first:last, last:].any()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_behind_others_see_all_of_them(name, count):
    layout = LAYOUTS[name]
    block = brute_force(layout)
    want = torch.zeros(len(block) + count, len(block) + count, dtype=torch.bool)
    want[:, :count] = True
    want[count:, count:] = block
    ends = behind(layout.pattern(), len(block), count)
    assert torch.equal(seen_by(ends, len(want)), want)
    assert behind("ranks", len(block), count) == "ranks"


@pytest.mark.parametrize("name", LAYOUTS)
def test_plain_data_round_trip(name):
    layout = LAYOUTS[name]
    data = layout.to_config()
    assert SequenceLayout.from_config(data) == layout
    if name in ("line", "raster", "scales", "levels"):
        assert list(data) == [name]


def test_spans_and_steps():
    layout = SequenceLayout.scales((1, 2, 3))
    assert layout.length == 14 and layout.written(1, 3) == (1, 14) and layout.sides == ((1, 1), (2, 2), (3, 3))
    assert layout.steps_of_tokens().tolist() == [0] + [1] * 4 + [2] * 9
    assert layout.coords[5] == (2, 0, 0) and layout.coords[13] == (2, 2, 2)


def test_published_token_counts():
    assert SequenceLayout.scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).length == 680
    assert SequenceLayout.scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).length == 2240
    assert SequenceLayout.scales((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)).length == 9451


def test_tiles_cover_the_grid_once():
    layout = SequenceLayout.tiles(4, 6, 2, 3)
    assert sorted(layout.coords) == sorted(SequenceLayout.raster(4, 6).coords)
    assert layout.coords[:6] == ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SequenceLayout((), ()), "at least one step"),
        (lambda: SequenceLayout((2,), ((0, 0, 0),)), "add up to 2"),
        (lambda: SequenceLayout((1,), ((0, 0, 0),), feeds=(1, 1)), "feeds has 2"),
        (lambda: SequenceLayout.tiles(4, 4, 3, 1), "does not divide"),
        (lambda: SequenceLayout.tiles(4, 4, 0, 1), "tiles of 0 x 1"),
        (lambda: SequenceLayout.from_config({"spiral": [3]}), "a layout is one of"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
