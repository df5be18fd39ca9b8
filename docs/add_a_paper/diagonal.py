"""Next-diagonal prediction: an example of a paper of your own. All cells of one anti-diagonal of the grid are written
at once, from the top left corner on, so an h x w grid takes h + w - 1 steps instead of h w.

Status: an example, no published counterpart. The order is that of near-to-far decoding (He et al., arXiv 2503.10696);
what a position reads, the tokens above and to the left of the cell that it predicts, and all sizes are chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.generator import Canvas, Generator
from vgen.heads import CategoricalHead
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


def diagonals(height: int, width: int) -> SequenceLayout:
    """Cells (0, row, column) with row + column = k in step k."""
    steps = [[(0, r, k - r) for r in range(height) if 0 <= k - r < width] for k in range(height + width - 1)]
    return SequenceLayout(tuple(len(cells) for cells in steps), tuple(cell for cells in steps for cell in cells))


class Diagonal(Generator):
    """spec: discrete tokens of one vocabulary on one full grid. depth, width, heads: of the trunk."""

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = diagonals(*spec.layout.sides[0])
        vocab_size, length = spec.parts[0].vocab_size, spec.layout.length
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.tokens = nn.Embedding(vocab_size, width)
        self.places = nn.Parameter(torch.empty(length, width))  # of the cell that is predicted
        self.trunk = Trunk(dim=width, depth=depth, heads=heads, hidden=4 * width, ffn="gelu", dropout=dropout)
        self.head = CategoricalHead(dim=width, vocab_size=vocab_size)
        own = {cell: i for i, cell in enumerate(self.layout.coords)}
        theirs = {cell: i for i, cell in enumerate(spec.layout.coords)}
        before = [(own.get((0, r - 1, c), length), own.get((0, r, c - 1), length)) for _, r, c in self.layout.coords]
        self.register_buffer("before", torch.tensor(before), persistent=False)  # [L, 2], L where there is none
        order = torch.tensor([theirs[cell] for cell in self.layout.coords])
        self.register_buffer("own_order", order, persistent=False)
        self.register_buffer("spec_order", order.argsort(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.linear.weight)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if not spec.discrete or len(spec.parts) != 1:
            raise ValueError("Diagonal predicts ids of one vocabulary; choose a tokenizer with one codebook")
        height, width = spec.layout.sides[0]
        if len(spec.layout.sides) != 1 or 1 in (height, width) or height * width != spec.layout.length:
            raise ValueError(f"Diagonal writes a full grid, but these tokens lie on {spec.layout.sides}")

    def arrange(self, tokens: Tensor) -> Canvas:
        return Canvas(tokens[:, self.own_order], self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        return canvas.tokens[:, self.spec_order]

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        a, b = self.layout.written(start, stop)
        tokens = canvas.tokens
        known = tokens @ self.tokens.weight if tokens.is_floating_point() else self.tokens(tokens)
        known = torch.cat([known, torch.zeros_like(known[:, :1])], dim=1)  # place L: there is no such neighbour
        x = self.places[a:b] + known[:, self.before[a:b]].sum(2) + cond.start  # [R, b - a, D]
        return Inputs(x, self.layout.ranks(start, stop, device=x.device), self.layout.pattern(start, stop))
