"""Maps of continuous tokens: which of them a grid family takes, in which order, and at which resolutions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.rope import rope_2d
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec

Entity = Literal["token", "cell", "subsample", "scale", "image"]


def require_grid(spec: TokenSpec, family: str) -> tuple[int, int]:
    """(height, width) of the one grid of continuous tokens of a spec; ValueError with the reason where it is none."""
    if spec.discrete:
        raise ValueError(
            f"{family} flows in continuous latents, but these tokens are ids; choose a tokenizer with latents (KL)"
        )
    if len(spec.parts) != 1:
        raise ValueError(f"{family} takes one kind of latents, but these tokens have {len(spec.parts)} parts")
    height, width = spec.layout.sides[0]
    if len(spec.layout.sides) != 1 or height * width != spec.layout.length or 1 in (height, width):
        where = f"these {spec.layout.length} tokens lie on {spec.layout.sides}"
        raise ValueError(
            f"{family} needs latents that fill one grid of rows and columns, but {where}; choose a 2D tokenizer"
        )
    return height, width


def require_square(spec: TokenSpec, family: str) -> int:
    """Side of the one square grid of continuous tokens of a spec; ValueError with the reason where it is none."""
    height, width = require_grid(spec, family)
    if height != width:
        raise ValueError(f"{family} has square scales, but these latents lie on {height} x {width}")
    return height


def entity_layout(height: int, width: int, entity: Entity, size: int | None) -> SequenceLayout:
    """The order of xAR's entities on a grid (arXiv 2502.20388, section 3). size: edge of a cell, stride of a subsample,
    number of scales (the largest is the grid, each other half of the next); None = half the grid, 2, all down to 1.
    """
    if entity in ("token", "image") and size is not None:
        raise ValueError(f"entity={entity} has no entity_size, got {size}; leave it out")
    if size is not None and size < 1:
        raise ValueError(f"entity_size={size}: it must be at least 1")
    if entity == "token":
        return SequenceLayout.raster(height, width)
    if entity == "image":
        return SequenceLayout.tiles(height, width, height, width)
    if entity == "cell":
        edges = (height // 2, width // 2) if size is None else (size, size)
        return SequenceLayout.tiles(height, width, *edges)
    if entity == "subsample":
        stride = 2 if size is None else size
        if height % stride or width % stride:
            raise ValueError(f"entity_size={stride} does not divide the {height} x {width} grid")
        offsets = [(r, c) for r in range(stride) for c in range(stride)]
        coords = [(0, y, x) for r, c in offsets for y in range(r, height, stride) for x in range(c, width, stride)]
        return SequenceLayout((len(coords) // stride**2,) * stride**2, tuple(coords))
    if entity == "scale":
        return SequenceLayout.scales(halved(height, width, size))
    raise ValueError(f"entity={entity!r}: choose token, cell, subsample, scale or image")


def halved(height: int, width: int, count: int | None) -> tuple[int, ...]:
    """Sides of `count` square grids, each half of the next, the last height x width; None = all down to an odd one."""
    if count is not None and count < 1:
        raise ValueError(f"scales={count}: at least one is needed")
    if height != width:
        raise ValueError(f"scales need a square grid, got {height} x {width}")
    sides = [height]
    while sides[0] % 2 == 0 and (count is None or len(sides) < count):
        sides.insert(0, sides[0] // 2)
    if count is not None and len(sides) != count:
        raise ValueError(f"a side of {height} can be halved {len(sides) - 1} times, not {count - 1}; lower the number")
    return tuple(sides)


def gather_index(source: SequenceLayout, target: SequenceLayout) -> Tensor:
    """int64 [L]: for every token of `target` the place of its cell in `source`; both cover the same cells once."""
    place = {coord: i for i, coord in enumerate(source.coords)}
    return torch.tensor([place[coord] for coord in target.coords])


def shrink(maps: Tensor, side: int) -> Tensor:
    """Area average of maps [B, h, w, C] to [B, side, side, C]; sides need not divide."""
    if maps.shape[1:3] == (side, side):
        return maps
    return F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def enlarge(maps: Tensor, side: int, mode: Literal["bicubic", "nearest"] = "bicubic") -> Tensor:
    """Maps [B, h, w, C] to [B, side, side, C]."""
    if maps.shape[1:3] == (side, side):
        return maps
    corners = False if mode == "bicubic" else None
    return F.interpolate(maps.permute(0, 3, 1, 2), (side, side), mode=mode, align_corners=corners).permute(0, 2, 3, 1)


def pyramid(maps: Tensor, layout: SequenceLayout) -> Tensor:
    """Values [B, L, C] of maps [B, h, w, C] averaged down to every scale of `layout`, coarse to fine."""
    return torch.cat([shrink(maps, side).flatten(1, 2) for side, _ in layout.sides], dim=1)


def scale_map(values: Tensor, layout: SequenceLayout, step: int) -> Tensor:
    """The map [R, side, side, C] that step `step` of a layout of scales wrote."""
    a, b = layout.written(step, step + 1)
    side, _ = layout.sides[step]
    return values[:, a:b].unflatten(1, (side, side))


def stretched_rope(layout: SequenceLayout, dim: int) -> tuple[Tensor, Tensor]:
    """Rope tables [L, dim / 2] of a layout's cells; coarser grids are stretched over the finest (xAR, FlowAR)."""
    height, width = layout.sides[-1]
    places = [(r * height / layout.sides[s][0], c * width / layout.sides[s][1]) for s, r, c in layout.coords]
    rows, columns = torch.tensor(places, dtype=torch.float32).unbind(1)
    return rope_2d(rows, columns, dim)
