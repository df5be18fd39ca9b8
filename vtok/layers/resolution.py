"""Which resolution a prefix of tokens stands for, and images degraded to it (DetailFlow, arXiv 2505.21473)."""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def prefix_side(count: int, tokens: int, size: int, power: float) -> int:
    """R(t): side that the first `count` of N tokens show of a size x size image, 1 .. size.

    R(t) = floor(S - (S - 1) ((N - t) / (N - 1))^p), so R(1) = 1 and R(N) = S.
    """
    if tokens == 1:
        return size
    slope = (size - 1) / math.pow(tokens - 1, power)
    return min(size, max(1, int(size - slope * math.pow(tokens - count, power))))


def decode_side(side: int, patch: int) -> int:
    """Side at which a decoder of patches renders an image of that resolution: the next multiple of its patch."""
    return patch * math.ceil(side / patch)


def degrade(image: Tensor, side: int, target: int) -> Tensor:
    """Images [B, 3, S, S] averaged down to side x side, then enlarged to target x target by cubic interpolation."""
    if image.shape[-1] > side:
        image = F.interpolate(image, size=(side, side), mode="area")
    return image if image.shape[-1] == target else F.interpolate(image, size=(target, target), mode="bicubic")


def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """A learned table of a square grid [s * s, D] for another grid, [height * width, D], antialiased bilinear."""
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise ValueError(f"a position table of {len(table)} rows is not that of a square grid")
    if (height, width) == (side, side):
        return table
    grid = table.T.unflatten(1, (side, side)).unsqueeze(0).float()  # antialiasing has no bf16 kernel everywhere
    grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return grid[0].flatten(1).T.to(table.dtype)


def resized(images: Tensor, size: int) -> Tensor:
    """Images at another side, by linear interpolation; themselves where they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def by_value(values: Tensor, host: np.ndarray | None = None) -> list[tuple[int, Tensor]]:
    """(value, rows that have it) for every value of an integer tensor [B], ascending. host: the same values on the
    host, which waits for a GPU to know them otherwise."""
    found, counts = np.unique(values.cpu().numpy() if host is None else host, return_counts=True)
    return list(zip(found.tolist(), values.argsort(stable=True).split(counts.tolist())))
