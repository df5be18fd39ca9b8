"""PAR: parallelised autoregressive generation (Wang et al., arXiv 2412.15119).

status: unofficial: written from the paper's description and the spec sheet, with nothing to check against. The grid is
cut into regions. The first token of every region is written one by one; then, step by step, the tokens at one place of
all regions at once, since tokens far apart depend weakly on each other. Between the two stand learned transition
tokens. What we chose: LlamaGen's trunk and rope by the cell of what is read; a transition token stands at its region's
corner. 24 x 24 tokens in 2 x 2 regions take 4 + 143 = 147 steps, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

from vgen.models.grouped import Plan, input_cells
from vgen.models.nbp import NBP
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class PAR(NBP):
    """group: (rows, columns) of regions, 2 x 2 where None. `first` and `start` are not used."""

    @classmethod
    def plan(cls, spec: TokenSpec, *, group: int | Sequence[int] | None, first: int | None, start: str) -> Plan:
        if isinstance(group, int) or (group is not None and len(group) != 2) or first is not None or start != "hybrid":
            raise ValueError(f"PAR takes group=[rows, columns] of regions alone, got {group}, {first}, {start}")
        if group is not None and min(group) < 1:
            raise ValueError(f"group={list(group)}: there is at least one row and one column of regions")
        (height, width), (rows, columns) = spec.layout.sides[0], group or (2, 2)
        if height % rows or width % columns:
            raise ValueError(f"a {height} x {width} grid does not divide into group={rows} x {columns} regions")
        regions = SequenceLayout.tiles(height, width, height // rows, width // columns)
        count, inside = rows * columns, regions.sizes[0]
        coords = tuple(regions.coords[region * inside + place] for place in range(inside) for region in range(count))
        layout = SequenceLayout((1,) * count + (count,) * (inside - 1), coords)
        where = {cell: index for index, cell in enumerate(spec.layout.coords)}
        return Plan(layout, input_cells(layout), [where[cell] for cell in coords])
