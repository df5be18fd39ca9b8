"""Hita's tokenizers (CVMI-Lab/Hita, hita/tokenizer/tokenizer_image/vq_model.py and hita/core/layers.py).

Files: hita-tok.pt (Hita-V) and hita-ultra.pt (Hita-U); pass their `model` entry (or `ema`). The frozen DINOv2 is not in
them. `codebook_used`, a ring of recent ids, is dropped. q, k and v become one projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import llamagen
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.hita import Hita
from vtok.models.hita_side import DinoTokens
from vtok.quantize.parts import PartsQuantizer
from vtok.quantize.vq import VQ

SOURCE = "Hita"
ARGUMENTS = llamagen.ARGUMENTS | {"codebook_slots_embed_dim"}
SETTINGS = {"layer_type", "image_size", "patch_size", "dim", "depth", "num_head", "mlp_dim", "dim_head", "dropout"}
SETTINGS |= {"n_carrier", "in_channels", "d_model", "visual_encoder_config", "enable_vfm_recon", "shift_k"}
REPLACED = "encoder_and_decoder_replaced"
DINO = "SelfSupervisedCondtionEmbedder"  # the original's name, as it is spelt there
PATCHES = 16  # side of the grid of DINOv2's patches at 224 px

WB = r"(weight|bias)"
STACKS = {
    r"encode_transformer\.transformer1": "fuse.trunk",
    r"encode_transformer\.transformer2": "fuse.causal.trunk",
    r"decode_transformer\.transformer": "unfold.trunk",
}


def _rules() -> tuple[Rule, ...]:
    rules = [
        Rule(r"encode_transformer\.carrier_tokens", "fuse.carriers", change=_table),
        Rule(r"encode_transformer\.pos_embed", "fuse.place", change=_table),
        Rule(rf"encode_transformer\.proj\.mlp\.(\d)\.{WB}", r"fuse.project.\1.\2"),
        Rule(rf"encode_transformer\.norm_pre1\.{WB}", r"fuse.norm.\1"),
        Rule(rf"encode_transformer\.norm_pre2\.{WB}", r"fuse.causal.norm.\1"),
        Rule(r"decode_transformer\.position_embedding", "place", change=_table),
        Rule(r"decode_transformer\.slot_position_embedding", "holistic_place", change=_table),
        Rule(rf"decode_transformer\.norm\.{WB}", r"unfold.norm.\1"),
        Rule(r"decode_transformer\.mask_embedding", "vision_query", change=_table),
        Rule(rf"decode_transformer\.norm_vfm\.{WB}", r"vision_norm.\1"),
        Rule(rf"decode_transformer\.proj\.{WB}", r"vision_out.\1"),
        Rule(r"quant_conv\.weight", "project_in.weight", change=lambda w: w.flatten(1)),
        Rule(r"post_quant_conv\.weight", "project_out.weight", change=lambda w: w.flatten(1)),
        Rule(rf"pre_slots_quant\.{WB}", r"holistic_in.\1"),
        Rule(rf"post_slots_quant\.{WB}", r"holistic_out.\1"),
        Rule(r"slot_quantize\.embedding\.weight", "quantizer.parts.0.codebook.weight"),
        Rule(r"quantize\.embedding\.weight", "quantizer.parts.1.codebook.weight"),
        Rule(r"slot_quantize\.codebook_used", None),
    ]
    for theirs, ours in STACKS.items():
        layer, block = rf"{theirs}\.layers\.(\d+)", rf"{ours}.blocks.\1"
        rules += [
            Rule(rf"{layer}\.(norm[12])\.{WB}", rf"{block}.\2.\3"),
            Rule(rf"{layer}\.attn1\.(?:to_out\.0|out_proj)\.{WB}", rf"{block}.attention.out.\2"),
            Rule(rf"{layer}\.ffnet\.w12\.{WB}", rf"{block}.ffn.up.\2"),
            Rule(rf"{layer}\.ffnet\.w3\.{WB}", rf"{block}.ffn.down.\2"),
        ]
        for i, part in enumerate("qkv"):
            key = rf"{layer}\.attn1\.(?:to_{part}|{part}_proj)\.{WB}"
            rules.append(Rule(key, rf"{block}.attention.qkv.\2", part=(i, 3)))
    return (*rules, *llamagen.RULES)


def _table(tokens: Tensor) -> Tensor:
    """[1, L, D] to [L, D]."""
    return tokens.squeeze(0)


RULES = _rules()


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Hita:
    """config: {"ModelArgs": .., "transformer_config": {"encoder_config": .., "decoder_config": ..}} of the original.

    The frozen network is DINOv2 where `visual_encoder_config` names the original's (its weights are read when images
    are first encoded); for any other the caller sets `side`.
    """
    given, transformers = dict(config.get("ModelArgs", {})), config.get("transformer_config", {})
    halves = {half: dict(transformers.get(f"{half}_config", {}).get("params", {})) for half in ("encoder", "decoder")}
    unknown = (set(given) - ARGUMENTS) | (set(config) - {"ModelArgs", "transformer_config", REPLACED})
    unknown |= (set(halves["encoder"]) | set(halves["decoder"])) - SETTINGS
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    _, carriers, dim = shape(state, "encode_transformer.carrier_tokens", SOURCE)
    cells = shape(state, "encode_transformer.pos_embed", SOURCE)[1]
    side_channels = shape(state, "encode_transformer.proj.mlp.0.weight", SOURCE)[1]
    hidden = shape(state, "encode_transformer.transformer1.layers.0.ffnet.w3.weight", SOURCE)[1]
    depth = highest(state, r"encode_transformer\.transformer1\.layers\.(\d+)\..*", SOURCE)
    vision = "decode_transformer.mask_embedding" in state
    channels = shape(state, "encoder.conv_in.weight", SOURCE)[0]
    multipliers = {half: llamagen.level_multipliers(state, half, channels, SOURCE) for half in halves}
    vocab_sizes, widths = zip(*(shape(state, f"{n}.embedding.weight", SOURCE) for n in ("slot_quantize", "quantize")))
    found = {"codebook_size": vocab_sizes[0], "codebook_slots_embed_dim": widths[0], "codebook_embed_dim": widths[1]}
    found |= {"z_channels": dim} | {f"{half}_ch_mult": multipliers[half] for half in halves}
    check(given, found, SOURCE)
    if given.get("dropout_p", 0.0):
        raise ValueError(f"{SOURCE}: dropout_p={given['dropout_p']} is an option that no published model has")
    stride = 2 ** (len(multipliers["encoder"]) - 1)
    found = {"dim": dim, "depth": depth, "n_carrier": carriers, "patch_size": stride, "in_channels": side_channels}
    found |= {"image_size": stride * math.isqrt(cells), "enable_vfm_recon": vision, "layer_type": "normal"}
    for half, settings in halves.items():
        heads = settings.get("num_head", 8)
        check(settings, found | {"dim_head": dim // heads}, f"{SOURCE} {half}")
        if "mlp_dim" in settings and _hidden(settings["mlp_dim"]) != hidden:
            raise ValueError(f"{SOURCE}: mlp_dim={settings['mlp_dim']} in the config, but the weights have {hidden}")
    vqs = [
        VQ(
            vocab_size=vocab_size,
            channels=width,
            l2_norm=given.get("codebook_l2_norm", True),
            beta=given.get("commit_loss_beta", 0.25),
            entropy_weight=given.get("entropy_loss_ratio", 0.0),
        )
        for vocab_size, width in zip(vocab_sizes, widths)
    ]
    target = str(halves["encoder"].get("visual_encoder_config", {}).get("target", DINO))
    module = Hita(
        image_size=found["image_size"],
        quantizer=PartsQuantizer(quantizers=vqs, counts=[carriers]),
        channels=channels,
        multipliers=multipliers["encoder"],
        decoder_multipliers=multipliers["decoder"],
        blocks=highest(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\..*", SOURCE),
        dim=dim,
        depth=depth,
        heads=halves["encoder"].get("num_head", 8),
        hidden=hidden,
        dropout=halves["encoder"].get("dropout", 0.0),
        side=DinoTokens() if target.endswith(DINO) else None,
        side_channels=side_channels,
        shift=halves["decoder"].get("shift_k", 4),
        vision=PATCHES if vision else 0,
        vision_channels=shape(state, "decode_transformer.proj.weight", SOURCE)[0] if vision else 1024,
    )
    load_strict(module, translate(state, RULES, SOURCE), SOURCE)
    return module.eval()


def _hidden(mlp_dim: int) -> int:
    """Width of SwiGLU's hidden layer: two thirds, rounded up to a multiple of 8."""
    return (int(mlp_dim * 2 / 3) + 7) // 8 * 8
