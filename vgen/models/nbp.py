"""NBP for images: next-block prediction, rows, cells or any tile of a grid at once (Ren et al., arXiv 2502.07737).

status: unofficial. The paper and its code are for video; no image model exists. What we chose: LlamaGen's trunk, rope
by the cell of what is read, a class token in the place of the block before the first.

start "hybrid" (all numbers of the paper): the first tile token by token, then one tile a step, each read from the tile
before at the same slot; the step between reads the first tile's last token and B - 1 learned middle tokens, which stand
at the cells of the first tile. start "shifted": the first tile at once, from the class and B - 1 learned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from vgen.models.grouped import Grouped, Plan, input_cells
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class NBP(Grouped):
    """group: (height, width) of a tile; one row of the grid where None. `first` is not used: see start."""

    @classmethod
    def plan(cls, spec: TokenSpec, *, group: int | Sequence[int] | None, first: int | None, start: str) -> Plan:
        height, width = spec.layout.sides[0]
        if isinstance(group, int) or (group is not None and len(group) != 2) or first is not None:
            raise ValueError(f"NBP takes group=[height, width] of a tile and no `first`, got {group}, {first}")
        if group is not None and min(group) < 1:
            raise ValueError(f"group={list(group)}: a tile has at least one row and one column")
        tiles = SequenceLayout.tiles(height, width, *(group or (1, width)))
        block = tiles.sizes[0]
        sizes = (1,) * block + tiles.sizes[1:] if start == "hybrid" else tiles.sizes
        layout = SequenceLayout(sizes, tiles.coords)
        where = {cell: index for index, cell in enumerate(spec.layout.coords)}
        return Plan(layout, input_cells(layout), [where[cell] for cell in layout.coords])

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        super().accepts(spec)
        sides = spec.layout.sides
        if len(sides) != 1 or sides[0][0] == 1 or sides[0][0] * sides[0][1] != spec.layout.length:
            raise ValueError(f"{cls.__name__} tiles a full grid, but these tokens lie on {sides}")
