"""What a benchmark's settings ask for, and whether it was taken: a fallback fails the benchmark.

The paths count themselves (vtok/counters.py). `Asked` says which must have been taken for a part of a benchmark and
which must not; what a family cannot do, whatever the settings, is not asked for. Which kernel PyTorch takes for
attention nothing counts: inside `fused` the slow one is an error.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vgen.cross_entropy import rows_of_a_piece
from vgen.generator import Generator
from vgen.heads import CategoricalHead
from vgen.heads_factorised import FactorisedHead
from vgen.models.hita import PartHead
from vtok import counters
from vtok.acceleration import keep_memory
from vtok.counters import STORED
from vtok.layers.attention import SPANNED, Attention
from vtok.layers.block import FeedForward
from vtok.layers.dropout import Dropout
from vtok.layers.linear import ROWS, Linear, long, slow_mkl, wide
from vtok.layers.packed import HalfLinear, PackedLinear
from vtok.layers.trunk import Trunk, pays
from vtok.low_bit import LowBit

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass
class Asked:
    """Names of vtok.counters.PATHS that must have been taken, and those that must not."""

    taken: set[str] = field(default_factory=set)
    never: set[str] = field(default_factory=set)

    def one_of(self, chosen: str, *others: str) -> None:
        self.taken.add(chosen)
        self.never.update(set(others) - {chosen})

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.taken | other.taken, self.never | other.never)

    def check(self, counts: Mapping[str, int], part: str) -> None:
        """ValueError, naming the paths, where the counts are not as asked."""
        missed = sorted(path for path in self.taken if not counts.get(path))
        strayed = sorted(path for path in self.never if counts.get(path))
        if missed or strayed:
            told = [f"not taken: {', '.join(missed)}"] if missed else []
            told += [f"taken instead: {', '.join(strayed)}"] if strayed else []
            raise ValueError(f"{part} fell back, so its time is none of this setting ({'; '.join(told)})")


def begin(device: torch.device) -> Asked:
    """Counts from 0; on the CPU this process keeps its memory from here on, and what has to be counted for that."""
    counters.reset()
    if device.type != "cpu":
        return Asked()
    if keep_memory():
        counters.count("memory.kept")
    return Asked({"memory.kept"} if platform.libc_ver()[0] == "glibc" else set())


def sampling(
    generator: Generator,
    *,
    dtype: torch.dtype,
    guided: bool,
    cuda_graphs: bool = False,
    packed: bool | None = None,
    quant: LowBit | None = None,
    compiled: bool = False,
) -> Asked:
    """For drawing tokens with weights stored in `dtype`, or in 8 bits. Inside compiled blocks nothing is counted."""
    asked = Asked()
    asked.one_of("rows.guided" if guided else "rows.single", "rows.guided", "rows.single")
    asked.one_of("step.cached" if generator.caches else "step.whole", "step.cached", "step.recomputed")
    inside = [m for m in generator.trunk.modules() if isinstance(m, Trunk)]
    apart = [m for m in generator.modules() if isinstance(m, Trunk) and m not in inside]
    if inside:
        asked.taken.add(f"weights.{quant}" if quant else STORED[dtype])
    if inside and not apart:  # a head's own transformer stays float32
        asked.never |= {"weights.bfloat16", "weights.float32", "weights.other"} - asked.taken
    if (
        inside
        and generator.caches
        and not _own_mask(generator)
        and all(_maskless(generator, k) for k in range(generator.layout.steps))
    ):
        asked.never.add("attention.mask")
    if generator.caches and generator.conditioner.uses_vector and generator.vectors == 1 and generator.layout.steps > 1:
        asked.taken.add("modulation.kept")
    if inside and compiled:
        asked.one_of("block.compiled", "block.plain")
    elif inside and getattr(generator, "cos", None) is not None and _plain(inside):
        asked.one_of("attention.turned", "attention.turned_apart")
    if cuda_graphs:
        asked.taken.add("graph.replayed")
    if not compiled and (packed or (packed is None and any(isinstance(m, PackedLinear) for m in generator.modules()))):
        asked.taken.add("linear.packed")
    if any(isinstance(m, HalfLinear) for m in generator.modules()):
        asked.taken.add("linear.half")
    return asked


def training(
    generator: Generator,
    *,
    key: Tensor,
    progress: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    prefixes: bool = False,
) -> Asked:
    """For a training step on whole sequences of the samples key int64 [B], at this share of training, under autocast
    to `dtype`; prefixes: as Trunk's."""
    asked = Asked()
    if compiled:
        asked.one_of("block.compiled", "block.plain")
    trunk, layout, length = generator.trunk, generator.layout, generator.trained_length(key, progress)
    if device.type == "cpu" and not compiled:
        asked.taken |= {path for m in generator.modules() for path in _drops(m)}
        asked.never.add("dropout.plain")
    float32_on_cpu = device.type == "cpu" and dtype == torch.float32 and not compiled
    weights = [m.weight for m in trunk.modules() if isinstance(m, Linear)] if float32_on_cpu and slow_mkl() else []
    rows = len(key) * length
    if rows >= ROWS and any(map(wide, weights)):
        asked.taken.add("linear.wide")
    if any(long(rows, weight) for weight in weights):
        asked.taken.add("linear.gradients")
    ways = {
        "loss.pieces" if len(key) * tokens > rows_of_a_piece(vocab_size) else "loss.whole"
        for tokens, vocab_size in _softmaxes(generator.head, length)
    }
    asked.taken |= ways
    asked.never |= {"loss.pieces", "loss.whole"} - ways
    if ways:
        rounded = device.type == "cuda" and dtype == torch.bfloat16
        asked.one_of("head.bfloat16" if rounded else "head.float32", "head.bfloat16", "head.float32")
    if not isinstance(trunk, Trunk) or not generator.caches or _own_mask(generator):
        return asked
    pattern = layout.pattern()
    if pattern in ("causal", "full"):
        asked.one_of(f"attention.{pattern}", "attention.mask")
    elif prefixes:
        asked.one_of("attention.prefixes", "attention.blocks", "attention.mask")
    elif device.type == "cpu" and length >= SPANNED:
        asked.one_of("attention.spans", "attention.mask")
    elif device.type == "cuda" and not trunk.attention_dropout:
        asked.one_of("attention.blocks", "attention.mask")
    elif device.type == "cuda" and pays(pattern) and length == layout.length:
        asked.one_of("attention.prefixes", "attention.blocks", "attention.mask")
    return asked


