"""In which precision what must not be rough is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64 (`precision=64-true`)."""
    return x if x.dtype == torch.float64 else x.float()
