"""FlexVAR's tokenizer (jiaosiyu1999/FlexVAR, models/vq_llama.py) as FlexVARTokenizer.

File: FlexVAE.pth; pass its `model` entry. The keys are LlamaGen's; the scales, which the file does not know, are
`patch_nums` of the original's command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import llamagen
from vtok.models.flexvar import FlexVARTokenizer
from vtok.quantize.independent import IndependentVQ

SOURCE = "FlexVAR VQVAE"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TAKEN = ("channels", "multipliers", "blocks", "z_channels", "attention", "mid_attention", "groups", "dropout")


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlexVARTokenizer:
    """config: {"VQModel_ModelArgs": ..} as for LlamaGen, and beside it `patch_nums`, by default those of 256 px."""
    config = dict(config)
    sides = config.pop("patch_nums", SIDES)
    plain = llamagen.convert(state, config)
    if plain.quantizer.entropy_weight:
        raise ValueError(f"{SOURCE}: only entropy_loss_ratio=0 is supported")
    codebook = {k: plain.quantizer.arguments[k] for k in ("vocab_size", "channels", "l2_norm", "beta")}
    module = FlexVARTokenizer(
        image_size=int(sides[-1]) * plain.stride,
        quantizer=IndependentVQ(sides=sides, **codebook),
        **{k: plain.arguments[k] for k in TAKEN},
    )
    load_strict(module, plain.state_dict(), SOURCE)
    return module.eval()
