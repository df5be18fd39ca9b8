"""DetailFlow's generator: coarse-to-fine 1D tokens, the first group one by one, then g at once (arXiv 2505.21473).

Position p predicts token p and reads the class, the first `first` tokens, g - 1 special tokens, then the token g places
back; positions of a group see each other. Rope on a grid with a row a group, by the place of what is read; the class
has the row of zeros. LlamaGen-L's trunk.

Self-correction: for 30 % of the samples the inputs hold a group with wrong tokens, and the targets what the tokenizer
says repairs the picture after it. Those rows need a tokenizer that re-encodes behind a given prefix: `OnlineTokens` of
vtok/data/codes.py makes them, as "corrupted" and "repaired" (train.py: corrections=true).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.models.grouped import Grouped, Plan, require_line
from vtok.layout import SequenceLayout
from vtok.tokenizer import TokenSpec


class DetailFlow(Grouped):
    """Published: L 24 x 1024, 16 heads, 8,192 codes, group 8, 326,140,928 parameters for 128, 256 or 512 tokens.

    group: 8 where None; first: a multiple of it, one group where None.
    """

    reads_also = ("corrupted",)

    @classmethod
    def plan(cls, spec: TokenSpec, *, group: int | Sequence[int] | None, first: int | None, start: str) -> Plan:
        group = 8 if group is None else group
        length, first = spec.layout.length, group if first is None else first
        if not isinstance(group, int) or start != "hybrid":
            raise ValueError(f"DetailFlow takes group as a number of tokens and start=hybrid, got {group}, {start}")
        if group < 1:
            raise ValueError(f"group={group}: a group has at least one token")
        if length % group or first % group or not 0 < first < length:
            raise ValueError(f"{length} tokens, first={first}: both must be multiples of group={group}")
        layout = SequenceLayout((1,) * first + (group,) * ((length - first) // group), spec.layout.coords)
        return Plan(layout, [(0, place // group, place % group) for place in range(length - 1)])

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        super().accepts(spec)
        require_line(spec, "DetailFlow")

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        if self.training and "corrupted" in batch:
            clean, wrong = batch["tokens"], batch["corrupted"]
            chosen = (wrong != clean).any(1, keepdim=True)
            context = torch.where(chosen, wrong, batch.get("context", clean))
            batch = {**batch, "tokens": batch["repaired"], "context": context}
        return super().loss(batch, progress=progress)
