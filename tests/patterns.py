"""How positions see each other, watched in every pass of a transformer."""

from __future__ import annotations

import torch

from vtok.layers.trunk import Trunk
from vtok.layout import Pattern, visible


def seen_by(pattern: Pattern, length: int) -> torch.Tensor:
    """Which of `length` positions sees which, bool [query, key], by a pattern that is not "ranks"."""
    if pattern == "full":
        return torch.ones(length, length, dtype=torch.bool)
    if pattern == "causal":
        return torch.ones(length, length, dtype=torch.bool).tril()
    found = torch.zeros(length, length, dtype=torch.bool)
    for start, end in zip((0, *pattern), pattern):
        found[start:end, :end] = True
    assert pattern[-1] == length
    return found


def watched_patterns(monkeypatch) -> list[Pattern]:
    """The patterns of all passes from now on, each compared with the ranks beside it; "ranks" itself fails
    where all rows have the same."""
    found, make = [], Trunk.mask

    def mask(self, inputs, cache):
        if inputs.mask is None:
            length = inputs.x.shape[1]
            assert inputs.pattern != "ranks" or inputs.rank.dim() == 2, "rows of other ranks alone have no pattern"
            if inputs.pattern != "ranks":
                assert torch.equal(visible(inputs.rank, inputs.rank), seen_by(inputs.pattern, length))
        found.append(inputs.pattern)
        return make(self, inputs, cache)

    monkeypatch.setattr(Trunk, "mask", mask)
    return found
