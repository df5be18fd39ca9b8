"""Next-group prediction on LlamaGen's trunk: what HAR, DetailFlow, NBP and PAR have in common.

One rule builds the input of every step but the first: the tokens of the step before, then learned special tokens until
there are as many positions as tokens to write; the position at a slot predicts the token of that slot. Groups that keep
their size need no specials, the step from single tokens to groups of g needs g - 1, a level twice as large as the last
one needs half (DetailFlow, arXiv 2505.21473; NBP, arXiv 2502.07737, start iii; ResTok, arXiv 2601.03955). Positions of
one step see each other. A paper is a `plan`: which groups, in which order, and where what is read stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.conditioning import Cond
from vgen.generator import Canvas
from vgen.models.llamagen import LlamaGen
from vtok.layers.trunk import Inputs
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec

Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """layout: sizes that never shrink. cells: (scale, row, column) of what positions 1.. read, None = rope along the
    sequence. order: the tokenizer's index of each token of the layout, None = its own. specials: rows of their table.
    """

    layout: SequenceLayout
    cells: Sequence[Cell] | None = None
    order: Sequence[int] | None = None
    specials: int | None = None


class Grouped(LlamaGen):
    """LlamaGen whose steps write groups; not a family itself.

    group: tokens a group, or (height, width) of a tile, or regions (rows, columns), as the family says. first: tokens
    written one by one before the groups. start: "hybrid", the first group token by token; "shifted", at once from
    special tokens. The rest are LlamaGen's.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        group: int | Sequence[int] | None = None,
        first: int | None = None,
        start: Literal["hybrid", "shifted"] = "hybrid",
        width: int,
        depth: int,
        heads: int,
        multiple_of: int = 256,
        label_drop: float = 0.1,
        token_dropout: float = 0.1,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        theta: float = 10000.0,
        checkpointing: bool = False,
    ) -> None:
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if start not in ("hybrid", "shifted"):
            raise ValueError(f"start={start!r}: choose hybrid or shifted")
        plan = self.plan(spec, group=group, first=first, start=start)
        options = {"token_dropout": token_dropout, "dropout": dropout, "attention_dropout": attention_dropout}
        options |= {"label_drop": label_drop, "theta": theta, "checkpointing": checkpointing}
        sizes = {"depth": depth, "width": width, "heads": heads, "multiple_of": multiple_of}
        super().__init__(spec, num_classes, position="rope_1d", **sizes, **options)
        sizes, self.layout = plan.layout.sizes, plan.layout
        if any(a > b for a, b in pairwise(sizes)):
            raise ValueError(f"groups of {sizes} tokens shrink: a step reads all tokens of the one before")
        self.filled = [sizes[0] - 1] + [b - a for a, b in pairwise(sizes)]  # specials read at every step
        self.specials = nn.Embedding(sum(self.filled) if plan.specials is None else plan.specials, width)
        nn.init.normal_(self.specials.weight, std=0.02)
        if plan.cells is not None:
            self.turn_by_cells(plan.cells)
        order = torch.arange(plan.layout.length) if plan.order is None else torch.tensor(plan.order)
        self.register_buffer("own_order", order, persistent=False)
        self.register_buffer("spec_order", order.argsort(), persistent=False)

    @classmethod
    def plan(cls, spec: TokenSpec, *, group: int | Sequence[int] | None, first: int | None, start: str) -> Plan:
        """The groups of this family for these tokens. Raises ValueError where they do not divide."""
        raise NotImplementedError

    def arrange(self, tokens: Tensor) -> Canvas:
        return Canvas(tokens[:, self.own_order], self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        return canvas.tokens[:, self.spec_order]

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        layout, rows = canvas.layout, len(cond.start)
        a, b = layout.written(max(start - 1, 0), stop - 1)
        embedded = self.embed(canvas.tokens[:, a:b])
        parts, used, seen = [], sum(self.filled[:start]), 0
        for step in range(start, stop):
            before = layout.sizes[step - 1] if step else 0
            parts.append(embedded[:, seen : seen + before] if step else cond.start)
            if self.filled[step]:
                special = self.specials.weight[used : used + self.filled[step]]
                parts.append(special.expand(rows, -1, -1))
            seen, used = seen + before, used + self.filled[step]
        return self.read(torch.cat(parts, dim=1), cond, layout, start, stop)


def require_line(spec: TokenSpec, family: str) -> None:
    """ValueError with the reason where some tokens stand on a grid: groups of a line have no shape in the picture."""
    if any(height > 1 for height, _ in spec.layout.sides):
        raise ValueError(
            f"{family} groups one-dimensional tokens, but these tokens lie on {spec.layout.sides}; choose a 1D "
            "tokenizer, or for one grid model=nbp_* or par_*"
        )


def input_cells(layout: SequenceLayout) -> list[Cell]:
    """Cell of what positions 1.. read: a token's own; a special's is that of the token of its slot in the first group
    that it opens (unofficial: spec of NBP for images)."""
    sizes, found = layout.sizes, []
    for step, size in enumerate(sizes):
        a, _ = layout.written(step, step + 1)
        before = sizes[step - 1] if step else 0
        read = list(layout.coords[a - before : a]) if step else [(0, 0, 0)]
        slots = [layout.coords[slot] for slot in range(len(read), size)]
        found += read + slots
    return found[1:]
