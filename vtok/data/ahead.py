"""Batches that are encoded a step before they are asked for, beside the training step, on their own CUDA stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from vtok import counters
from vtok.data.module import keep_keys

Batch = Mapping[str, Tensor]


class Ahead:
    """A loader of `encode(batch)` for every batch of `loader`, on `device`.

    When a batch is handed out, the next one is already on its way: its images are copied and encoded on a second stream
    while the step that was given this one runs. Batches are the same, and in the same order, as in turn. On the CPU,
    where nothing runs beside, the work is only done earlier. encode must change no state: batches that were encoded and
    never asked for are thrown away at the end. Memory: one more batch of images and the encoder's activations, while a
    step has its own.
    """

    def __init__(self, loader: Iterable[Batch], encode: Callable[[Batch], Batch], device: torch.device) -> None:
        self.loader, self.encode, self.device = loader, encode, device

    def __iter__(self) -> Iterator[Batch]:
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self.device))  # which moved the encoder's weights
        waiting: tuple[Batch, torch.cuda.Event | None] | None = None
        for batch in self.loader:
            with torch.cuda.stream(side):
                made = self.encode(move_data_to_device(keep_keys(batch), self.device))
                done = None if side is None else side.record_event()
            counters.count("tokens.in_turn" if side is None else "tokens.ahead")
            if waiting is not None:
                yield self._given(*waiting)
            waiting = made, done
        if waiting is not None:
            yield self._given(*waiting)

    @property
    def _iterator(self) -> Any:
        """The loader's own, by which Lightning ends its workers after a fit."""
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.loader._iterator = value

    def _given(self, batch: Batch, done: torch.cuda.Event | None) -> Batch:
        """The batch for the current stream: that waits for it, and its memory is not reused before that has read it."""
        if done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)
        return batch
