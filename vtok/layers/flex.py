"""FlexTok's transformer and its fixed positions (Bachmann et al., arXiv 2502.13967; code apple/ml-flextok)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtok.layers.dit import SplitModulation
from vtok.layers.trunk import Trunk


def flex_trunk(dim: int, depth: int, head: int, *, modulated: bool) -> Trunk:
    """FlexTok's transformer: bare layer norms, also of q and k, attention scale 8 / head, SwiGLU of 8/3 the width, no
    biases; with modulation, one for patches and one for registers, and without a last norm.
    """
    if dim % head:
        raise ValueError(f"width {dim} is not a multiple of head={head}")
    trunk = Trunk(
        dim=dim,
        depth=depth,
        heads=dim // head,
        hidden=int(2 * (4 * dim) / 3),
        norm="layer_plain",
        eps=1e-5,
        ffn="swiglu",
        bias="none",
        qk_norm="layer_plain",
        attention_scale=8 / head,
        modulation="own" if modulated else "none",
        final_norm=not modulated,
    )
    for block in trunk.blocks:
        for linear in (block.attention.out, block.ffn.down):
            nn.init.xavier_uniform_(linear.weight)
        for linear, parts in ((block.attention.qkv, 3), (block.ffn.up, 2)):  # fused: every part as if it were alone
            for part in linear.weight.data.chunk(parts):
                nn.init.xavier_uniform_(part)
        if modulated:
            block.modulation = SplitModulation(dim=dim, parts=2)
    return trunk


def sincos(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed positions of a grid, float32 [h * w, dim]: sine and cosine of the row, then of the column (MoCo v3)."""
    if dim % 4:
        raise ValueError(f"positions=sincos needs a width that is a multiple of 4, got {dim}")
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 4, device=device) / (dim // 4))
    index = torch.arange(height * width, device=device)
    row, column = (index // width)[:, None] * frequencies, (index % width)[:, None] * frequencies
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
