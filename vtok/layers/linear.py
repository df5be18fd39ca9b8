"""Linear layers that take the fastest of three libraries for float32 products on the CPU.

PyTorch multiplies float32 with MKL there, which is slow on AMD's processors with AVX2. On two threads of an EPYC, and
for large weights:

- x weight^T of many outputs: oneDNN's took 0.6 to 0.95 of MKL's time, for weights of 768 x 2304 to 1024 x 16384 and 64
  to 2048 rows; about as much for narrower weights, and more for small ones;
- the two products of the backward pass: those of the OpenBLAS that numpy brings took 0.7 to 0.85 for the same weights
  and 256 to 1360 rows.

OpenBLAS is called from threads of our own, each with its rows, since its threads and PyTorch's wait for work by
spinning and would take the cores from one another. PyTorch's still spin for a moment when a product begins: on several
threads only long ones gain (the blocks of VAR-d16 do, those of LlamaGen-B do not). Other processors were not
measured and have MKL's; other dtypes, autocast and other devices have one library.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from vtok.counters import count

WIDE, ROWS = 2**20, 64  # numbers of a weight, and rows of x, from which oneDNN's product is the faster
ALONE, SHARED = 2**28, 2 * 10**9  # multiply-adds from which OpenBLAS's gradients are: on one thread, each of several


class Product(torch.autograd.Function):
    """x weight^T + bias, by oneDNN if `wide`; gradients by OpenBLAS where that is faster, else by PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        if wide:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, flat, needed = x.flatten(0, -2), gradient.flatten(0, -2), ctx.needs_input_grad
        times = torch.matmul
        if not torch.is_grad_enabled() and long(len(rows), weight):
            count("linear.gradients")
            times = multiply
        of_x = times(flat, weight).view(x.shape) if needed[0] else None
        of_weight = times(flat.T, rows) if needed[1] else None
        return of_x, of_weight, flat.sum(0) if needed[2] else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias [.., out] of x [.., in], weight [out, in] and bias [out]."""
    if not plain(x, weight):
        return F.linear(x, weight, bias)
    by_onednn = wide(weight)
    if by_onednn:
        count("linear.wide")
    elif not (torch.is_grad_enabled() and long(x.numel() // x.shape[-1], weight)):
        return F.linear(x, weight, bias)
    return Product.apply(x, weight, bias, by_onednn)


def plain(x: Tensor, weight: Tensor) -> bool:
    """Whether these are of the kind and size that another library may be faster for."""
    if torch.compiler.is_compiling() or weight.numel() < WIDE or x.numel() < ROWS * weight.shape[1]:
        return False
    here = all(type(t) in (Tensor, nn.Parameter) and t.dtype is torch.float32 and t.is_cpu for t in (x, weight))
    return here and not torch.is_autocast_enabled("cpu") and slow_mkl()


def wide(weight: Tensor) -> bool:
    """Whether a weight [out, in] is of the kind that oneDNN is faster for."""
    return weight.shape[0] > weight.shape[1] and weight.numel() >= WIDE


def long(rows: int, weight: Tensor) -> bool:
    """Whether OpenBLAS is faster for the gradients of so many rows times this weight [out, in]."""
    threads = torch.get_num_threads()
    least = ALONE if threads == 1 else threads * SHARED
    return weight.numel() >= WIDE and rows * weight.numel() >= least and open_blas() is not None


@functools.cache
def slow_mkl() -> bool:
    """Whether the processor is one of AMD's with AVX2 and without AVX-512, and this build has oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def open_blas() -> ThreadpoolController | None:
    """What sets the number of threads of numpy's OpenBLAS; None where numpy has another library."""
    found = ThreadpoolController().select(internal_api="openblas")
    return found if len(found) else None


@functools.cache
def helpers(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads beside the caller's; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="product")


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b by OpenBLAS, float32 [n, m] of a [n, k], which may be a transpose, and b [k, m]; without gradients. As many
    threads as PyTorch's share the rows of a."""
    made = torch.empty(len(a), b.shape[1])
    left, right, out = a.detach().numpy(), b.detach().numpy(), made.numpy()
    threads = torch.get_num_threads()
    first, *shares = (slice(len(a) * i // threads, len(a) * (i + 1) // threads) for i in range(threads))
    with open_blas().limit(limits=1):
        pool = helpers(os.getpid(), threads - 1) if shares else None
        others = [pool.submit(np.matmul, left[share], right, out=out[share]) for share in shares]
        np.matmul(left[first], right, out=out[first])
        for other in others:
            other.result()
    return made


class Linear(nn.Linear):
    """nn.Linear with this product, for large layers."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
