"""What makes training and sampling faster or smaller without changing what is computed but for rounding: compiled
blocks, recomputed activations, light weights, memory that is used again; and how much of the hardware is used.

Model FLOPs utilisation (MFU, Chowdhery et al., PaLM, arXiv 2204.02311, appendix B): operations that the model needs,
6 a matmul parameter and token (2 forward, 4 backward) plus 12 D a block and pair of positions that see each other
(scores and values, forward and backward), over what the device could do. Projections of condition vectors count once a
vector: one an image, one a step (xAR) or one a position (RAR). Recomputation does not count as work, nor do positions
that only fill a shape up. What each family counts is its `Generator.operations`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from vtok.layers.block import Block
from vtok.layers.packed import can_halve, can_pack, halve_linears, pack_linears
from vtok.layers.trunk import Trunk
from vtok.layout import SequenceLayout
from vtok.low_bit import LowBit, quantize_weights

PEAKS = {  # dense bf16 operations a second, from the makers' data sheets; the first name that fits decides
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


SLOW_BF16 = (
    "note: this processor has no bf16 instructions, and bf16 is slower on it than float32 (measured: nine times); "
    "choose {}"
)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself, from Linux's /proc/cpuinfo; True where that cannot be read."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)  # the last one is Arm's


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Let this process use memory again that was freed, on the CPU; returns whether it can, which is where the C
    library is glibc.

    As it comes, a tensor above 32 MiB is memory that the system clears page by page while it is first written, every
    time anew: 15.6 ms for 33 MiB, of which writing takes 1.4. The process then holds on to its peak.
    """
    malloc = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if malloc is None:
        return False
    # none outside the heap, whose end is never given back; both answer 1 in glibc, and musl has no such function
    return bool(malloc(M_MMAP_MAX, 0) and malloc(M_TRIM_THRESHOLD, -1))


def compile_blocks(module: nn.Module, *, backend: str = "inductor") -> int:
    """Compile every transformer block in place, each as a whole (all share one graph, so that it is quick); returns how
    many. What cannot be traced, or is traced too often, is an error of its first pass, and no slow one.

    ValueError where the module has none, or where it lies on the CPU and there is no C++ compiler.
    """
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    if not blocks:
        raise ValueError(f"compile=true: {type(module).__name__} has no transformer blocks; leave compile=false")
    names = (os.environ.get("CXX"), "g++", "clang++")
    on_cpu = next(module.parameters()).device.type == "cpu"
    if backend == "inductor" and on_cpu and not any(shutil.which(name) for name in names if name):
        raise ValueError("compile=true on the CPU needs a C++ compiler: install g++ or clang++, or leave compile=false")
    # blocks differ in numbers that dynamo guards on (rates of stochastic depth), each its own graph, and FlexVAR's six
    # padded lengths may each be one more
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks) + 8)
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    return len(blocks)


def checkpoint_blocks(module: nn.Module) -> int:
    """Recompute the activations of all transformer blocks in the backward pass; returns how many stacks of them do so
    now: trunks, Q-Formers, pixel flows, whatever has an attribute `checkpointing`.

    ValueError where the module has none.
    """
    stacks = [m for m in module.modules() if hasattr(m, "checkpointing")]
    if not stacks:
        name = type(module).__name__
        raise ValueError(f"checkpointing=true: {name} has no transformer blocks; leave checkpointing=false")
    for stack in stacks:
        stack.checkpointing = True
    return len(stacks)


def light_weights(
    generator: nn.Module,
    dtype: torch.dtype,
    *,
    quant: LowBit | None = None,
    packed: bool | None = None,
    compiled: bool = False,
) -> None:
    """Store the weights of a generator for sampling, in place, on the device where it is going to run.

    dtype: of its trunk; quant: the trunk's linear layers in 8 bits (vtok/low_bit.py); packed: all linear layers in the
    order of the CPU's kernels (vtok/layers/packed.py), None wherever that can be had. In bfloat16 a softmax head's
    weights are then float16, for a float32 product: with packed layers, where a step is one position; with None on
    CUDA. compiled: its blocks through torch.compile, for two or three kinds of steps; in bfloat16 fewer results are
    rounded between the products then. ValueError where quant and packed=True meet, or one of them cannot be had.
    """
    if quant is not None and packed:
        raise ValueError(f"quant={quant} and packed=true exclude each other: choose one of them")
    generator.trunk.to(dtype)
    if quant is not None:
        quantize_weights(generator.trunk, quant)
    elif packed or (packed is None and can_pack(generator)):
        # a head of many rows, as next scale has, is bound by the rate of float32 products, whatever it reads
        pack_linears(generator, halved=dtype is torch.bfloat16 and can_halve() and generator.layout.single)
    elif packed is None and dtype is torch.bfloat16 and _on_cuda(generator):
        halve_linears(generator)
    if compiled:
        compile_blocks(generator)


def _on_cuda(module: nn.Module) -> bool:
    return any(p.is_cuda for p in module.parameters())


def pairs(layout: SequenceLayout) -> int:
    """Pairs (query, key) of positions that see each other."""
    total, before = 0, 0
    for step, reads in enumerate(layout.reads):
        ordered = bool(layout.causal and layout.causal[step])
        total += reads * before + (reads * (reads + 1) // 2 if ordered else reads * reads)
        before += reads
    return total


def matmul_parameters(trunk: Trunk) -> int:
    """Weights that every position is multiplied with: all projections of the blocks but those of a condition vector."""
    return sum(
        linear.weight.numel()
        for block in trunk.blocks
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear) and name != "modulation"
    )


def modulation_parameters(trunk: Trunk) -> int:
    """Weights that every condition vector is multiplied with."""
    layers = [block.modulation for block in trunk.blocks] + [trunk.shared, trunk.final]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def linear_parameters(module: nn.Module) -> int:
    """Weights of all linear layers inside."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def trunk_operations(trunk: Trunk, positions: float, seen: float, vectors: float = 0) -> float:
    """Operations of a trunk in training: 6 (matmul parameters x positions + modulation parameters x vectors)
    + 12 D depth x `seen`, the pairs that see each other."""
    dense = matmul_parameters(trunk) * positions + modulation_parameters(trunk) * vectors
    return 6.0 * dense + 12.0 * trunk.dim * len(trunk.blocks) * seen


def training_operations(module: nn.Module, key: Tensor | None = None) -> float | None:
    """Operations of a training step an image (`Generator.operations`): where they are drawn those of the samples key
    int64 [B], or without it on average. None where there is no closed form, as for tokenizers."""
    count = getattr(module, "operations", None)
    return None if count is None else count(key)


def peak_rate(device: torch.device) -> float | None:
    """Dense bf16 operations a second of this GPU by its name; None where we do not know it, and on the CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)


def utilisation(images_per_second: float, operations: float | None, peak: float | None, devices: int) -> float | None:
    """MFU in 0..1, None where a part of it is not known."""
    return None if operations is None or peak is None else images_per_second * operations / (peak * devices)
