"""How many bytes the tensors made inside a block hold at once at most, counted tensor by tensor.

Unlike the process's size it is exact, the same on every machine, and knows no allocator; a kernel's own scratch memory
is not seen.

    with Memory() as memory:
        model.loss(batch)["loss"].backward()
    print(memory.peak)
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Memory(TorchDispatchMode):
    """peak: the most bytes at once; now: those held still; largest: of the largest single tensor. What was there before
    the block counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = self.largest = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), 0)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._made(tensor)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:  # a view, or an operation in place
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size
