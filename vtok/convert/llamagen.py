"""LlamaGen's VQ-16 and VQ-8 (FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py) as CNNTokenizer.

Files: vq_ds16_c2i.pt, vq_ds8_c2i.pt, vq_ds16_t2i.pt; pass their `model` entry. `codebook_used`, a ring of recent ids,
is dropped. q, k and v become one convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.vq import VQ

SOURCE = "LlamaGen VQ"
LEVEL = r"(encoder|decoder)\.conv_blocks\.(\d+)\."
ARGUMENTS = {"codebook_size", "codebook_embed_dim", "codebook_l2_norm", "codebook_show_usage", "commit_loss_beta"}
ARGUMENTS |= {"entropy_loss_ratio", "encoder_ch_mult", "decoder_ch_mult", "z_channels", "dropout_p"}
REPLACED = "encoder_and_decoder_replaced_by"
NORM = r"(weight|bias)"

RULES = (
    Rule(rf"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.{NORM}", r"\1.\2.\3"),
    Rule(rf"{LEVEL}res\.(\d+)\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.levels.\2.blocks.\3.\4.\5"),
    Rule(rf"{LEVEL}res\.(\d+)\.nin_shortcut\.{NORM}", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    Rule(rf"{LEVEL}attn\.(\d+)\.norm\.{NORM}", r"\1.levels.\2.attention.\3.norm.\4"),
    Rule(rf"{LEVEL}attn\.(\d+)\.q\.{NORM}", r"\1.levels.\2.attention.\3.qkv.\4", part=(0, 3)),
    Rule(rf"{LEVEL}attn\.(\d+)\.k\.{NORM}", r"\1.levels.\2.attention.\3.qkv.\4", part=(1, 3)),
    Rule(rf"{LEVEL}attn\.(\d+)\.v\.{NORM}", r"\1.levels.\2.attention.\3.qkv.\4", part=(2, 3)),
    Rule(rf"{LEVEL}attn\.(\d+)\.proj_out\.{NORM}", r"\1.levels.\2.attention.\3.out.\4"),
    Rule(rf"{LEVEL}(?:downsample|upsample)\.conv\.{NORM}", r"\1.levels.\2.resample.conv.\3"),
    Rule(rf"(encoder|decoder)\.mid\.(0|2)\.(norm1|conv1|norm2|conv2)\.{NORM}", r"\1.mid.\2.\3.\4"),
    Rule(rf"(encoder|decoder)\.mid\.1\.norm\.{NORM}", r"\1.mid.1.norm.\2"),
    Rule(rf"(encoder|decoder)\.mid\.1\.q\.{NORM}", r"\1.mid.1.qkv.\2", part=(0, 3)),
    Rule(rf"(encoder|decoder)\.mid\.1\.k\.{NORM}", r"\1.mid.1.qkv.\2", part=(1, 3)),
    Rule(rf"(encoder|decoder)\.mid\.1\.v\.{NORM}", r"\1.mid.1.qkv.\2", part=(2, 3)),
    Rule(rf"(encoder|decoder)\.mid\.1\.proj_out\.{NORM}", r"\1.mid.1.out.\2"),
    Rule(rf"quant_conv\.{NORM}", r"project_in.\1"),
    Rule(rf"post_quant_conv\.{NORM}", r"project_out.\1"),
    Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    Rule(r"quantize\.codebook_used", None),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CNNTokenizer:
    """config: {"VQModel_ModelArgs": arguments of the original's ModelArgs}; what is left out has its default there.

    An `image_size` beside it sets the specification's size (256 by default). The goldens' note that the original's
    encoder and decoder were replaced by smaller ones switches the check of the widths off.
    """
    arguments = dict(config.get("VQModel_ModelArgs", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"VQModel_ModelArgs", REPLACED, "image_size"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    tensors = translate(state, RULES, SOURCE)
    vocab_size, width = shape(state, "quantize.embedding.weight", SOURCE)
    quantizer = VQ(
        vocab_size=vocab_size,
        channels=width,
        l2_norm=arguments.get("codebook_l2_norm", True),
        beta=arguments.get("commit_loss_beta", 0.25),
        entropy_weight=arguments.get("entropy_loss_ratio", 0.0),
    )
    channels = shape(state, "encoder.conv_in.weight", SOURCE)[0]
    levels = highest(state, r"encoder\.conv_blocks\.(\d+)\..*", SOURCE)
    widths = [shape(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", SOURCE)[0] for i in range(levels)]
    multipliers = [wide // channels for wide in widths]
    z_channels = shape(state, "encoder.conv_out.weight", SOURCE)[0]
    check(arguments, {"codebook_size": vocab_size, "codebook_embed_dim": width, "z_channels": z_channels}, SOURCE)
    if REPLACED not in config:
        check(arguments, {"encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers}, SOURCE)
    module = CNNTokenizer(
        image_size=config.get("image_size", 256),
        quantizer=quantizer,
        channels=channels,
        multipliers=multipliers,
        blocks=highest(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\..*", SOURCE),
        z_channels=z_channels,
        dropout=arguments.get("dropout_p", 0.0),
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()


def level_multipliers(state: Mapping[str, Tensor], half: str, channels: int, source: str) -> list[int]:
    """Widths of the levels over `channels`, highest resolution first; half: encoder or decoder."""
    levels = highest(state, rf"{half}\.conv_blocks\.(\d+)\..*", source)
    keys = [f"{half}.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
    found = [shape(state, key, source)[0] // channels for key in keys]
    return found if half == "encoder" else found[::-1]
