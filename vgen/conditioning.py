"""What a generator is conditioned on, and the rows that guidance compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# h [R, l, D] on entry to a block, and which token each of its positions predicts -> h
Edit = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Cond:
    """Conditions of R rows. R = streams * B, stream-major: all rows of the first stream, then of the next.

    start [R, 1, D]: what takes the place of the token before the first. prefix [R, P, D] or None: positions every token
    sees, such as a text's. vector [R, 1, D] or None: for modulation. at: block -> edit of h [R, l, D] on entry to that
    block, of the l positions that are read at a time (not those of the prefix), for spatial control; the blocks of two
    stacks (xAR, FlowAR, E-CAR, MAR) are counted through. An edit also gets int64 [l] or [R, l]: the token that each
    position predicts, by its place in the generator's layout or, where samples have orders of their own (RAR, MAR), in
    the tokenizer's; -1 for positions that predict none, or several.
    """

    start: Tensor
    prefix: Tensor | None = None
    vector: Tensor | None = None
    at: dict[int, Edit] = field(default_factory=dict)

    def first(self, rows: int) -> Cond:
        """The conditions of the first rows alone; not with edits, which may know all of them."""
        if self.at:
            raise ValueError("conditions with per-block edits are not taken apart")
        fields = {name: getattr(self, name) for name in ("start", "prefix", "vector")}
        return Cond(**{name: None if field is None else field[:rows] for name, field in fields.items()})

    @staticmethod
    def cat(streams: list[Cond]) -> Cond:
        """Stack streams (conditional first). All must have the same slots filled."""
        first = streams[0]
        if len(streams) == 1:
            return first

        def join(name: str) -> Tensor | None:
            values = [getattr(s, name) for s in streams]
            if any((v is None) != (values[0] is None) for v in values):
                raise ValueError(f"some streams fill `{name}` and others do not")
            return None if values[0] is None else torch.cat(values)

        blocks = sorted({block for s in streams for block in s.at})
        return Cond(join("start"), join("prefix"), join("vector"), {block: _each(streams, block) for block in blocks})

    def ahead(self, step: int) -> int:
        """How many positions of the prefix are read together with a step: all with the first."""
        return self.prefix.shape[1] if step == 0 and self.prefix is not None else 0


def _each(streams: list[Cond], block: int) -> Edit:
    """The edit of h that has each stream's own on its rows; a model may have several rows for one of the condition."""
    rows = [len(stream.start) for stream in streams]

    def change(h: Tensor, place: Tensor) -> Tensor:
        counts = [len(h) // sum(rows) * count for count in rows]
        places = place.split(counts) if place.dim() == 2 else [place] * len(rows)
        parts = zip(streams, h.split(counts), places)
        return torch.cat([s.at[block](part, own) if block in s.at else part for s, part, own in parts])

    return change


class ClassConditioner(nn.Module):
    """A table with one row a class and a last one for "no class" (classifier-free guidance, arXiv 2207.12598).

    num_classes = 0 makes an unconditional model: the null row alone. vector: also hand the row to modulation.
    """

    def __init__(self, *, num_classes: int, dim: int, vector: bool = False) -> None:
        super().__init__()
        self.num_classes, self.uses_vector = num_classes, vector
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Cond:
        """Labels int64 [R], num_classes meaning none; drop bool [R]: rows whose label is replaced by none."""
        if self.num_classes == 0:
            labels = torch.zeros_like(labels)
        elif drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        row = self.table(labels).unsqueeze(1)
        return Cond(row, vector=row if self.uses_vector else None)

    def null(self, rows: int) -> Cond:
        """The condition "no class" for that many rows."""
        return self(torch.full((rows,), self.num_classes, device=self.table.weight.device))
