"""Linear layers that take the faster of two libraries for float32 products on the CPU.

PyTorch multiplies float32 with MKL there, whose x weight^T is slow for many outputs on AMD's processors with AVX2:
oneDNN's took 0.6 to 0.95 of its time for weights of 768 x 2304 to 1024 x 16384 and 64 to 2048 rows on two threads of an
EPYC, about the same for narrower ones, and more for small ones. The two products of the backward pass are MKL's:
oneDNN's are slower. Other processors were not measured and have MKL's; other dtypes, autocast and other devices have
one library.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.counters import count

WIDE, ROWS = 2**20, 64  # numbers of a weight, and rows of x, from which oneDNN's product is the faster


class WideProduct(torch.autograd.Function):
    """x weight^T + bias by oneDNN, with PyTorch's own products in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat, needed = gradient.flatten(0, -2), ctx.needs_input_grad
        of_x = gradient @ weight if needed[0] else None
        of_weight = flat.T @ x.flatten(0, -2) if needed[1] else None
        return of_x, of_weight, flat.sum(0) if needed[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias [.., out] of x [.., in], weight [out, in] and bias [out]."""
    if not faster(x, weight):
        return F.linear(x, weight, bias)
    count("linear.wide")
    return WideProduct.apply(x, weight, bias)


def faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product is the faster one."""
    if torch.compiler.is_compiling() or not wide(weight) or x.numel() < ROWS * weight.shape[1]:
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype is torch.float32 for t in (x, weight))
    return plain and x.is_cpu and weight.is_cpu and not torch.is_autocast_enabled("cpu") and slow_mkl()


def wide(weight: Tensor) -> bool:
    """Whether a weight [out, in] is of the kind that it is faster for."""
    return weight.shape[0] > weight.shape[1] and weight.numel() >= WIDE


@functools.cache
def slow_mkl() -> bool:
    """Whether the processor is one of AMD's with AVX2 and without AVX-512, and this build has oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class Linear(nn.Linear):
    """nn.Linear with this product, for layers with more outputs than inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
