"""Rotary position embedding (Su et al., arXiv 2104.09864), one- and two-dimensional.

Adjacent channels (2i, 2i + 1) form a pair, as in every published model of this field. In two dimensions the first half
of a head's channels turns with the row, the second half with the column (LlamaGen, arXiv 2406.06525).
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """float32 [.., dim / 2]: position * theta^(-2i / dim)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)[: dim // 2] / dim)
    return positions.float().unsqueeze(-1) * frequencies


def rope_1d(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [.., dim / 2], of positions [..]."""
    turn = angles(positions, dim, theta)
    return turn.cos(), turn.sin()


def rope_2d(rows: Tensor, columns: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [.., dim / 2], of cells (row, column); dim must be a multiple of 4."""
    if dim % 4:
        raise ValueError(f"two-dimensional rope needs a head width that is a multiple of 4, got {dim}")
    turn = torch.cat([angles(rows, dim // 2, theta), angles(columns, dim // 2, theta)], dim=-1)
    return turn.cos(), turn.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [R, N, l, E] by tables [l, E/2] or [R, l, E/2]; computed in float32, returned in x's dtype."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
