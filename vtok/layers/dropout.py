"""Dropout that costs little on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.counters import count


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with a share p of its entries zero and the others divided by 1 - p.

    On the CPU four entries share one draw of 64 bits of PyTorch's generator, which draws one by one; p is rounded to
    1/65536 there.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        count("dropout.plain")
        return F.dropout(x, p)
    count("dropout.shared")
    dropped = min(round(p * 2**16), 2**16)
    if dropped == 2**16:
        return x * 0.0
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**16))


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
