"""LlamaGen: next-token prediction over a raster of image tokens with a Llama block (Sun et al., arXiv 2406.06525).

Position 0 reads the class, position p the token p - 1; position p predicts token p. Rope turns a position by the cell
of the token it READS; the class has a table row of zeros, so its query and key vanish and it is seen only through its
value (published checkpoints depend on it). Differs from the original: one projection for gate and value of the FFN.

The options are the papers that are LlamaGen but for one thing: `position` learned (GigaTok, arXiv 2504.08736; ReTok) or
rope_1d (D-AR, arXiv 2505.23660), and GigaTok's `modulation` and `qk_norm`, off in its published models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.generator import Canvas, Generator, require_ids
from vgen.heads import CategoricalHead
from vgen.heads_factorised import FactorisedEmbedding, FactorisedHead, check_factors
from vtok.layers.block import Modulation
from vtok.layers.dropout import Dropout
from vtok.layers.rope import rope_1d, rope_2d
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class LlamaGen(Generator):
    """Published sizes at 256 px: B 12 x 768, L 24 x 1024, XL 36 x 1280, XXL 48 x 1536, 3B 24 x 3200.

    spec: discrete tokens of one vocabulary on one grid. multiple_of: the feed-forward width is 8/3 of the width,
    rounded up to a multiple of it. token_dropout: on the embedded inputs; dropout: after attention and feed-forward.
    position: "rope_2d" as above; "rope_1d" turns by the place in the sequence, the class included; "learned" adds a
    table with a row a place (one more than is read, as published). modulation: adaptive norms conditioned on the class
    as it is read, by one projection a block ("own") or in all ("shared"). qk_norm: "layer" norms queries and keys.
    factors: sizes of sub-codes whose product is the vocabulary (vgen/heads_factorised.py), "auto" for those that the
    tokenizer's quantizer was given (groups), predicted independently, or one after another by a transformer of
    factor_depth blocks; factor_tied: that transformer shares tables and final norm with the trunk, as in iFSQ's code.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        multiple_of: int = 256,
        theta: float = 10000.0,
        token_dropout: float = 0.1,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        label_drop: float = 0.1,
        checkpointing: bool = False,
        position: Literal["rope_2d", "rope_1d", "learned"] = "rope_2d",
        modulation: Modulation = "none",
        qk_norm: Literal["none", "layer"] = "none",
        factors: Sequence[int] | Literal["auto"] | None = None,
        factor_depth: int = 0,
        factor_tied: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if position not in ("rope_2d", "rope_1d", "learned"):
            raise ValueError(f"position={position!r}: choose rope_2d, rope_1d or learned")
        if position == "rope_2d" and len(spec.layout.sides) != 1:
            raise ValueError(
                f"LlamaGen's rope needs tokens on one grid, these lie on {len(spec.layout.sides)} scales of one row; "
                "choose model.position=rope_1d or learned"
            )
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = SequenceLayout((1,) * spec.layout.length, spec.layout.coords)
        vocab_size = spec.parts[0].vocab_size
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        sizes = None if factors is None else check_factors(factors, vocab_size, spec.quantizer)
        self.tokens = FactorisedEmbedding(sizes, width) if sizes else nn.Embedding(vocab_size, width)
        plain = position == "rope_2d" and modulation == "none"
        if factor_tied and not (plain and sizes and len(sizes) <= spec.layout.length):
            raise ValueError("factor_tied needs factors (no more than tokens), position=rope_2d and modulation=none")
        hidden = multiple_of * -(-int(8 * width / 3) // multiple_of)
        self.token_dropout = Dropout(token_dropout)
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=hidden,
            dropout=dropout,
            attention_dropout=attention_dropout,
            checkpointing=checkpointing,
            modulation=modulation,
            modulated_affine="all" if modulation != "none" else "none",
            qk_norm=qk_norm,
            final_norm=not factor_tied,
        )
        self.head = CategoricalHead(dim=width, vocab_size=vocab_size)
        if sizes:
            tied = {"tied": True, "hidden": hidden, "dropout": dropout} if factor_tied else {}
            self.head = FactorisedHead(dim=width, factors=sizes, depth=factor_depth, heads=heads, **tied)
        if factor_tied:
            self.tokens = None  # the head has it
        self.theta, self.modulated = theta, modulation != "none"
        self.positions = nn.Parameter(torch.empty(self.layout.length + 1, width)) if position == "learned" else None
        self.cos = self.sin = None
        if position == "rope_2d":
            self.turn_by_cells(self.layout.coords[: self.layout.length - 1])
        elif position == "rope_1d":
            self.set_rope(*rope_1d(torch.arange(self.layout.length), width // heads, theta))
        if factor_tied:  # sub-code f is turned as the trunk's position f is
            self.head.set_rope(self.cos[: len(sizes)], self.sin[: len(sizes)])
        self._init()

    def turn_by_cells(self, cells: Sequence[tuple[int, int, int]]) -> None:
        """Rope by the (scale, row, column) of what positions 1.. read; position 0, the class, gets the row of zeros."""
        _, rows, columns = torch.tensor(cells or [(0, 0, 0)]).unbind(1)
        tables = rope_2d(rows[: len(cells)], columns[: len(cells)], self.trunk.dim // self.trunk.heads, self.theta)
        self.set_rope(*(torch.cat([torch.zeros(1, table.shape[1]), table]) for table in tables))

    def set_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Tables [l, E / 2], one row a trunk position; not in the state dict."""
        del self.cos, self.sin
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_ids(spec, cls.__name__)
        if len(spec.layout.sides) != 1 and any(height > 1 for height, _ in spec.layout.sides):
            scales = len(spec.layout.sides)
            raise ValueError(f"LlamaGen's rope needs tokens on one grid, these lie on {scales} scales; try model=var_*")

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.linear.weight)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=self.trunk.dim**-0.5)
        if self.modulated:  # every branch starts closed: adaLN-zero
            layers = [block.modulation for block in self.trunk.blocks] + [self.trunk.shared, self.trunk.final]
            for layer in layers:
                if layer is not None:
                    nn.init.zeros_(layer.weight)

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        before = canvas.tokens[:, max(start - 1, 0) : stop - 1]
        x = self.embed(before)
        if start == 0:
            x = torch.cat([cond.start, x], dim=1)
        return self.read(x, cond, canvas.layout, start, stop)

    def read(self, x: Tensor, cond: Cond, layout: SequenceLayout, start: int, stop: int) -> Inputs:
        """The embedded positions of steps start..stop-1, x [R, l, D], with what says where they stand."""
        a, b = layout.read(start, stop)
        vector = cond.start if self.modulated else None
        if self.positions is not None:
            x = x + self.positions[a:b]
            vector = None if vector is None else vector + self.positions[:1]
        return Inputs(
            x=self.token_dropout(x),
            rank=layout.ranks(start, stop, device=x.device),
            pattern=layout.pattern(start, stop),
            position=None if self.cos is None else (self.cos[a:b], self.sin[a:b], None),
            vector=vector,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [R, n, D] of ids [R, n], or of distributions over the vocabulary [R, n, V] (with factors: those
        of the sub-codes, side by side)."""
        table = self.tokens if self.tokens is not None else self.head.tokens
        return tokens @ table.weight if tokens.is_floating_point() else table(tokens)
