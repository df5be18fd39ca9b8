"""LlamaGen: next-token prediction over a raster of image tokens with a Llama block (Sun et al., arXiv 2406.06525).

Position 0 reads the class, position p the token p - 1; position p predicts token p. Rope turns a position by the cell
of the token it READS; the class has a table row of zeros, so its query and key vanish and it is seen only through its
value (published checkpoints depend on it). Differs from the original: one projection for gate and value of the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.generator import Canvas, Generator
from vgen.heads import CategoricalHead
from vtok.layers.rope import rope_2d
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class LlamaGen(Generator):
    """Published sizes at 256 px: B 12 x 768, L 24 x 1024, XL 36 x 1280, XXL 48 x 1536, 3B 24 x 3200.

    spec: discrete tokens of one vocabulary on one grid. multiple_of: the feed-forward width is 8/3 of the width,
    rounded up to a multiple of it. token_dropout: on the embedded inputs; dropout: after attention and feed-forward.
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
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = SequenceLayout((1,) * spec.layout.length, spec.layout.coords)
        vocab_size = spec.parts[0].vocab_size
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.tokens = nn.Embedding(vocab_size, width)
        self.token_dropout = nn.Dropout(token_dropout)
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=multiple_of * -(-int(8 * width / 3) // multiple_of),
            dropout=dropout,
            attention_dropout=attention_dropout,
            checkpointing=checkpointing,
        )
        self.head = CategoricalHead(dim=width, vocab_size=vocab_size)
        _, rows, columns = torch.tensor(self.layout.coords[:-1] or [(0, 0, 0)]).unbind(1)
        tables = rope_2d(rows[: self.layout.length - 1], columns[: self.layout.length - 1], width // heads, theta)
        for name, table in zip(("cos", "sin"), tables):
            self.register_buffer(name, torch.cat([torch.zeros(1, table.shape[1]), table]), persistent=False)
        self._init()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if not spec.discrete:
            raise ValueError("LlamaGen predicts ids, but these tokens are continuous; choose a tokenizer with codes")
        if len(spec.parts) != 1:
            raise ValueError(f"LlamaGen has one vocabulary, but these tokens have {len(spec.parts)} parts")
        if len(spec.layout.sides) != 1:
            scales = len(spec.layout.sides)
            raise ValueError(f"LlamaGen's rope needs tokens on one grid, these lie on {scales} scales; try model=var_*")

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.linear.weight)

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        before = canvas.tokens[:, max(start - 1, 0) : stop - 1]
        x = self.embed(before)
        if start == 0:
            x = torch.cat([cond.start, x], dim=1)
        return Inputs(
            x=self.token_dropout(x),
            rank=canvas.layout.ranks(start, stop, device=x.device),
            pattern=canvas.layout.pattern(start, stop),
            position=(self.cos[start:stop], self.sin[start:stop], None),
            at=cond.at,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [R, n, D] of ids [R, n], or of distributions over the vocabulary [R, n, V]."""
        return tokens @ self.tokens.weight if tokens.is_floating_point() else self.tokens(tokens)
