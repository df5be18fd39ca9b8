"""Weights of 8 bits for sampling, through torchao (the extra `quant`): the trunk's linear layers, weight-only.

Decoding a token reads every weight once and multiplies it with a few rows, so half the bytes are up to twice the speed
where one compiled kernel reads them. Without compile=true torchao first writes the weights in bf16 at every product,
which is slower than weights that are bf16 to begin with, in CUDA graphs too: what is left is half the memory, and
`sample.py` says so. "int8": symmetric, one scale an output channel. "float8" (e4m3): likewise.
Activations, norms, embeddings, the head's logits and the tokenizer stay as they are. Pictures change a little;
tests/test_light_weights.py measures it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vtok.layers.packed import PLAIN

LowBit = Literal["int8", "float8"]
KINDS = ("int8", "float8")

SLOW_LOW_BIT = (
    "note: quant={} halves the memory of the weights, not the time: without torch.compile they are brought to full "
    "width anew at every product; for speed choose dtype=bfloat16 without quant"
)


def quantize_weights(module: nn.Module, kind: LowBit) -> int:
    """Store the weights of every linear layer in `module` in 8 bits, in place; returns how many layers.

    ValueError for an unknown kind, and where torchao is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"quant={kind!r}: choose {' or '.join(KINDS)}, or leave it away")
    layers = [m for m in module.modules() if type(m) in PLAIN]
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"quant={kind} needs torchao, which is not installed ({error}): pip install torchao, or the extra "
            "`quant` of this project"
        ) from None
    chosen = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    with torch.no_grad():
        quantize_(module, chosen, filter_fn=lambda layer, _: type(layer) in PLAIN)
    return len(layers)
