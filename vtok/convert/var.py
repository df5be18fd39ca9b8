"""VAR's multi-scale VQVAE (FoundationVision/VAR, models/vqvae.py) as VARTokenizer.

File: vae_ch160v4096z32.pth, a flat state dict that serves 256, 512 and 1024 px with their own `v_patch_nums`.
`ema_vocab_hit_SV` (usage statistics) is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import taming
from vtok.convert.table import Rule, check, shape, translate
from vtok.models.var import VARTokenizer
from vtok.quantize.residual import MultiScaleVQ

SOURCE = "VAR VQVAE"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ARGUMENTS = {"vocab_size", "z_channels", "ch", "dropout", "beta", "using_znorm", "quant_conv_ks", "quant_resi"}
ARGUMENTS |= {"share_quant_resi", "default_qresi_counts", "v_patch_nums", "test_mode"}
REPLACED = "encoder_and_decoder_replaced_by"
NORM = r"(weight|bias)"

RULES = (
    Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    Rule(rf"quantize\.quant_resi\.qresi_ls\.(\d+)\.{NORM}", r"quantizer.phi.\1.\2"),  # n shared
    Rule(rf"quantize\.quant_resi\.qresi\.{NORM}", r"quantizer.phi.0.\1"),  # one for all
    Rule(rf"quantize\.quant_resi\.(\d+)\.{NORM}", r"quantizer.phi.\1.\2"),  # one per scale
    Rule(r"quantize\.ema_vocab_hit_SV", None),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> VARTokenizer:
    """config: {"VQVAE": arguments of the original's class}; what it leaves out has the original's default."""
    arguments = dict(config.get("VQVAE", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"VQVAE", REPLACED})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    shapes = taming.sizes(state, SOURCE)
    levels = len(shapes["multipliers"])
    tensors = translate(state, [*taming.rules(levels), *RULES], SOURCE)
    if arguments.get("quant_conv_ks", 3) != 3 or arguments.get("default_qresi_counts", 0):
        raise ValueError(f"{SOURCE}: only quant_conv_ks=3 and default_qresi_counts=0 are supported")
    sides = arguments.get("v_patch_nums", SIDES)
    vocab_size, width = shape(state, "quantize.embedding.weight", SOURCE)
    quantizer = MultiScaleVQ(
        vocab_size=vocab_size,
        channels=width,
        sides=sides,
        l2_norm=arguments.get("using_znorm", False),
        beta=arguments.get("beta", 0.25),
        phi=arguments.get("share_quant_resi", 4),
        phi_weight=abs(arguments.get("quant_resi", 0.5)),
    )
    check(arguments, {"vocab_size": vocab_size, "z_channels": width, "ch": shapes["channels"]}, SOURCE)
    module = VARTokenizer(
        image_size=sides[-1] * 2 ** (levels - 1),
        quantizer=quantizer,
        z_channels=None,
        projection=3,
        dropout=arguments.get("dropout", 0.0),
        **shapes,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
