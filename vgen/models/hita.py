"""Hita's generator: holistic query tokens first, then the grid, each with a vocabulary of its own (arXiv 2507.02358).

LlamaGen, except: two token tables, and a head whose first rows predict queries and whose last rows the grid. Positions
that predict a query get a learned vector added to q and k in every block and no rope; later ones turn by the cell they
read, and the one that reads the last query has the row of zeros. The loss is the sum of the two parts' means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.conditioning import Cond
from vgen.cross_entropy import linear_cross_entropy
from vgen.generator import Canvas
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule, draw_ids
from vgen.models.llamagen import LlamaGen
from vtok.layers.rope import rope_2d
from vtok.layers.trunk import Inputs
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec

LOWEST = torch.finfo(torch.float32).min


class PartHead(nn.Module):
    """One softmax a part of the sequence; which one a place has is known from the layout. Logits are float32.

    parts: (count, vocab_size) of each part, in the order of the sequence.
    """

    unpacked = ("linear",)  # one part's rows are read at a time

    def __init__(self, *, dim: int, parts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.length, self.widest = sum(n for n, _ in parts), max(v for _, v in parts)
        self.linear = nn.Linear(dim, sum(v for _, v in parts), bias=False)

    def logits(self, h: Tensor, start: int = 0) -> tuple[Tensor]:
        """float32 [.., n, V] of h [.., n, D] at places start..; V is the widest vocabulary, missing ids have the lowest
        float (not -inf: guidance subtracts logits, and -inf - -inf is NaN)."""
        stop, pieces, place, row = start + h.shape[-2], [], 0, 0
        assert stop <= self.length, f"places {start}..{stop - 1} of {self.length}"
        with torch.autocast(h.device.type, enabled=False):
            for count, size in self.parts:
                a, b = max(start, place), min(stop, place + count)
                if a < b:
                    weight = self.linear.weight[row : row + size].float()
                    logits = F.linear(h[..., a - start : b - start, :].float(), weight)
                    pieces.append(F.pad(logits, (0, self.widest - size), value=LOWEST))
                place, row = place + count, row + size
        return (torch.cat(pieces, dim=-2),)

    def operations(self, tokens: int) -> float:
        """Operations of a training step of the whole sequence (vtok/acceleration.py): a token passes its own part's."""
        assert tokens == self.length, f"{tokens} tokens, the parts have {self.length}"
        return 6.0 * self.linear.in_features * sum(count * size for count, size in self.parts)

    def loss(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """Cross-entropy in nats, float32 [B, L], of the whole sequence h [B, L, D] and ids [B, L]."""
        counts, vocab_sizes = zip(*self.parts)
        parts = zip(h.split(counts, 1), self.linear.weight.split(vocab_sizes), target.split(counts, 1))
        return torch.cat([linear_cross_entropy(x, weight, None, ids) for x, weight, ids in parts], dim=1)

    def log_prob(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """log p(target), float32 [B, L]."""
        return -self.loss(h, target, sizes)

    def draw(
        self,
        h: Tensor,
        sizes: Sequence[int],
        *,
        guide: Guidance,
        noise: SampleNoise,
        position: Tensor,
        rule: DrawRule,
        progress: Progress,
    ) -> Tensor:
        """Ids int64 [B, n] from h [S * B, n, D], stream-major; ids are local to their part."""
        logits = self.logits(h, round(progress.before * self.length))[0]
        return draw_ids(guide(logits.unflatten(0, (guide.streams, -1)), progress), rule, noise, position, progress)


class HitaGPT(LlamaGen):
    """Published: 128 queries and a 21 x 21 grid of 16,384 codes each; LlamaGen's sizes, and 2B: 48 x 1920, 32 heads.

    spec: two parts, queries and one full grid. last_query: the table that embeds the last query when it is read, its
    "own" as in training, or that of the "grid": the original's sampler does so by mistake, and its published numbers
    were drawn that way, so converted models have it. The other arguments are LlamaGen's.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        heads: int,
        width: int,
        depth: int,
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        label_drop: float = 0.1,
        theta: float = 10000.0,
        multiple_of: int = 256,
        checkpointing: bool = False,
        last_query: Literal["own", "grid"] = "own",
    ) -> None:
        if last_query not in ("own", "grid"):
            raise ValueError(f"last_query={last_query!r}: choose own or grid")
        shape = {"depth": depth, "width": width, "heads": heads, "multiple_of": multiple_of, "theta": theta}
        drops = {"dropout": dropout, "token_dropout": token_dropout, "attention_dropout": attention_dropout}
        drops |= {"label_drop": label_drop, "checkpointing": checkpointing}
        super().__init__(spec, num_classes, position="rope_1d", **shape, **drops)
        first, second = self.spec.parts
        self.count, self.last_query = first.count, last_query
        self.queries = nn.Embedding(first.vocab_size, width)
        self.tokens = nn.Embedding(second.vocab_size, width)
        self.query_positions = nn.Parameter(torch.empty(first.count, width))
        self.head = PartHead(dim=width, parts=[(part.count, part.vocab_size) for part in self.spec.parts])
        for table in (self.queries.weight, self.tokens.weight, self.query_positions):
            nn.init.normal_(table, std=0.02)
        nn.init.zeros_(self.head.linear.weight)
        _, rows, columns = torch.tensor(self.layout.coords[first.count : -1]).unbind(1)
        cos, sin = rope_2d(rows, columns, width // heads, theta)
        still = torch.ones(first.count, cos.shape[1]), torch.zeros(first.count, cos.shape[1])
        last_query = torch.zeros(1, cos.shape[1])
        self.set_rope(torch.cat([still[0], last_query, cos]), torch.cat([still[1], last_query, sin]))

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if not spec.discrete or len(spec.parts) != 2:
            count = len(spec.parts)
            have = f"have {count} part{'s'[: count - 1]}" if spec.discrete else "are continuous"
            raise ValueError(
                f"Hita writes queries, then a grid, so it needs two parts of ids, but these tokens {have}; "
                "try model=llamagen_*"
            )
        grid = spec.layout.coords[spec.parts[0].count :]
        sides = SequenceLayout((1,) * len(grid), grid).sides
        if len(sides) != 1 or sides[0][0] * sides[0][1] != len(grid):
            raise ValueError(f"Hita's second part must fill one grid, but its {len(grid)} tokens lie on {sides}")

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        a, b = max(start - 1, 0), stop - 1
        own = self.count - (self.last_query == "grid")
        before, cut = canvas.tokens[:, a:b], min(max(own - a, 0), b - a)
        queries, cells = before[:, :cut], before[:, cut:]
        if before.is_floating_point():
            parts = [queries @ self.queries.weight, cells @ self.tokens.weight]
        else:
            parts = [self.queries(queries), self.tokens(cells)]
        if start == 0:
            parts.insert(0, cond.start)
        inputs = self.read(torch.cat(parts, dim=1), cond, canvas.layout, start, stop)
        added = F.pad(self.query_positions[start:stop], (0, 0, 0, stop - max(start, min(self.count, stop))))
        return replace(inputs, position=(*inputs.position[:2], added))

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        canvas = self.arrange(batch["tokens"])
        context = self.arrange(batch["context"]) if "context" in batch else canvas
        h = self(context, self.conditioner(batch["label"], self.dropped(batch)))
        nats = self.head.loss(h, canvas.tokens, canvas.layout.sizes)
        means = nats[:, : self.count].mean(), nats[:, self.count :].mean()
        return {"loss": means[0] + means[1], "nats": nats.detach()}
