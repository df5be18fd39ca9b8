"""Ids as mixed-radix numbers of sub-codes: id = sum_f part_f * product(factors[:f]), the first factor fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(ids: Tensor, factors: Sequence[int]) -> Tensor:
    """Sub-codes int64 [.., F] of ids [..], the f-th below factors[f]."""
    parts = []
    for factor in factors:
        parts.append(ids % factor)
        ids = ids // factor
    return torch.stack(parts, -1)


def join(parts: Tensor, factors: Sequence[int]) -> Tensor:
    """Ids int64 [..] of sub-codes [.., F]: the inverse of `split`."""
    ids = parts[..., -1]
    for f in reversed(range(len(factors) - 1)):
        ids = ids * factors[f] + parts[..., f]
    return ids
