"""What masked generators share: how many tokens each step decides, and which ones training hides.

A step of S leaves m tokens open: m_s = max(1, min(m_(s-1) - 1, floor(N curve(s / S)))), with the cosine of MaskGIT
(Chang et al., arXiv 2202.04200) and MAR (arXiv 2406.11838) or the arccosine of TiTok's MaskGIT (arXiv 2406.07550).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise

Curve = Literal["cosine", "arccos"]
ORDER_STREAM, RATIO_STREAM = 7501, 7502  # noise streams: the order of a sample's tokens, the share that is hidden


def set_sizes(tokens: int, steps: int, curve: Curve) -> tuple[int, ...]:
    """How many tokens each of `steps` steps decides; raises ValueError where there are not 1 <= steps <= tokens."""
    if not 1 <= steps <= tokens:
        raise ValueError(f"steps={steps}: {tokens} tokens are decided in 1 .. {tokens} steps")
    if curve not in ("cosine", "arccos"):
        raise ValueError(f"curve={curve!r}: choose cosine or arccos")
    sizes, left = [], tokens
    for step in range(1, steps):
        share = math.cos(math.pi / 2 * step / steps) if curve == "cosine" else math.acos(step / steps) * 2 / math.pi
        after = max(1, min(left - 1, math.floor(tokens * share)))
        sizes.append(left - after)
        left = after
    return (*sizes, left)


def masked_layout(layout: SequenceLayout, steps: int, curve: Curve) -> SequenceLayout:
    """The cells of `layout` in sets of growing size. Which cell is in which set is decided a sample."""
    return SequenceLayout(set_sizes(layout.length, steps, curve), layout.coords)


def random_order(noise: SampleNoise, length: int) -> Tensor:
    """A permutation of 0 .. length - 1 for every sample, int64 [B, length], from its own noise."""
    position = torch.arange(length, device=noise.seeds.device)
    return noise.uniform(position, ORDER_STREAM).argsort(dim=1, stable=True)


def ratio_uniform(noise: SampleNoise) -> Tensor:
    """One uniform number a sample, float32 [B], for the share of its tokens that training hides."""
    return noise.uniform(torch.zeros(1, dtype=torch.int64, device=noise.seeds.device), RATIO_STREAM)[:, 0]
