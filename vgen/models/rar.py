"""RAR: next-token prediction in random orders that anneal to the raster (Yu et al., arXiv 2411.00776).

Each training sample goes through its own permutation with probability r and through the raster otherwise; r falls
from 1 to 0 while training goes on. A position is told where its token stands and, by a second "target-aware" table,
where the token that it predicts will stand; the modulation of a position is the class plus a row for its
place in the sequence. Two positions are read in the first step, a learned start and the class; the second predicts.

Differs from the original: orders are keyed by the sample; the class has a table of its own; dropout in the feed-
forward stands behind its second projection only. Unused rows of the published tables are kept: files and counts fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.generator import Canvas, Generator, require_ids
from vgen.heads import CategoricalHead
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec

ORDER_STREAM, COIN_STREAM = 7101, 7102
SPARE, SPARE_STEPS = 1024, 100  # rows of the position and step tables beyond the tokens, as published


class RAR(Generator):
    """Published: B 24 blocks of 768 / 3072, L 24 of 1024 / 4096, XL 32 of 1280 / 5120, XXL 40 of 1408 / 6144; 16 heads.

    spec: discrete tokens of one vocabulary, in any layout. hidden: width of the feed-forward. anneal: shares of
    training between which the probability of a random order falls from 1 to 0; (0, 0): the tokenizer's order alone.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        hidden: int | None = None,
        anneal: Sequence[float] = (0.5, 0.75),
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if len(anneal) != 2 or not 0 <= anneal[0] <= anneal[1] <= 1:
            raise ValueError(f"anneal={list(anneal)}: two shares of training, 0 <= start <= end <= 1")
        self.spec, self.num_classes, self.label_drop, self.anneal = spec, num_classes, label_drop, tuple(anneal)
        length, vocab_size = spec.layout.length, spec.parts[0].vocab_size
        first = (True,) + (False,) * (length - 1)
        self.layout = SequenceLayout((1,) * length, spec.layout.coords, (2,) + (1,) * (length - 1), first)
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width, vector=True)
        self.tokens = nn.Embedding(vocab_size + 1, width)  # the last row, a mask token, is never read
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(length + SPARE, width))  # start, class, then the cells
        self.targets = nn.Parameter(torch.empty(length + SPARE, width))
        self.places = nn.Parameter(torch.empty(length + SPARE_STEPS, width))
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=hidden or 4 * width,
            norm="layer",
            eps=1e-6,
            ffn="gelu",
            bias="qkv",
            qk_norm="layer",
            modulation="own",
            modulated_affine="blocks",
            dropout=dropout,
            attention_dropout=attention_dropout,
            checkpointing=checkpointing,
        )
        self.head = CategoricalHead(dim=width, vocab_size=vocab_size, bias=True)
        self._init()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_ids(spec, "RAR", "; try model=hita_*")

    @property
    def vectors(self) -> int:
        """A vector a position: class and place."""
        return sum(self.layout.reads)

    def undecayed(self) -> list[nn.Parameter]:
        """All embeddings and the modulation before the head, as published; those of the blocks and the start decay."""
        tables = [self.tokens.weight, self.conditioner.table.weight, self.positions, self.targets, self.places]
        return [*tables, self.trunk.final.weight]

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.positions, self.targets, self.places):
            nn.init.trunc_normal_(table, std=0.02)
        for layer in [block.modulation for block in self.trunk.blocks] + [self.trunk.final]:
            nn.init.zeros_(layer.weight)  # adaLN-zero: every block starts as the identity

    def arrange(self, tokens: Tensor, order: Tensor | None = None) -> Canvas:
        """The canvas of tokens [B, L] or [B, L, V]; place i holds token order[:, i], int64 [B, L], or token i."""
        if order is None:
            return Canvas(tokens, self.layout)
        index = order if tokens.dim() == 2 else order.unsqueeze(-1).expand_as(tokens)
        return Canvas(tokens.gather(1, index), self.layout, order)

    def restore(self, canvas: Canvas) -> Tensor:
        if canvas.order is None:
            return canvas.tokens
        return canvas.tokens.gather(1, canvas.order.argsort(1))

    def arrange_batch(self, tokens: Tensor, batch: Mapping[str, Any], progress: float) -> Canvas:
        if not self.training or self.random_share(progress) == 0:
            return self.arrange(tokens)
        return self.arrange(tokens, self.orders(batch["key"], progress))

    def random_share(self, progress: float) -> float:
        """r, the probability of a random order, at this share of training."""
        start, end = self.anneal
        return 1.0 if progress < start else 0.0 if progress >= end else (end - progress) / (end - start)

    def orders(self, key: Tensor, progress: float) -> Tensor:
        """Orders int64 [B, L] of samples with key int64 [B]: a pure function of key, whatever the batch."""
        noise, places = SampleNoise(key), torch.arange(self.layout.length, device=key.device)
        random = noise.uniform(places, ORDER_STREAM).argsort(dim=1, stable=True)
        shuffled = noise.uniform(places[:1], COIN_STREAM) <= self.random_share(progress)
        return torch.where(shuffled, random, places)

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        a, b = canvas.layout.read(start, stop)
        rows = len(cond.start)
        before = canvas.tokens[:, max(start - 1, 0) : stop - 1]
        x = before @ self.tokens.weight[:-1] if before.is_floating_point() else self.tokens(before)
        if start == 0:
            x = torch.cat([self.start.expand(rows, -1, -1), cond.start, x], dim=1)
        order = torch.arange(canvas.layout.length, device=x.device)[None] if canvas.order is None else canvas.order
        prefix = torch.arange(-2, 0, device=x.device).expand(len(order), -1)
        cells = torch.cat([prefix, order], dim=1)[:, a : b + 1] + 2  # of every position read, and of the next one
        x = x + self.positions[cells[:, :-1]]
        target = self.targets[cells[:, 1:]]
        if start == 0:
            target = torch.cat([torch.zeros_like(target[:, :1]), target[:, 1:]], dim=1)
        return Inputs(
            x=x + target,
            rank=canvas.layout.ranks(start, stop, device=x.device),
            pattern=canvas.layout.pattern(start, stop),
            vector=cond.vector + self.places[a:b],
            read=torch.arange(1, b, device=x.device) if start == 0 else None,
        )
