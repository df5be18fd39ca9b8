"""Small parts that one-dimensional tokenizers share around the trunk: patches in, learned tables, pixels out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.attention import Mask
from vtok.layers.resolution import interpolate
from vtok.layers.trunk import Inputs


class PatchEmbed(nn.Module):
    """Images [B, channels, H, W] to one vector per patch, [B, h * w, D] in raster order."""

    def __init__(self, *, dim: int, patch: int, channels: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(channels, dim, patch, stride=patch, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, patch: int, height: int) -> Tensor:
    """[B, h * w, patch * patch * C], channels ordered (row, column, C), to images [B, C, H, W]."""
    x = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (height, -1))  # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Inverse of `unpatchify`."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, h, p, w, q]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)


def cell_means(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Means [B, C, rows, columns] of maps [B, C, h, w] over cells, which overlap by a row or column where they do not
    divide the map."""
    height, width = maps.shape[2:]
    if height % rows or width % columns:
        return interpolate(maps, (rows, columns), mode="area")
    return F.avg_pool2d(maps, (height // rows, width // columns))


NARROW = 384  # no published tokenizer's transformer is narrower


def table(length: int, dim: int) -> nn.Parameter:
    """A learned table [length, D] of queries or mask tokens, drawn with standard deviation D ** -0.5."""
    return nn.Parameter(dim**-0.5 * torch.randn(length, dim))


def positions(length: int, dim: int, std: float | None = None) -> nn.Parameter:
    """A learned table [length, D] of positions; std: the published deviation, D ** -0.5 where None.

    In a model narrower than 384 it is 1 instead, as large as what it is added to: trained for minutes, a transformer
    that cannot tell its tokens apart stays at the mean colour.
    """
    std = (dim**-0.5 if std is None else std) if dim >= NARROW else 1.0
    return nn.Parameter(std * torch.randn(length, dim))


def together(x: Tensor, *, position: tuple[Tensor, Tensor, Tensor | None] | None = None, mask: Mask = None) -> Inputs:
    """Trunk inputs for positions x [B, l, D] that all see each other, or whom `mask` (bool [.., l, l]) says."""
    rank = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    return Inputs(x, rank, "full", position, mask=mask)


def initialise(module: nn.Module, std: float = 0.02, *, width: int = NARROW) -> None:
    """Weights of all linear layers and convolutions truncated normal, biases zero.

    std: the published deviation. In a model narrower than 384 (`width`) it is every layer's own inputs ** -0.5 instead:
    with 0.02 at a width of 128 nothing of the image reaches the decoder, and 800 steps end at the mean colour.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=std if width >= NARROW else part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
