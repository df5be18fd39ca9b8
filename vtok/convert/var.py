"""VAR's multi-scale VQVAE (FoundationVision/VAR, models/vqvae.py) as VARTokenizer.

File: vae_ch160v4096z32.pth, a flat state dict that serves 256, 512 and 1024 px with their own `v_patch_nums`.
`ema_vocab_hit_SV` (usage statistics) is dropped. The original counts decoder levels from the highest resolution, we in
the order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.var import VARTokenizer
from vtok.quantize.residual import MultiScaleVQ

SOURCE = "VAR VQVAE"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ARGUMENTS = {"vocab_size", "z_channels", "ch", "dropout", "beta", "using_znorm", "quant_conv_ks", "quant_resi"}
ARGUMENTS |= {"share_quant_resi", "default_qresi_counts", "v_patch_nums", "test_mode"}
REPLACED = "encoder_and_decoder_replaced_by"
NORM = r"(weight|bias)"


def rules(levels: int) -> list[Rule]:
    """The table for an autoencoder of `levels` resolutions."""

    def level(match: re.Match) -> str:
        half, index = ("encoder", int(match[2])) if match[1] == "down" else ("decoder", levels - 1 - int(match[2]))
        return f"{half}.levels.{index}"

    at = r"(?:encoder|decoder)\.(down|up)\.(\d+)\."
    return [
        Rule(rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{NORM}", r"\1.\2.\3"),
        Rule(
            rf"{at}block\.(\d+)\.(norm1|conv1|norm2|conv2)\.{NORM}", lambda m: f"{level(m)}.blocks.{m[3]}.{m[4]}.{m[5]}"
        ),
        Rule(rf"{at}block\.(\d+)\.nin_shortcut\.{NORM}", lambda m: f"{level(m)}.blocks.{m[3]}.shortcut.{m[4]}"),
        Rule(rf"{at}attn\.(\d+)\.(norm|qkv)\.{NORM}", lambda m: f"{level(m)}.attention.{m[3]}.{m[4]}.{m[5]}"),
        Rule(rf"{at}attn\.(\d+)\.proj_out\.{NORM}", lambda m: f"{level(m)}.attention.{m[3]}.out.{m[4]}"),
        Rule(rf"{at}(?:downsample|upsample)\.conv\.{NORM}", lambda m: f"{level(m)}.resample.conv.{m[3]}"),
        Rule(rf"(encoder|decoder)\.mid\.block_1\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.0.\2.\3"),
        Rule(rf"(encoder|decoder)\.mid\.attn_1\.(norm|qkv)\.{NORM}", r"\1.mid.1.\2.\3"),
        Rule(rf"(encoder|decoder)\.mid\.attn_1\.proj_out\.{NORM}", r"\1.mid.1.out.\2"),
        Rule(rf"(encoder|decoder)\.mid\.block_2\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.2.\2.\3"),
        Rule(rf"quant_conv\.{NORM}", r"project_in.\1"),
        Rule(rf"post_quant_conv\.{NORM}", r"project_out.\1"),
        Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
        Rule(rf"quantize\.quant_resi\.qresi_ls\.(\d+)\.{NORM}", r"quantizer.phi.\1.\2"),  # n shared
        Rule(rf"quantize\.quant_resi\.qresi\.{NORM}", r"quantizer.phi.0.\1"),  # one for all
        Rule(rf"quantize\.quant_resi\.(\d+)\.{NORM}", r"quantizer.phi.\1.\2"),  # one per scale
        Rule(r"quantize\.ema_vocab_hit_SV", None),
    ]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> VARTokenizer:
    """config: {"VQVAE": arguments of the original's class}; what it leaves out has the original's default."""
    arguments = dict(config.get("VQVAE", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"VQVAE", REPLACED})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    levels = highest(state, r"encoder\.down\.(\d+)\..*", SOURCE)
    tensors = translate(state, rules(levels), SOURCE)
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
    channels = shape(state, "encoder.conv_in.weight", SOURCE)[0]
    check(arguments, {"vocab_size": vocab_size, "z_channels": width, "ch": channels}, SOURCE)
    widths = [shape(state, f"encoder.down.{i}.block.0.conv1.weight", SOURCE)[0] for i in range(levels)]
    module = VARTokenizer(
        image_size=sides[-1] * 2 ** (levels - 1),
        quantizer=quantizer,
        z_channels=None,
        projection=3,
        channels=channels,
        multipliers=[wide // channels for wide in widths],
        blocks=highest(state, r"encoder\.down\.0\.block\.(\d+)\..*", SOURCE),
        dropout=arguments.get("dropout", 0.0),
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
