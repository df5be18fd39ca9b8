"""Any picture through a tokenizer of one image size: padded to whole tiles, and put together again.

A picture of any size becomes a grid of square tiles; its right and lower edge are padded by repeating the last pixel,
and cut off again afterwards, so sizes are kept and no pixel is resampled. A tile has the tokenizer's image size: many
families have as many tokens for a large image as for a small one. Those that have more can take the picture whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.decoding import encode_images
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

    def pad(self, image: Tensor) -> Tensor:
        """[3, H, W] to [3, rows * side, columns * side]."""
        padding = (0, self.columns * self.side - self.width, 0, self.rows * self.side - self.height)
        return F.pad(image.unsqueeze(0), padding, mode="replicate")[0]

    def cut(self, image: Tensor) -> Tensor:
        """[3, H, W] to [rows * columns, 3, side, side], row by row."""
        tiles = self.pad(image).unflatten(1, (self.rows, self.side)).unflatten(3, (self.columns, self.side))
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def join(self, tiles: Tensor) -> Tensor:
        """Inverse of `cut`."""
        grid = tiles.unflatten(0, (self.rows, self.columns)).permute(2, 0, 3, 1, 4)
        return grid.flatten(1, 2).flatten(2, 3)[:, : self.height, : self.width]


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    image: Tensor,
    *,
    batch: int = 16,
    keep: int | None = None,
    seed: int = 0,
    whole: bool = False,
) -> tuple[Tensor, Tensor, Tiling]:
    """(copy [3, H, W], tokens [tiles, L(, C)], tiling) of an image float [3, H, W] in [-1, 1].

    batch: tiles computed at once; keep: decode only so many tokens a tile, where the family can; seed: of stochastic
    encoders and decoders. whole: pad to the stride only and compute the picture at once, where `tokenizer.grows`: no
    seams, but memory grows with it. Its tiles are then the cells, of one token each, or it is one square tile.
    """
    device = _device(tokenizer)
    height, width = image.shape[1:]
    side, options = tokenizer.spec.image_size, {}
    if whole:
        check_whole(tokenizer, keep)
        if tokenizer.grows == "any":
            return _by_cells(tokenizer, image, Tiling(height, width, tokenizer.stride), seed)
        side = math.ceil(max(height, width) / tokenizer.stride) * tokenizer.stride
        options = {"size": side}
    tiling = Tiling(height, width, side)
    tiles = tiling.cut(image).to(device)
    noise = SampleNoise(sample_seeds(seed, 0, len(tiles)).to(device))
    tokens, copies = [], []
    for start in range(0, len(tiles), batch):
        rows = slice(start, start + batch)
        found = encode_images(tokenizer, tiles[rows], noise=noise.rows(rows))
        tokens.append(found.cpu())
        copies.append(tokenizer.decode(found, keep=keep, noise=noise.rows(rows), **options).float().cpu())
    return tiling.join(torch.cat(copies)), torch.cat(tokens), tiling


def check_whole(tokenizer: Tokenizer, keep: int | None) -> None:
    """Raise ValueError unless it takes a picture whole."""
    if tokenizer.grows == "no":
        raise ValueError(
            f"whole=true: {type(tokenizer).__name__} has no more tokens for a larger image than the "
            f"{tokenizer.spec.layout.length} for its own size; leave whole away, for tiles of that size"
        )
    if keep is not None:
        raise ValueError(f"whole=true decodes all tokens; leave keep={keep} away")


def _by_cells(tokenizer: Tokenizer, image: Tensor, cells: Tiling, seed: int) -> tuple[Tensor, Tensor, Tiling]:
    """`reconstruct` of a whole picture as rows x columns cells of one token."""
    device = _device(tokenizer)
    noise = SampleNoise(sample_seeds(seed, 0, 1).to(device))
    tokens = encode_images(tokenizer, cells.pad(image).unsqueeze(0).to(device), noise=noise)
    z = tokenizer.quantizer.assemble(tokenizer.embed(tokens)).unflatten(1, (cells.rows, cells.columns))
    copy = tokenizer.pixels(z, noise=noise)[0].float().cpu()
    return copy[:, : cells.height, : cells.width], tokens[0].unsqueeze(1).cpu(), cells


def _device(tokenizer: Tokenizer) -> torch.device:
    """Where it is. Packed weights are buffers, and may be all that it has."""
    return next(chain(tokenizer.parameters(), tokenizer.buffers())).device
