"""Which way was taken: fast paths, and the slower ones beside them, count themselves whenever they run.

A benchmark resets the counts, runs, and fails where a path that its settings ask for was not taken (eval/paths.py), so
that a fallback never passes as a measurement. Counting is a dictionary increment outside of compiled code and of
captured graphs, whose replays count as such; it changes nothing that is computed.
"""

from __future__ import annotations

import torch

PATHS = {
    "attention.dropped": "attention whose weights are dropped in plain products, since no kernel drops (CPU, training)",
    "attention.full": "a trunk's pass without a mask: every key is seen",
    "attention.causal": "a trunk's pass with the kernel's own causal rule",
    "attention.blocks": "a trunk's pass on FlexAttention with a block mask (CUDA, training)",
    "attention.prefixes": "a trunk's pass with a call a step on all up to its end, and no mask",
    "attention.mask": "a trunk's pass with a mask in memory, bool [.., q, k]",
    "attention.spans": "a trunk's pass with a few calls on all up to their end, masked where they have many steps",
    "attention.turned": "one rotation of queries and keys together",
    "attention.turned_apart": "two rotations, since queries and keys are normed one by one",
    "block.compiled": "a trunk's pass through blocks that are to be compiled",
    "block.plain": "a block that was to be compiled and ran as it is",
    "block.recomputed": "a trunk's pass whose activations are recomputed",
    "decode.bfloat16": "image decoding in bfloat16",
    "decode.channels_first": "image decoding of which a convolution did not give channels-last results",
    "decode.channels_last": "image decoding whose convolutions all gave channels-last results",
    "decode.float32": "image decoding in float32, as stored",
    "dropout.plain": "dropout by PyTorch's kernel",
    "dropout.shared": "dropout of four entries a draw (CPU)",
    "encode.bfloat16": "image encoding in bfloat16",
    "encode.channels_first": "image encoding of which a convolution did not give channels-last results",
    "encode.channels_last": "image encoding whose convolutions all gave channels-last results",
    "encode.float32": "image encoding in float32",
    "graph.captured": "a sampling step recorded as a CUDA graph",
    "graph.replayed": "a sampling step replayed from its CUDA graph",
    "head.bfloat16": "cross-entropy of a head whose product takes bfloat16 and sums in float32 (CUDA, training)",
    "head.float32": "cross-entropy of a head whose product is float32",
    "linear.half": "a product, summed in float32, with weights kept in float16",
    "linear.wide": "a float32 product of many outputs by oneDNN, in place of MKL (CPU)",
    "linear.gradients": "the gradients of a large float32 product by OpenBLAS, in place of MKL (CPU)",
    "linear.packed": "a product with weights that were reordered once (CPU)",
    "loss.pieces": "cross-entropy whose logits exist piece by piece",
    "loss.whole": "cross-entropy over all logits at once",
    "memory.kept": "a benchmark whose process uses memory again that it freed (CPU, glibc)",
    "modulation.kept": "a sampling step that takes the blocks' scales, shifts and gates from an earlier one",
    "norm.bfloat16": "a norm of an image tokenizer's maps that stay bfloat16 from one convolution to the next (CUDA)",
    "norm.float32": "such a norm in float32 under autocast (CUDA, without gradients)",
    "rows.guided": "a sampling step with null rows",
    "rows.single": "a sampling step without null rows",
    "step.cached": "a sampling step that reads keys and values of earlier ones from the cache",
    "step.recomputed": "a sampling step that computes the whole prefix although it could be kept",
    "step.whole": "a sampling step of a family that keeps nothing: it reads all tokens anew",
    "tokens.ahead": "a batch of images encoded on a stream of its own, beside the training step before it",
    "tokens.in_turn": "a batch of images encoded before its training step begins",
    "weights.bfloat16": "a trunk's pass with weights stored in bfloat16",
    "weights.float32": "a trunk's pass with weights stored in float32",
    "weights.float8": "a trunk's pass with weights stored in 8-bit floats",
    "weights.int8": "a trunk's pass with weights stored in 8-bit integers",
    "weights.other": "a trunk's pass with weights of another kind",
}
STORED = {torch.bfloat16: "weights.bfloat16", torch.float32: "weights.float32"}
_counts = dict.fromkeys(PATHS, 0)


def count(path: str) -> None:
    """One more pass along `path`, a key of PATHS. Nothing while torch.compile traces: the count would be a guard."""
    if not torch.compiler.is_compiling():
        _counts[path] += 1


def reset() -> None:
    """All counts to 0."""
    _counts.update(dict.fromkeys(PATHS, 0))


def read() -> dict[str, int]:
    """The paths taken since `reset`, and how often; those never taken are left out."""
    return {path: times for path, times in _counts.items() if times}


def stored_as(weight: torch.Tensor) -> str:
    """The path that weights of this kind count as."""
    name = type(weight).__name__.lower()
    if "int8" in name or "float8" in name:
        return "weights.int8" if "int8" in name else "weights.float8"
    return STORED.get(weight.dtype, "weights.other")
