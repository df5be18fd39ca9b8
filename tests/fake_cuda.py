"""A GPU that is not there: fake tensors that say they lie on CUDA, with shapes and dtypes but no values.

Code takes its ways for CUDA. What would wait for the device fails: reading a value, or a size that is a value, in torch
itself; numbers that come from the host, in `Arrivals`, since a copy of ordinary memory waits too. Backward passes of
such tensors need a real GPU: tape.Watch watches them on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Arrivals(TorchDispatchMode):
    """Operations on tensors of both host and device raise; a number of the host (no dimension) may be computed with."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        devices = {x.device.type for x in tensors if x.dim() or copies}
        if len(devices) > 1:
            raise AssertionError(f"{function} copies between host and device: the device would be waited for")
        return result


@contextmanager
def autocast_on_cuda() -> Iterator[None]:
    """Inside, torch.autocast("cuda") to bfloat16 acts on fake tensors; elsewhere it looks for a GPU first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        yield


@contextmanager
def fake_cuda(module: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside, parameters and buffers of the module, which is of no use afterwards, and the tensors of the batch that it
    gives are fake ones on CUDA."""
    known: dict[int, Tensor] = {}  # shared parameters stay shared

    def fake(x: Tensor) -> Tensor:
        if id(x) not in known:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            known[id(x)] = nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made
        return known[id(x)]

    with FakeTensorMode():
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                table.update({name: fake(x) for name, x in table.items() if x is not None})
        yield {name: fake(x) if isinstance(x, Tensor) else x for name, x in batch.items()}
