"""A CUDA graph played by the CPU: the operations of a run, written down once and run again on the same tensors.

Like a graph it knows nothing of Python: numbers that came from the host stay what they were, results lie where they
lay. What a graph cannot hold fails here too: reading a tensor's value, and bringing numbers from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = {"aten._local_scalar_dense.default": "reads a value", "aten.lift_fresh.default": "brings numbers from the host"}
WAITS |= {"aten.nonzero.default": "has a result whose size is a value", "aten.equal.default": "reads a value"}


class Watch(TorchDispatchMode):
    """Calls `seen(operation, arguments, keywords, results)` after every operation; those in WAITS raise."""

    def __init__(self, seen: Callable[..., Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in WAITS:
            raise AssertionError(f"{function} {WAITS[str(function)]}: the device would be waited for")
        result = function(*args, **(kwargs or {}))
        self.seen(function, args, kwargs or {}, result)
        return result


class Tape:
    """As CudaCapture of vgen/samplers/graphs.py."""

    def warm(self, run: Callable[[], Any]) -> None:
        run()

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]:
        lines: list[tuple[Any, tuple, dict, list[Tensor | None]]] = []

        def write(function, args, kwargs, result):
            inputs = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
            fresh = [
                x if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs else None
                for x in tree_flatten(result)[0]
            ]  # views and operations in place need no copy: they share their argument's memory
            lines.append((function, args, kwargs, fresh))

        with Watch(write):
            run()

        def replay() -> None:
            for function, args, kwargs, fresh in lines:
                again = tree_flatten(function(*args, **kwargs))[0]
                for old, new in zip(fresh, again, strict=True):
                    if old is not None:
                        old.copy_(new)

        return replay