def encoding(tokenizer: nn.Module, *, dtype: torch.dtype) -> Asked:
    """For tokens of images: convolutions channels-last, where there are any, packed layers where it holds some, and on
    CUDA maps that stay bfloat16 between them."""
    return _images("encode", tokenizer, dtype, other="decoder")


def decoding(tokenizer: nn.Module, *, dtype: torch.dtype) -> Asked:
    """For images of tokens: so too."""
    return _images("decode", tokenizer, dtype, other="encoder")


def _images(part: str, tokenizer: nn.Module, dtype: torch.dtype, *, other: str) -> Asked:
    """other: the child that this part leaves alone; packed layers may all be in it (Open-MAGVIT2's decoder)."""
    asked, light = Asked(), dtype != torch.float32
    asked.one_of(f"{part}.bfloat16" if light else f"{part}.float32", f"{part}.bfloat16", f"{part}.float32")
    asked.never.add(f"{part}.channels_first")
    packed = [name for name, m in tokenizer.named_modules() if isinstance(m, PackedLinear)]
    if any(name.partition(".")[0] != other for name in packed):
        asked.taken.add("linear.packed")
    if dtype == torch.bfloat16:
        asked.never.add("norm.float32")
    return asked


def fused(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """In bfloat16 on CUDA, a context in which attention that no fused kernel takes raises RuntimeError."""
    return sdpa_kernel(FUSED) if device.type == "cuda" and dtype == torch.bfloat16 else nullcontext()


def _softmaxes(head: nn.Module, length: int) -> list[tuple[int, int]]:
    """(tokens an image, codes) of every cross-entropy of a training step; none for continuous tokens."""
    if isinstance(head, PartHead):
        return list(head.parts)
    if isinstance(head, FactorisedHead):
        return [(length, size) for size in head.factors]
    return [(length, head.vocab_size)] if isinstance(head, CategoricalHead) else []


def _drops(module: nn.Module) -> set[str]:
    """What a layer with dropout counts in training on the CPU."""
    if isinstance(module, Attention):
        return {"attention.dropped", "dropout.shared"} if module.dropout else set()
    rate = module.p if isinstance(module, Dropout) else module.dropout if isinstance(module, FeedForward) else 0
    return {"dropout.shared"} if rate else set()


def _own_mask(generator: Generator) -> bool:
    """Whether it sees what no rank can say: ARTM's levels see only the one before them."""
    return getattr(generator, "markov", False)


def _maskless(generator: Generator, k: int) -> bool:
    """Whether step k needs no mask against what the cache holds."""
    pattern = generator.layout.pattern(k, k + 1)
    return pattern == "full" or (k == 0 and pattern == "causal")


def _plain(trunks: list[Trunk]) -> bool:
    layers = [m for trunk in trunks for m in trunk.modules() if isinstance(m, Attention)]
    return all(layer.qk_norm == "none" for layer in layers)
