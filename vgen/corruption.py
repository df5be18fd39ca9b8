"""Wrong tokens in the inputs of training, right ones in the targets: a generator that meets its own mistakes learns to
go on from them.

Three kinds, one interface, for every family (`Generator.loss` takes them as batch["context"]): random codes with a
fixed rate (VA-pi; an option of NBP, arXiv 2502.07737), one of the nearest codes (DetailFlow's first step, arXiv
2505.21473), and noise on the code vectors, taken to the nearest code again; continuous tokens take the noise as it is,
as in xAR's noisy context (arXiv 2502.20388). Families that noise their own inputs (xAR, E-CAR, Transition Matching)
noise the wrong tokens in the place of the right ones. Draws are keyed by the sample. The rates are ours: none is
published for all of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vtok.noise import SampleNoise
from vtok.quantize.codebook import nearest
from vtok.quantize.parts import PartsQuantizer
from vtok.tokenizer import Quantizer, TokenSpec

COIN_STREAM, CODE_STREAM, NOISE_STREAM = 7601, 7602, 7603  # no family draws from these
LARGEST = 2**16  # codes whose distances are worth a table


class Corruption:
    """Replaces tokens of a batch's context.

    kind: "random", "near" (one of the `near` nearest codes, uniformly) or "noise" (`sigma`, in standard deviations of
    the codes; of unit latents where tokens are continuous). rate: share of tokens replaced. spec, quantizer: of the
    tokenizer. Raises ValueError where a kind does not exist for these tokens.
    """

    def __init__(
        self,
        spec: TokenSpec,
        quantizer: Quantizer | None,
        *,
        kind: Literal["random", "near", "noise"],
        rate: float = 0.1,
        near: int = 50,
        sigma: float = 0.5,
    ) -> None:
        if kind not in ("random", "near", "noise"):
            raise ValueError(f"corruption.kind={kind!r}: choose random, near or noise")
        if not 0 < rate <= 1 or near < 1 or sigma <= 0:
            raise ValueError(f"corruption.rate in (0, 1], near >= 1, sigma > 0, got {rate}, {near}, {sigma}")
        if kind == "near" and not spec.discrete:
            raise ValueError("corruption.kind=near needs codes, these tokens are continuous: choose noise or random")
        self.spec, self.kind, self.rate, self.near, self.sigma = spec, kind, rate, near, sigma
        self.spans: list[tuple[int, int]] = []
        for part in spec.parts:
            start = self.spans[-1][1] if self.spans else 0
            self.spans.append((start, start + part.count))
        self.tables = self._tables(quantizer) if spec.discrete and kind != "random" else []
        self.neighbours = [_neighbours(table, near) for table in self.tables] if kind == "near" else []

    def _tables(self, quantizer: Quantizer | None) -> list[Tensor]:
        """Code vectors [V, C] of every part."""
        largest = max(part.vocab_size for part in self.spec.parts)
        if quantizer is None:
            raise ValueError(f"corruption.kind={self.kind} compares codes, and this tokenizer has none: use random")
        if largest > LARGEST:
            raise ValueError(f"corruption.kind={self.kind} compares codes: {largest} of them are too many, use random")
        parts = quantizer.parts if isinstance(quantizer, PartsQuantizer) else [quantizer]
        sizes = [part.vocab_size for part in self.spec.parts]
        device = next((t.device for t in [*quantizer.parameters(), *quantizer.buffers()]), torch.device("cpu"))
        with torch.no_grad():
            return [q.lookup(torch.arange(v, device=device)[None])[0].float() for q, v in zip(parts, sizes)]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with "context": its "tokens" [B, L] or [B, L, C], some of them replaced; "key" int64 [B]."""
        tokens, noise = batch.get("context", batch["tokens"]), SampleNoise(batch["key"])
        place = torch.arange(tokens.shape[1], device=tokens.device)
        wrong = noise.uniform(place, COIN_STREAM) <= self.rate
        if not self.spec.discrete:
            drawn = noise.normal(place, tokens.shape[2], NOISE_STREAM)
            drawn = drawn if self.kind == "random" else tokens + self.sigma * drawn
            return {**batch, "context": torch.where(wrong[..., None], drawn.to(tokens.dtype), tokens)}
        parts = [self._replaced(tokens[:, a:b], place[a:b], noise, i) for i, (a, b) in enumerate(self.spans)]
        return {**batch, "context": torch.where(wrong, torch.cat(parts, dim=1), tokens)}

    def _replaced(self, ids: Tensor, place: Tensor, noise: SampleNoise, part: int) -> Tensor:
        """Another code for each of ids [B, n]."""
        if self.kind == "noise":
            table = placed(self.tables, part, ids.device)
            drawn = noise.normal(place, table.shape[1], NOISE_STREAM)
            moved = table[ids] + self.sigma * table.std(dim=0).mean() * drawn
            return nearest(moved.flatten(0, 1), table).view_as(ids)
        share = noise.uniform(place, CODE_STREAM).double().clamp(max=1 - 1e-9)
        if self.kind == "random":
            return (share * self.spec.parts[part].vocab_size).long()
        choices = placed(self.neighbours, part, ids.device)
        return choices[ids].gather(-1, (share * choices.shape[1]).long().unsqueeze(-1)).squeeze(-1)


def placed(tables: list[Tensor], part: int, device: torch.device) -> Tensor:
    """One of the tables on that device; kept there, since every copy would be waited for."""
    tables[part] = tables[part].to(device)
    return tables[part]


def _neighbours(table: Tensor, count: int) -> Tensor:
    """Ids int64 [V, count] of the codes nearest to each, itself left out."""
    count = min(count, len(table) - 1)
    found = []
    for start in range(0, len(table), 1024):
        distance = torch.cdist(table[start : start + 1024], table)
        rows = torch.arange(len(distance), device=table.device)
        distance[rows, rows + start] = torch.inf
        found.append(distance.topk(count, largest=False).indices)
    return torch.cat(found)
