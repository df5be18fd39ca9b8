"""MAR (LTH14/mar, models/mar.py) as MAR.

Files: checkpoint-last.pth of each size, "model_ema". The original keeps the class embeddings and the embedding of no
class apart; here that is the last row of one table. Norms have eps 1e-6, as in the three published sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.models.mar import MAR
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "MAR"
ARGUMENTS = {"img_size", "vae_stride", "patch_size", "encoder_embed_dim", "encoder_depth", "encoder_num_heads"}
ARGUMENTS |= {"decoder_embed_dim", "decoder_depth", "decoder_num_heads", "mlp_ratio", "vae_embed_dim"}
ARGUMENTS |= {"mask_ratio_min", "label_drop_prob", "class_num", "attn_dropout", "proj_dropout", "buffer_size"}
ARGUMENTS |= {"diffloss_d", "diffloss_w", "num_sampling_steps", "diffusion_batch_mul", "grad_checkpointing"}
BOTH = r"(weight|bias)"
SIDE = r"(encoder|decoder)"


def _row(t: Tensor) -> Tensor:
    return t[0]


RULES = [
    Rule(r"class_emb\.weight", "conditioner.table.weight", part=(0, 2)),
    Rule(r"fake_latent", "conditioner.table.weight", part=(1, 2)),
    Rule(r"mask_token", "mask_token"),
    Rule(rf"{SIDE}_pos_embed_learned", r"\1_position", change=_row),
    Rule(r"diffusion_pos_embed_learned", "head_position", change=_row),
    Rule(rf"z_proj\.{BOTH}", r"embedding.\1"),
    Rule(rf"z_proj_ln\.{BOTH}", r"embedding_norm.\1"),
    Rule(rf"decoder_embed\.{BOTH}", r"decoder_embedding.\1"),
    Rule(rf"{SIDE}_norm\.{BOTH}", r"trunk.\1.norm.\2"),
    Rule(rf"{SIDE}_blocks\.(\d+)\.(norm[12])\.{BOTH}", r"trunk.\1.blocks.\2.\3.\4"),
    Rule(rf"{SIDE}_blocks\.(\d+)\.attn\.qkv\.{BOTH}", r"trunk.\1.blocks.\2.attention.qkv.\3"),
    Rule(rf"{SIDE}_blocks\.(\d+)\.attn\.proj\.{BOTH}", r"trunk.\1.blocks.\2.attention.out.\3"),
    Rule(rf"{SIDE}_blocks\.(\d+)\.mlp\.fc1\.{BOTH}", r"trunk.\1.blocks.\2.ffn.up.\3"),
    Rule(rf"{SIDE}_blocks\.(\d+)\.mlp\.fc2\.{BOTH}", r"trunk.\1.blocks.\2.ffn.down.\3"),
    Rule(rf"diffloss\.net\.time_embed\.mlp\.0\.{BOTH}", r"head.mlp.time.up.\1"),
    Rule(rf"diffloss\.net\.time_embed\.mlp\.2\.{BOTH}", r"head.mlp.time.down.\1"),
    Rule(rf"diffloss\.net\.cond_embed\.{BOTH}", r"head.mlp.condition.\1"),
    Rule(rf"diffloss\.net\.input_proj\.{BOTH}", r"head.mlp.input.\1"),
    Rule(rf"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.{BOTH}", r"head.mlp.blocks.\1.norm.\2"),
    Rule(rf"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0\.{BOTH}", r"head.mlp.blocks.\1.up.\2"),
    Rule(rf"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2\.{BOTH}", r"head.mlp.blocks.\1.down.\2"),
    Rule(rf"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.{BOTH}", r"head.mlp.blocks.\1.modulation.\2"),
    Rule(rf"diffloss\.net\.final_layer\.linear\.{BOTH}", r"head.mlp.output.\1"),
    Rule(rf"diffloss\.net\.final_layer\.adaLN_modulation\.1\.{BOTH}", r"head.mlp.modulation.\1"),
]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MAR:
    """config: {"MAR": arguments}; what they leave out has the value of the published models (head counts: 16)."""
    arguments = dict(config.get("MAR", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"MAR"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if arguments.get("patch_size", 1) != 1 or arguments.get("mlp_ratio", 4) != 4:
        raise ValueError(f"{SOURCE}: only patch_size=1 and mlp_ratio=4 are supported")
    width, channels = shape(state, "z_proj.weight", SOURCE)
    wide, classes = shape(state, "decoder_embed.weight", SOURCE)[0], shape(state, "class_emb.weight", SOURCE)[0]
    length = shape(state, "diffusion_pos_embed_learned", SOURCE)[1]
    buffer = shape(state, "encoder_pos_embed_learned", SOURCE)[1] - length
    depths = [highest(state, rf"{side}_blocks\.(\d+)\..*", SOURCE) for side in ("encoder", "decoder")]
    head = highest(state, r"diffloss\.net\.res_blocks\.(\d+)\..*", SOURCE)
    head_width = shape(state, "diffloss.net.input_proj.weight", SOURCE)[0]
    told = {"encoder_embed_dim": width, "decoder_embed_dim": wide, "vae_embed_dim": channels, "class_num": classes}
    told |= {"encoder_depth": depths[0], "decoder_depth": depths[1], "buffer_size": buffer}
    check(arguments, {**told, "diffloss_d": head, "diffloss_w": head_width}, SOURCE)
    side, stride = math.isqrt(length), arguments.get("vae_stride", 16)
    if side * side != length or arguments.get("img_size", side * stride) != side * stride:
        raise ValueError(f"{SOURCE}: the weights have {length} tokens, which is not a grid of img_size / vae_stride")
    spec = TokenSpec(SequenceLayout.raster(side, side), (Part(length, None, channels),), side * stride)
    module = MAR(
        spec,
        classes,
        depth=depths[0],
        width=width,
        heads=arguments.get("encoder_num_heads", 16),
        decoder_depth=depths[1],
        decoder_width=wide,
        decoder_heads=arguments.get("decoder_num_heads", 16),
        steps=min(length, 256),
        buffer=buffer,
        mask_ratio=arguments.get("mask_ratio_min", 0.7),
        head_depth=head,
        head_width=head_width,
        solver_steps=int(arguments.get("num_sampling_steps", 100)),
        repeats=arguments.get("diffusion_batch_mul", 4),
        dropout=arguments.get("proj_dropout", 0.1),
        attention_dropout=arguments.get("attn_dropout", 0.1),
        label_drop=arguments.get("label_drop_prob", 0.1),
    )
    load_strict(module, translate(state, RULES, SOURCE), SOURCE)
    return module.eval()
