"""The order in which tokens are generated, as data: step sizes and the grid cell of every token.

Every block-causal mask of the field is one rule on it: a query sees a key when rank(query) >= rank(key), where all
positions read in one step share a rank, unless the step is causal inside. Masks, cache spans, rope coordinates and
per-step loss weights derive from a layout. Next-token, next-scale (VAR, arXiv 2404.02905), next-block (NBP, arXiv
2502.07737) and next-level orders differ only in these numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

# how positions see each other: all; only earlier ones and themselves; in blocks that end at these places, each position
# its own block and all before it; or as their ranks say
Pattern = Literal["full", "causal", "ranks"] | tuple[int, ...]


def behind(pattern: Pattern, length: int, count: int) -> Pattern:
    """The pattern of `length` positions of `pattern` that all see `count` more in front, which see each other alone."""
    if pattern == "ranks":
        return pattern
    ends = (length,) if pattern == "full" else range(1, length + 1) if pattern == "causal" else pattern
    return (count, *(count + end for end in ends))


@dataclass(frozen=True)
class SequenceLayout:
    """Step sizes plus the coordinate of every token.

    sizes: tokens WRITTEN at each step, in generation order; their sum is L.
    coords: (scale, row, column) of every token written, i.e. of the cell that it fills.
    feeds: trunk positions READ at each step; () means the same as `sizes`.
    causal: per step, whether the positions read in it see only earlier ones of the same step; () means none.

    Raises ValueError where the four do not fit together.
    """

    sizes: tuple[int, ...]
    coords: tuple[tuple[int, int, int], ...]
    feeds: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"a layout needs at least one step and one token a step, got sizes={self.sizes}")
        if sum(self.sizes) != len(self.coords):
            raise ValueError(f"sizes add up to {sum(self.sizes)} tokens, but there are {len(self.coords)} coords")
        for name in ("feeds", "causal"):
            values = getattr(self, name)
            if values and len(values) != len(self.sizes):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.sizes)} steps")
        if self.feeds and min(self.feeds) < 1:
            raise ValueError(f"every step must feed at least one position, got feeds={self.feeds}")

    # --- the named orders -------------------------------------------------------------------------------------------

    @classmethod
    def line(cls, tokens: int) -> SequenceLayout:
        """`tokens` one-dimensional tokens, one a step."""
        return cls((1,) * tokens, tuple((0, 0, i) for i in range(tokens)))

    @classmethod
    def raster(cls, height: int, width: int) -> SequenceLayout:
        """A grid row by row, one token a step."""
        return cls((1,) * (height * width), tuple((0, r, c) for r in range(height) for c in range(width)))

    @classmethod
    def tiles(cls, height: int, width: int, tile_height: int, tile_width: int) -> SequenceLayout:
        """A grid tile by tile in raster order, one tile a step (rows of a grid are tiles of 1 x width)."""
        if tile_height < 1 or tile_width < 1:
            raise ValueError(f"tiles of {tile_height} x {tile_width}: both sides must be at least 1")
        if height % tile_height or width % tile_width:
            raise ValueError(f"a {height} x {width} grid does not divide into tiles of {tile_height} x {tile_width}")
        corners = [(r, c) for r in range(0, height, tile_height) for c in range(0, width, tile_width)]
        inside = [(r, c) for r in range(tile_height) for c in range(tile_width)]
        coords = tuple((0, y + r, x + c) for y, x in corners for r, c in inside)
        return cls((tile_height * tile_width,) * len(corners), coords)

    @classmethod
    def scales(cls, sides: Sequence[int]) -> SequenceLayout:
        """Square maps of growing side, one whole map a step."""
        coords = tuple((k, r, c) for k, side in enumerate(sides) for r in range(side) for c in range(side))
        return cls(tuple(side * side for side in sides), coords)

    @classmethod
    def levels(cls, sizes: Sequence[int]) -> SequenceLayout:
        """One-dimensional tokens in groups of the given sizes, one group a step."""
        coords = tuple((k, 0, i) for k, size in enumerate(sizes) for i in range(size))
        return cls(tuple(sizes), coords)

    # --- what derives from it ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @cached_property
    def length(self) -> int:
        """L, tokens written in all."""
        return sum(self.sizes)

    @property
    def reads(self) -> tuple[int, ...]:
        """Trunk positions read at each step."""
        return self.feeds or self.sizes

    @cached_property
    def single(self) -> bool:
        """Whether a step reads one position, as next token does; the first may read a start beside it (RAR)."""
        return self.steps > 1 and max(self.reads[1:]) == 1

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the grid of every scale."""
        grid: dict[int, tuple[int, int]] = {}
        for scale, row, column in self.coords:
            height, width = grid.get(scale, (0, 0))
            grid[scale] = (max(height, row + 1), max(width, column + 1))
        return tuple(grid[scale] for scale in sorted(grid))

    @cached_property
    def _written(self) -> tuple[int, ...]:
        return _offsets(self.sizes)

    @cached_property
    def _read(self) -> tuple[int, ...]:
        return _offsets(self.reads)

    def written(self, start: int, stop: int) -> tuple[int, int]:
        """Span of the tokens written in steps start..stop-1."""
        return self._written[start], self._written[stop]

    def read(self, start: int, stop: int) -> tuple[int, int]:
        """Span of the trunk positions read in steps start..stop-1."""
        return self._read[start], self._read[stop]

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        ranks: list[int] = []
        for step, reads in enumerate(self.reads):
            first = ranks[-1] + 1 if ranks else 0
            ordered = bool(self.causal and self.causal[step])
            ranks += [first + i if ordered else first for i in range(reads)]
        return tuple(ranks)

    def ranks(self, start: int = 0, stop: int | None = None, *, device: torch.device | None = None) -> Tensor:
        """Rank of the trunk positions read in steps start..stop-1, int64 [l]."""
        a, b = self.read(start, self.steps if stop is None else stop)
        if device is None:
            return torch.tensor(self._ranks[a:b])
        if device not in self._placed:  # once, and made there: a copy would wait for the device (FlexVAR draws layouts)
            with torch.inference_mode(False):
                self._placed[device] = ranks_of(self.pattern(), len(self._ranks), device)
        return self._placed[device][a:b]

    def __getstate__(self) -> dict:
        """The numbers alone: copies and other processes place their own tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _placed(self) -> dict[torch.device, Tensor]:
        """All ranks on each device that asked for them."""
        return {}

    def pattern(self, start: int = 0, stop: int | None = None) -> Pattern:
        """How the positions of steps start..stop-1 see each other; ranks never fall along the sequence."""
        a, b = self.read(start, self.steps if stop is None else stop)
        sizes = [len(list(same)) for _, same in itertools.groupby(self._ranks[a:b])]
        return "full" if len(sizes) == 1 else "causal" if len(sizes) == b - a else tuple(itertools.accumulate(sizes))

    def steps_of_tokens(self) -> Tensor:
        """Step in which each token is written, int64 [L]."""
        return torch.tensor([step for step, size in enumerate(self.sizes) for _ in range(size)])

    # --- as plain data ----------------------------------------------------------------------------------------------

    def to_config(self) -> dict:
        """Plain data for a config file: the named order where it is one, the numbers otherwise."""
        height, width = self.sides[0]
        candidates: list[tuple[str, list[int]]] = [("line", [self.length]), ("raster", [height, width])]
        if all(h == w for h, w in self.sides):
            candidates.append(("scales", [h for h, _ in self.sides]))
        candidates.append(("levels", list(self.sizes)))
        for name, numbers in candidates:
            if self == _named(name, numbers):
                return {name: numbers}
        data: dict = {"sizes": list(self.sizes), "coords": [list(c) for c in self.coords]}
        return data | {k: list(getattr(self, k)) for k in ("feeds", "causal") if getattr(self, k)}

    @classmethod
    def from_config(cls, data: Mapping) -> SequenceLayout:
        """Inverse of `to_config`; also takes {"tiles": [height, width, tile_height, tile_width]}."""
        if "sizes" in data:
            coords = tuple((int(s), int(r), int(c)) for s, r, c in data["coords"])
            return cls(tuple(data["sizes"]), coords, tuple(data.get("feeds", ())), tuple(data.get("causal", ())))
        if len(data) != 1 or next(iter(data)) not in ("raster", "line", "tiles", "scales", "levels"):
            raise ValueError(f"a layout is one of raster, line, tiles, scales, levels or sizes + coords, got {data}")
        ((name, numbers),) = data.items()
        return _named(name, list(numbers))


def visible(query: Tensor, key: Tensor) -> Tensor:
    """The one mask rule: bool [.., q, k], true where rank(query) >= rank(key). Ranks are [q] or [R, q]."""
    return query.unsqueeze(-1) >= key.unsqueeze(-2)


def ranks_of(pattern: Pattern, length: int, device: torch.device) -> Tensor:
    """Ranks int64 [length] of positions of a pattern, but "ranks", made on the device: nothing is copied there."""
    place = torch.arange(length, device=device)
    if isinstance(pattern, tuple):
        return sum(((place >= end).long() for end in pattern[:-1]), torch.zeros_like(place))
    return place if pattern == "causal" else torch.zeros_like(place)


def _named(name: str, numbers: list[int]) -> SequenceLayout:
    make = getattr(SequenceLayout, name)
    return make(numbers) if name in ("scales", "levels") else make(*numbers)


def _offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    return tuple(total)
