"""xAR's cell model (OliverRensu/xAR, models/xar.py) as XAR.

Files: xAR-B.pth, xAR-L.pth, xAR-H.pth, flat, averaged weights. The mask and the rope tables are dropped after a check
that ours are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.convert.stacks import BOTH, check_buffers, stack_rules
from vgen.models.xar import XAR
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "xAR"
ARGUMENTS = {"img_size", "vae_stride", "patch_size", "mlp_ratio", "vae_embed_dim", "label_drop_prob", "class_num"}
ARGUMENTS |= {"encoder_embed_dim", "encoder_depth", "encoder_num_heads", "attn_dropout", "proj_dropout", "clusters"}
ARGUMENTS |= {"decoder_embed_dim", "decoder_depth", "decoder_num_heads", "diffusion_batch_mul"}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> XAR:
    """config: {"xAR": arguments}; what they leave out has the value of the published models (heads: width / 64)."""
    arguments = dict(config.get("xAR", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"xAR", "note"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    for name, allowed in (("mlp_ratio", 4), ("patch_size", 1), ("clusters", 4)):
        if arguments.get(name, allowed) != allowed:
            raise ValueError(f"{SOURCE}: {name}={arguments[name]} is not supported, only {allowed}")
    width, channels = shape(state, "z_proj.weight", SOURCE)
    depth = highest(state, r"encoder_blocks\.(\d+)\..*", SOURCE)
    length = shape(state, "encoder_pos_embed_learned", SOURCE)[1]
    side, stride = math.isqrt(length), arguments.get("vae_stride", 16)
    head = state["encoder_blocks.0.attn.rope.freqs_cos"].shape[1] if _has_rope(state) else 80 if width == 1280 else 64
    told = {"encoder_embed_dim": width, "decoder_embed_dim": width, "encoder_depth": depth, "decoder_depth": depth}
    told |= {"encoder_num_heads": width // head, "decoder_num_heads": width // head}
    check(arguments, {**told, "vae_embed_dim": channels, "img_size": stride * side}, SOURCE)
    layout = SequenceLayout.raster(side, side)
    module = XAR(
        TokenSpec(layout, (Part(length, None, channels),), stride * side),
        shape(state, "class_emb.weight", SOURCE)[0] - 1,
        depth=depth,
        width=width,
        heads=width // head,
        entity="cell",
        entity_size=side // 2,
        solver_steps=40 if width <= 768 else 50,
        dropout=arguments.get("proj_dropout", 0.1),
        attention_dropout=arguments.get("attn_dropout", 0.1),
        label_drop=arguments.get("label_drop_prob", 0.1),
    )
    check_buffers(state, module.cos, module.sin, module.layout.ranks(), SOURCE)
    rules = [
        *stack_rules(depth),
        Rule(rf"time_embed\.mlp\.0\.{BOTH}", r"time.up.\1"),
        Rule(rf"time_embed\.mlp\.2\.{BOTH}", r"time.down.\1"),
        Rule(rf"pred\.{BOTH}", r"head.linear.\1"),
    ]
    load_strict(module, translate(state, rules, SOURCE), SOURCE)
    return module.eval()


def _has_rope(state: Mapping[str, Tensor]) -> bool:
    return "encoder_blocks.0.attn.rope.freqs_cos" in state
