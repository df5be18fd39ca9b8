"""Interpolation, and which resolution a prefix of tokens stands for (DetailFlow, arXiv 2505.21473)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def must_repeat(x: Tensor) -> bool:
    """Whether the gradient of x has to be the same bits each time on a GPU (trainer.deterministic=true), where PyTorch
    then refuses some operations."""
    wanted = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
    return wanted and x.is_cuda and x.requires_grad


def interpolate(x: Tensor, size: int | tuple[int, int] | None = None, *, mode: str, **options) -> Tensor:
    """F.interpolate of maps [B, C, H, W], whose gradient repeats where it must.

    PyTorch has none of that kind for means of cells (area), antialiasing and, before 2.15, cubic interpolation. All are
    linear maps of the rows and of the columns: two products with their matrices, in float64, are equal up to rounding.
    """
    if not must_repeat(x):
        return F.interpolate(x, size, mode=mode, **options)
    size = (size, size) if isinstance(size, int) else size
    scale, matrices = options.pop("scale_factor", None), []
    for side, wanted in zip(x.shape[2:], size or scale):
        unit = torch.eye(side, dtype=torch.float64, device=x.device)[None, None]
        given = {"size": (wanted, side)} if size else {"scale_factor": (wanted, 1)}
        matrices.append(F.interpolate(unit, mode=mode, **given, **options)[0, 0])  # [new side, side]
    rows, columns = matrices
    return (rows @ x.double() @ columns.T).to(x.dtype)


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
    grid = interpolate(grid, (height, width), mode="bilinear", align_corners=False, antialias=True)
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
