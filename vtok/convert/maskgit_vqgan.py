"""MaskGIT's VQGAN (bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py) as MaskGITVQGAN.

File: maskgit-vqgan-imagenet-f16-256.bin, a flat state dict. The original counts decoder levels from the highest
resolution, we in the order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.maskgit_vqgan import MaskGITVQGAN
from vtok.quantize.vq import VQ

SOURCE = "MaskGIT-VQGAN"
NETWORK = {"channel_mult", "num_resolutions", "dropout", "hidden_channels", "num_channels", "num_res_blocks"}
NETWORK |= {"resolution", "z_channels"}
CODEBOOK = {"num_embeddings", "embedding_dim", "commitment_cost"}
WB = r"(weight|bias)"
LAYER = r"(norm1|conv1|norm2|conv2|nin_shortcut)"


def cnn_rules(half: str, name: str, levels: int) -> list[Rule]:
    """Rules for the encoder or decoder whose keys begin with `half`, which ours calls `name`."""

    def level(match: re.Match) -> int:
        return int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])

    def layer(found: str) -> str:
        return "shortcut" if found == "nin_shortcut" else found

    at = rf"{re.escape(half)}\."
    return [
        Rule(rf"{at}(conv_in|norm_out|conv_out)\.{WB}", rf"{name}.\1.\2"),
        Rule(
            rf"{at}(down|up)\.(\d+)\.block\.(\d+)\.{LAYER}\.{WB}",
            lambda m: f"{name}.levels.{level(m)}.blocks.{m[3]}.{layer(m[4])}.{m[5]}",
        ),
        Rule(rf"{at}(up)\.(\d+)\.upsample_conv\.{WB}", lambda m: f"{name}.levels.{level(m)}.resample.conv.{m[3]}"),
        Rule(rf"{at}mid\.(\d+)\.{LAYER}\.{WB}", lambda m: f"{name}.mid.{m[1]}.{layer(m[2])}.{m[3]}"),
    ]


def cnn_shape(state: Mapping[str, Tensor], half: str, source: str) -> dict[str, Any]:
    """channels, multipliers and blocks of the encoder (`down`) or decoder (`up`) whose keys begin with `half`."""
    side = "down" if f"{half}.down.0.block.0.conv1.weight" in state else "up"
    at = rf"{re.escape(half)}\.{side}"
    levels = highest(state, rf"{at}\.(\d+)\..*", source)
    widths = [shape(state, f"{half}.{side}.{i}.block.0.conv1.weight", source)[0] for i in range(levels)]
    blocks = highest(state, rf"{at}\.0\.block\.(\d+)\..*", source)
    return {"channels": widths[0], "multipliers": [wide // widths[0] for wide in widths], "blocks": blocks}


def check_network(arguments: Mapping[str, Any], found: Mapping[str, Any], source: str) -> float:
    """Compare the original's arguments of an encoder or decoder with the shapes; returns the dropout rate."""
    unknown = set(arguments) - NETWORK
    if unknown:
        raise ValueError(f"{source}: unknown arguments {sorted(unknown)}")
    names = {"hidden_channels": "channels", "channel_mult": "multipliers", "num_res_blocks": "blocks"}
    check(arguments, {theirs: found[ours] for theirs, ours in names.items()}, source)
    check(arguments, {"num_resolutions": len(found["multipliers"]), "num_channels": 3}, source)
    return arguments.get("dropout", 0.0)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MaskGITVQGAN:
    """config: {"Encoder_Decoder": arguments of the networks, "VectorQuantizer": of the codebook}.

    What they leave out is as published.
    """
    network, codebook = dict(config.get("Encoder_Decoder", {})), dict(config.get("VectorQuantizer", {}))
    unknown = (set(codebook) - CODEBOOK) | (set(config) - {"Encoder_Decoder", "VectorQuantizer"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    found = cnn_shape(state, "encoder", SOURCE)
    if cnn_shape(state, "decoder", SOURCE) != found:
        raise ValueError(f"{SOURCE}: encoder and decoder differ in channel_mult or num_res_blocks")
    levels = len(found["multipliers"])
    table = [*cnn_rules("encoder", "encoder", levels), *cnn_rules("decoder", "decoder", levels)]
    table.append(Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"))
    tensors = translate(state, table, SOURCE)
    vocab_size, width = shape(state, "quantize.embedding.weight", SOURCE)
    check(codebook, {"num_embeddings": vocab_size, "embedding_dim": width}, SOURCE)
    check(network, {"z_channels": width}, SOURCE)
    weight = codebook.get("commitment_cost", 0.25)
    quantizer = VQ(vocab_size=vocab_size, channels=width, l2_norm=False, beta=1.0, codebook_weight=weight)
    module = MaskGITVQGAN(
        image_size=network.get("resolution", 256),
        quantizer=quantizer,
        dropout=check_network(network, found, SOURCE),
        **found,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
