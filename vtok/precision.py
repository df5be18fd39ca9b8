"""In which precision what must not be rough is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64 (`precision=64-true`)."""
    return x if x.dtype == torch.float64 else x.float()


def summed_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b, float32, of matrices in bfloat16 or float16: their products are exact in it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
