"""A head for vocabularies that are products: one softmax a sub-code, independent or each given those before it.

A token is F sub-codes, id = sum_f part_f * product(factors[:f]) (`Quantizer.split`), so 2^18 codes cost two tables of
512 rows. Independent sub-codes: ELM (arXiv 2410.16257), which samples them so. Depth-autoregressive ones: a small
transformer over the sub-codes of ONE token, started by the trunk's state, as in MAGVIT-v2's asymmetric factors as
Open-MAGVIT2 predicts them (arXiv 2409.04410) and in iFSQ's two-layer one. The sum over factors of log p is a
normalised likelihood of the id either way. Where ELM concatenates tables and projects, `FactorisedEmbedding` sums
them, which is the same family of functions (vgen/convert/elm.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.cross_entropy import linear_cross_entropy
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule, draw_ids
from vtok.acceleration import trunk_operations
from vtok.config import build, imported
from vtok.layers.trunk import Inputs, Trunk
from vtok.models import FAMILIES
from vtok.noise import SampleNoise
from vtok.quantize.factors import join, split


def check_factors(
    factors: Sequence[int] | Literal["auto"], vocab_size: int, quantizer: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Sizes of the sub-codes; ValueError unless each is at least 2 and their product is the vocabulary.

    "auto": those of the described quantizer of a TokenSpec; ValueError where it has one factor only.
    """
    if factors == "auto":
        factors = () if quantizer is None else build(quantizer, imported(FAMILIES, quantizer)).factors
        if len(factors) < 2:
            name = "none" if quantizer is None else quantizer["family"]
            raise ValueError(
                f"factors=auto takes the sub-codes of the tokenizer's quantizer, but quantizer {name} has none; set "
                "its groups (FSQ, LFQ), or list the factors"
            )
    sizes = tuple(int(f) for f in factors)
    if not sizes or min(sizes) < 2 or math.prod(sizes) != vocab_size:
        raise ValueError(f"factors={list(sizes)} multiply to {math.prod(sizes)}, the tokens have {vocab_size} codes")
    return sizes


def first_rows(factors: Sequence[int]) -> Tensor:
    """Where the rows of each sub-code begin in a table of all, int64 [F]."""
    return torch.tensor([sum(factors[:f]) for f in range(len(factors))])


