"""Two transformers of SigLIP2's layers: patches to latents, and latents to pixels at any size.

SigLIP2: Tschannen et al., arXiv 2502.14786 (so400m, naflex: a position table resized to the image's grid). As encoder
and decoder of one-dimensional tokens: DetailFlow, Liu et al., arXiv 2505.21473, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.resolution import resize_table
from vtok.layers.trunk import Inputs, Trunk
from vtok.layers.vit import PatchEmbed, positions, together, unpatchify
from vtok.layout import SequenceLayout, behind


class SiglipEncoder(nn.Module):
    """Latents [B, N, D] of images; positions are a grid x grid table, resized to the image's grid.

    layout: who of the latents sees whom. refine: has the queries of a second pass, which continues given latents.
    """

    def __init__(
        self,
        *,
        layout: SequenceLayout,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        grid: int,
        refine: bool,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.patches = PatchEmbed(dim=dim, patch=patch)
        self.positions = positions(grid * grid, dim, 0.02)
        self.latents, self.places = positions(layout.length, dim, 0.02), positions(layout.length, dim, 0.02)
        self.refined = positions(layout.length, dim, 0.02) if refine else None
        self.trunk = _trunk(dim, depth, heads, hidden)

    def forward(self, images: Tensor, given: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """given [B, N, D] with counts [B]: the first counts latents are given, the others are to repair after them."""
        height, width = (side // self.patches.patch for side in images.shape[2:])
        patches = self.patches(images) + resize_table(self.positions, height, width)
        latents = self.latents.expand(len(images), -1, -1)
        if given is not None:
            index = torch.arange(self.layout.length, device=images.device)
            latents = torch.where((index < counts[:, None]).unsqueeze(-1), given.to(patches.dtype), self.refined)
        rank = self.layout.ranks(device=images.device) + 1
        rank = torch.cat([rank.new_zeros(height * width), rank])
        pattern = behind(self.layout.pattern(), self.layout.length, height * width)
        return self.trunk(Inputs(torch.cat([patches, latents + self.places], 1), rank, pattern))[:, height * width :]


class MaskDecoder(nn.Module):
    """Images of any side from latents [B, n, D]: mask tokens on a grid see each other and the latents."""

    def __init__(self, *, tokens: int, patch: int, dim: int, depth: int, heads: int, hidden: int, grid: int) -> None:
        super().__init__()
        self.patch = patch
        self.positions, self.places, self.mask = (
            positions(grid * grid, dim, 0.02),
            positions(tokens, dim, 0.02),
            positions(1, dim, 0.02),
        )
        self.trunk = _trunk(dim, depth, heads, hidden)
        self.out = nn.Linear(dim, 3 * patch * patch)

    def forward(self, latents: Tensor, size: int) -> Tensor:
        side = size // self.patch
        cells = (self.mask + resize_table(self.positions, side, side)).expand(len(latents), -1, -1)
        x = torch.cat([cells, latents + self.places[: latents.shape[1]]], 1)
        return unpatchify(self.out(self.trunk(together(x))[:, : side * side]), self.patch, side)


def _trunk(dim: int, depth: int, heads: int, hidden: int) -> Trunk:
    """SigLIP2's layers (arXiv 2502.14786)."""
    return Trunk(dim=dim, depth=depth, heads=heads, hidden=hidden, norm="layer", eps=1e-6, ffn="gelu_tanh", bias="qkv")
