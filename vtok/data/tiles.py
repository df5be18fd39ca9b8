"""Any picture through a tokenizer of one image size: padded to whole tiles, and put together again.

A picture of any size becomes a grid of square tiles; its right and lower edge are padded by repeating the last pixel,
and cut off again afterwards, so sizes are kept and no pixel is resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tiling:
    """height x width pixels covered by rows x columns tiles of `side`."""

    height: int
    width: int
    side: int

    @property
    def rows(self) -> int:
        return math.ceil(self.height / self.side)

    @property
    def columns(self) -> int:
        return math.ceil(self.width / self.side)

    def cut(self, image: Tensor) -> Tensor:
        """[3, H, W] to [rows * columns, 3, side, side], row by row."""
        padding = (0, self.columns * self.side - self.width, 0, self.rows * self.side - self.height)
        image = F.pad(image.unsqueeze(0), padding, mode="replicate")[0]
        tiles = image.unflatten(1, (self.rows, self.side)).unflatten(3, (self.columns, self.side))
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def join(self, tiles: Tensor) -> Tensor:
        """Inverse of `cut`."""
        grid = tiles.unflatten(0, (self.rows, self.columns)).permute(2, 0, 3, 1, 4)
        return grid.flatten(1, 2).flatten(2, 3)[:, : self.height, : self.width]


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, image: Tensor, *, batch: int = 16, keep: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tiling]:
    """(copy [3, H, W], tokens [tiles, L(, C)], tiling) of an image float [3, H, W] in [-1, 1].

    batch: tiles computed at once; keep: decode only so many tokens a tile, where the family can; seed: of stochastic
    encoders and decoders.
    """
    device = next(tokenizer.parameters()).device
    tiling = Tiling(image.shape[1], image.shape[2], tokenizer.spec.image_size)
    tiles = tiling.cut(image).to(device)
    noise = SampleNoise(sample_seeds(seed, 0, len(tiles)).to(device))
    tokens, copies = [], []
    for start in range(0, len(tiles), batch):
        rows = slice(start, start + batch)
        found = tokenizer.encode(tiles[rows], noise=noise.rows(rows))
        tokens.append(found.cpu())
        copies.append(tokenizer.decode(found, keep=keep, noise=noise.rows(rows)).float().cpu())
    return tiling.join(torch.cat(copies)), torch.cat(tokens), tiling
