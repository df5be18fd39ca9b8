"""Maps of an image tokenizer that stay bfloat16 from one convolution to the next, on CUDA where no gradient is wanted.

Autocast takes norms and resampling in float32 there, and what follows them too, up to the next convolution: thrice the
bytes that encoding and decoding would move. On the CPU it does not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.counters import count


class Norm(nn.GroupNorm):
    """GroupNorm that gives bfloat16 for bfloat16 where `is_light`; its statistics are float32 either way."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_light(x):
            if x.is_cuda and not torch.is_grad_enabled() and torch.is_autocast_enabled("cuda"):
                count("norm.float32")
            return super().forward(x)
        count("norm.bfloat16")
        weights = [
            None if p is None else p.to(x.dtype) for p in (self.weight, self.bias)
        ]  # CUDA's kernel has one dtype
        with in_its_dtype(x):
            return F.group_norm(x, self.num_groups, *weights, self.eps)


def is_light(x: Tensor) -> bool:
    """Whether x is bfloat16 on CUDA that no gradient flows through."""
    return x.is_cuda and x.dtype is torch.bfloat16 and not torch.is_grad_enabled()


def in_its_dtype(x: Tensor) -> AbstractContextManager:
    """Outside autocast where `is_light`."""
    return torch.autocast(x.device.type, enabled=False) if is_light(x) else nullcontext()
