"""Several quantisers in one sequence: each codes a run of tokens with a vocabulary of its own.

Hita (arXiv 2507.02358) puts 128 holistic tokens in front of those of the grid. Ids are local to their part. Where parts
have codes of different width, z and codes are as wide as the widest and the narrow ones end in zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.tokenizer import Part, Quantized, Quantizer


class PartsQuantizer(Quantizer):
    """quantizers: one a part, in the order of the sequence. counts: tokens of every part but the last, which takes the
    rest. Losses of one name are added; statistics carry the number of their part."""

    def __init__(self, *, quantizers: Sequence[Quantizer], counts: Sequence[int]) -> None:
        super().__init__()
        if len(counts) != len(quantizers) - 1 or any(count < 1 for count in counts):
            raise ValueError(f"counts={list(counts)} must be one positive number for each quantizer but the last")
        self.parts, self.counts = nn.ModuleList(quantizers), tuple(int(count) for count in counts)
        if any(part.width != part.channels or part.vocab_size is None for part in self.parts):
            raise ValueError("quantizers must be discrete and take vectors as wide as their codes")
        self.vocab_size = max(part.vocab_size for part in self.parts)
        self.channels = max(part.channels for part in self.parts)

    def spans(self, length: int) -> list[tuple[int, int]]:
        """(start, stop) of every part in a sequence of `length`. Raises ValueError where the last would be empty."""
        if length <= sum(self.counts):
            raise ValueError(f"{length} tokens leave none for the last part: counts={list(self.counts)}")
        ends = [0]
        for count in (*self.counts, length - sum(self.counts)):
            ends.append(ends[-1] + count)
        return list(pairwise(ends))

    def layout(self, length: int) -> tuple[Part, ...]:
        """Parts of a TokenSpec for sequences of `length`."""
        spans = self.spans(length)
        return tuple(Part(stop - start, p.vocab_size, p.channels) for (start, stop), p in zip(spans, self.parts))

    def split_parts(self, z: Tensor) -> list[Tensor]:
        """Runs [B, count, own channels] of z or codes [B, L, C]."""
        return [z[:, start:stop, : part.channels] for (start, stop), part in zip(self.spans(z.shape[1]), self.parts)]

    def join_parts(self, runs: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_parts`."""
        return torch.cat([F.pad(run, (0, self.channels - run.shape[-1])) for run in runs], 1)

    def forward(self, z: Tensor) -> Quantized:
        """z [B, L, C]."""
        found = [part(run) for part, run in zip(self.parts, self._runs(z))]
        loss: dict[str, Tensor] = {}
        for one in found:
            for name, value in one.loss.items():
                loss[name] = loss[name] + value if name in loss else value
        stats = {f"{name}_{i}": value for i, one in enumerate(found) for name, value in one.stats.items()}
        joined = self.join_parts([one.z for one in found])
        codes = self.join_parts([one.codes for one in found])
        return Quantized(joined, codes, torch.cat([one.ids for one in found], 1), loss, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        return torch.cat([part.indices(run) for part, run in zip(self.parts, self._runs(z))], 1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes [B, L, C] of whole sequences of ids [B, L]."""
        spans = self.spans(ids.shape[1])
        return self.join_parts([part.lookup(ids[:, a:b]) for (a, b), part in zip(spans, self.parts)])

    def _runs(self, z: Tensor) -> Iterator[Tensor]:
        if z.dim() != 3 or z.shape[-1] != self.channels:
            raise ValueError(f"z is {tuple(z.shape)}, expected [B, L, {self.channels}]")
        return iter(self.split_parts(z))