class FactorisedEmbedding(nn.Module):
    """The sum of one table a sub-code, in one weight [sum(factors), D]."""

    def __init__(self, factors: Sequence[int], dim: int) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.weight = nn.Parameter(torch.empty(sum(self.factors), dim))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("start", first_rows(self.factors), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[.., D] of ids [..], or of F distributions side by side, float [.., sum(factors)]."""
        if tokens.is_floating_point():
            return tokens @ self.weight
        return F.embedding(split(tokens, self.factors) + self.start, self.weight).sum(-2)


class FactorisedHead(nn.Module):
    """F softmaxes over factors[f] sub-codes. Logits and losses are float32.

    depth: blocks of the transformer over a token's sub-codes; 0 makes them independent. heads: its attention heads.
    tied: that of iFSQ's code (Tencent-Hunyuan/iFSQ): it reads sub-codes by the tables that the trunk reads (`tokens`,
    kept here), places them by rope (`set_rope`) instead of a table, and its norm is the only final one. hidden: width
    of its feed-forward; dropout: in its blocks.
    """

    unpacked = ("linear",)  # one factor's rows are read at a time

    def __init__(
        self,
        *,
        dim: int,
        factors: Sequence[int],
        depth: int = 0,
        heads: int = 8,
        bias: bool = False,
        tied: bool = False,
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if tied and not depth:
            raise ValueError("tied sub-codes need a transformer over them: set factor_depth")
        self.factors = tuple(int(f) for f in factors)
        self.linear = nn.Linear(dim, sum(self.factors), bias=bias)
        self.trunk = self.embedding = self.place = self.tokens = None
        if depth:
            hidden = hidden or 64 * -(-int(8 * dim / 3) // 64)
            self.trunk = Trunk(dim=dim, depth=depth, heads=heads, hidden=hidden, dropout=dropout)
            self.register_buffer("start", first_rows(self.factors), persistent=False)
        if tied:
            self.tokens = FactorisedEmbedding(self.factors, dim)
        elif depth:
            self.embedding = nn.Parameter(torch.empty(sum(self.factors[:-1]), dim))
            self.place = nn.Parameter(torch.empty(len(self.factors), dim))
            for table in (self.embedding, self.place):
                nn.init.normal_(table, std=0.02)

    def set_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Tables [F, E / 2], a row a sub-code; not in the state dict."""
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def vocab_size(self) -> int:
        return math.prod(self.factors)

    def logits(self, h: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """One float32 [B, n, factors[f]] a factor, of h [B, n, D].

        ids [B, n]: the tokens whose first sub-codes the later ones are conditioned on; needed where depth > 0.
        """
        if self.trunk is None:
            return tuple(self._scores(h, f) for f in range(len(self.factors)))
        if ids is None:
            raise ValueError("sub-codes depend on each other here (depth > 0): pass ids")
        states = self._states(h, split(ids, self.factors)[..., :-1]).unbind(-2)
        return tuple(self._scores(state, f) for f, state in enumerate(states))

    def operations(self, tokens: int) -> float:
        """Operations of a training step of that many tokens (vtok/acceleration.py): a token passes the rows of every
        sub-code once, and the transformer over them F times."""
        count, rows = len(self.factors), 6.0 * self.linear.weight.numel() * tokens
        if self.trunk is None:
            return rows
        return rows + trunk_operations(self.trunk, tokens * count, tokens * count * (count + 1) / 2)

    def loss(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """Cross-entropy of whole tokens in nats, the sum over sub-codes, float32 [B, n]."""
        parts, total = split(target, self.factors), 0
        states = [h] * len(self.factors) if self.trunk is None else self._states(h, parts[..., :-1]).unbind(-2)
        for f, state in enumerate(states):
            total = total + linear_cross_entropy(state, *self._rows(f), parts[..., f])
        return total

    def log_prob(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        """log p(target), float32 [B, n]."""
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
        """Ids int64 [B, n] from h [S * B, n, D], stream-major. Factor f draws on noise stream f by the one rule."""
        parts: list[Tensor] = []
        for f in range(len(self.factors)):
            state = h
            if self.trunk is not None:
                given = torch.stack(parts, -1) if parts else h.new_zeros(*h.shape[:2], 0, dtype=torch.int64)
                given = given.repeat(guide.streams, 1, 1) if parts else given
                state = self._states(h, given)[..., -1, :]
            logits = guide(self._scores(state, f).unflatten(0, (guide.streams, -1)), progress)
            parts.append(draw_ids(logits, rule, noise, position, progress, stream=f))
        return join(torch.stack(parts, -1), self.factors)

    def _rows(self, f: int) -> tuple[Tensor, Tensor | None]:
        """Weight [factors[f], D] and bias of a sub-code."""
        a = sum(self.factors[:f])
        b = a + self.factors[f]
        return self.linear.weight[a:b], None if self.linear.bias is None else self.linear.bias[a:b]

    def _scores(self, h: Tensor, f: int) -> Tensor:
        weight, bias = self._rows(f)
        with torch.autocast(h.device.type, enabled=False):
            bias = None if bias is None else bias.float()
            return F.linear(h.float(), weight.float(), bias)

    def _states(self, h: Tensor, parts: Tensor) -> Tensor:
        """States [B, n, F', D] that predict sub-codes 0 .. F' - 1, given those before: parts int64 [B, n, F' - 1]."""
        table = self.embedding if self.tokens is None else self.tokens.weight
        known = F.embedding(parts + self.start[: parts.shape[-1]], table).to(h.dtype)
        x, position = torch.cat([h.unsqueeze(2), known], dim=2), None
        if self.tokens is None:
            x = x + self.place[: parts.shape[-1] + 1]
        else:
            position = (self.cos[: x.shape[2]], self.sin[: x.shape[2]], None)
        rank = torch.arange(x.shape[2], device=h.device)
        pattern = "full" if len(rank) == 1 else "causal"
        return self.trunk(Inputs(x.flatten(0, 1), rank, pattern, position)).unflatten(0, h.shape[:2]).to(h.dtype)
