"""The network of D-AR's pixel flow: patches of noisy pixels that read the condition tokens of their span of time.

Gao and Shou, arXiv 2505.23660, section 3.2; code showlab/D-AR, diff_decoder.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.layers.block import Block
from vtok.layers.dit import ConditionAttention, repa_head
from vtok.layers.flex import sincos
from vtok.layers.rope import rope_2d
from vtok.layers.time import TimeEmbedding
from vtok.layers.vit import PatchEmbed, cell_means, initialise, unpatchify

EPS = 1e-6


def init_std(dim: int) -> float:
    """Standard deviation of first weights: 0.02 at the published width 768, the same gain elsewhere."""
    return 0.02 * math.sqrt(768 / dim)


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def grid_rope(height: int, width: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [h * w, dim / 2], of a grid in raster order."""
    index = torch.arange(height * width, device=device)
    return rope_2d(index // width, index % width, dim)


class FlowBlock(nn.Module):
    """A block whose modulation differs from patch to patch: time plus what the patch reads from the condition."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(dim=dim, frequencies=dim)
        self.condition = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cross = ConditionAttention(dim=dim, heads=heads, eps=EPS)
        self.block = Block(
            dim=dim,
            heads=heads,
            hidden=4 * dim,
            norm="layer",
            eps=EPS,
            ffn="silu",
            bias="qkv",
            qk_norm="layer",
            attention_scale=None,
            modulation="own",
            dropout=0.0,
            attention_dropout=0.0,
            drop_path=0.0,
        )

    def forward(self, x: Tensor, condition: Tensor, signal: Tensor, position: tuple[Tensor, Tensor]) -> Tensor:
        condition = plain_norm(self.condition(condition))
        vector = self.time(signal)[:, None] + self.cross(plain_norm(x), condition, position=position)
        return self.block(x, vector=F.silu(vector), position=(*position, None), mask=None, cache=None, layer=0)


class PixelFlow(nn.Module):
    """Velocity of noisy pixels, given condition tokens of their span of time.

    patch: side of the patches. condition: width of the condition. tap: index of the block whose input, averaged to
    tap_side x tap_side and put through a network to tap_width channels, is aligned with a pretrained network (REPA, Yu
    et al., arXiv 2410.06940); None builds none. fixed: add sine positions to the patches, beside the blocks' rope.
    Where `checkpointing` is set, blocks are recomputed in the backward pass.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        condition: int,
        tap: int | None,
        tap_width: int,
        tap_side: int,
        fixed: bool = False,
    ) -> None:
        super().__init__()
        if tap is not None and not 0 <= tap < depth:
            raise ValueError(f"repa_block={tap} is none of the {depth} blocks of flow_depth; null builds none")
        self.patch, self.heads, self.tap, self.tap_side = patch, heads, tap, tap_side
        self.fixed, self.checkpointing = fixed, False
        self.conv_in = PatchEmbed(dim=dim, patch=patch)
        self.condition = nn.Linear(condition, dim)
        self.blocks = nn.ModuleList(FlowBlock(dim=dim, heads=heads) for _ in range(depth))
        self.out = nn.Linear(dim, 3 * patch * patch)
        self.repa = None if tap is None else repa_head(dim, tap_width)
        initialise(self, init_std(dim), width=dim)
        for block in self.blocks:
            nn.init.zeros_(block.block.modulation.weight)
        nn.init.zeros_(self.out.weight)

    @torch.no_grad()
    def open(self) -> None:
        """The start for short trainings: gates of 1, conditions that count at once, patches that read few tokens."""
        for block in self.blocks:
            modulation = block.block.modulation
            nn.init.normal_(modulation.weight, std=0.02)
            nn.init.ones_(modulation.bias.view(6, -1)[:2])
            block.cross.q_norm.weight.mul_(3)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity [B, 3, H, W], float32, and the tapped [B, n, tap_width], of x [B, 3, H, W], t [B], [B, m, C]."""
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        h = self.conv_in(x)
        if self.fixed:
            h = h + sincos(height, width, h.shape[-1], x.device).to(h.dtype)
        condition = plain_norm(self.condition(condition))
        position = grid_rope(height, width, h.shape[-1] // self.heads, x.device)
        tapped = None
        for i, block in enumerate(self.blocks):
            if i == self.tap:
                grid = h.transpose(1, 2).unflatten(2, (height, width))
                tapped = self.repa(cell_means(grid, self.tap_side, self.tap_side).flatten(2).transpose(1, 2))
            if self.checkpointing and self.training:
                h = checkpoint(block, h, condition, 1 - t, position, use_reentrant=False)
            else:
                h = block(h, condition, 1 - t, position)
        return unpatchify(self.out(plain_norm(h)), self.patch, height).float(), tapped
