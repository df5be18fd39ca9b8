"""FlexVAR's transformer (jiaosiyu1999/FlexVAR, models/flexvar.py) as FlexVAR.

Files: FlexVARd16-epo179.pth, FlexVARd20-epo249.pth, FlexVARd24-epo349.pth, flat; the tokenizer is FlexVAE.pth. Keys are
VAR's, without levels and with a 32 x 32 position table. Without `vae.quantize.*` the codebook waits for `adopt`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgen.convert.var import ARGUMENTS as VAR_ARGUMENTS
from vgen.convert.var import RULES as VAR_RULES
from vgen.models.flexvar import FlexVAR
from vtok.checkpoint import load_strict
from vtok.config import describe
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.quantize.independent import IndependentVQ
from vtok.tokenizer import Part, TokenSpec

SOURCE = "FlexVAR"
ARGUMENTS = VAR_ARGUMENTS | {"token_dropout_p"}  # constructed by the original, never applied
VQ_ARGUMENTS = {"codebook_size", "codebook_embed_dim", "codebook_l2_norm", "codebook_show_usage"}
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
RULES = [
    Rule(r"(?:var\.)?pos_1LC", "position", change=lambda t: t[0]),
    *(rule for rule in VAR_RULES if "pos_1LC" not in rule.pattern and "lvl" not in rule.pattern),
]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlexVAR:
    """config: {"FlexVAR": arguments, "VQModel_ModelArgs": arguments}; sampling may use any list of sides."""
    arguments, vq = dict(config.get("FlexVAR", {})), dict(config.get("VQModel_ModelArgs", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(vq) - VQ_ARGUMENTS)
    unknown |= set(config) - {"FlexVAR", "VQModel_ModelArgs", "note"}
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    fixed = {"norm_eps": 1e-6, "mlp_ratio": 4, "drop_rate": 0.0, "attn_drop_rate": 0.0}
    for name, value in fixed.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{SOURCE}: {name}={arguments[name]} is not supported, only {value}")
    prefix = "var." if any(key.startswith("var.") for key in state) else ""
    rows, width = shape(state, f"{prefix}class_emb.weight", SOURCE)
    vocab_size = shape(state, f"{prefix}head.weight", SOURCE)[0]
    channels = shape(state, f"{prefix}word_embed.weight", SOURCE)[1]
    depth, scale = highest(state, r"(?:var\.)?blocks\.(\d+)\..*", SOURCE), f"{prefix}blocks.0.attn.scale_mul_1H11"
    heads = state[scale].numel() if scale in state else arguments.get("num_heads", depth)
    shared = f"{prefix}shared_ada_lin.1.weight" in state
    told = {"num_classes": rows - 1, "embed_dim": width, "depth": depth, "num_heads": heads, "shared_aln": shared}
    check(arguments, {**told, "attn_l2_norm": scale in state}, SOURCE)
    check(vq, {"codebook_size": vocab_size, "codebook_embed_dim": channels}, SOURCE)
    sides, l2_norm = tuple(arguments.get("patch_nums", SIDES)), vq.get("codebook_l2_norm", True)
    quantizer = IndependentVQ(vocab_size=vocab_size, channels=channels, sides=sides, l2_norm=l2_norm)
    layout = SequenceLayout.scales(sides)
    module = FlexVAR(
        TokenSpec(layout, (Part(layout.length, vocab_size, channels),), 16 * sides[-1], describe(quantizer)),
        rows - 1,
        depth=depth,
        width=width,
        heads=heads,
        modulation="shared" if shared else "own",
        l2_attention=scale in state,
        drop_path=arguments.get("drop_path_rate", 0.1 * depth / 24),
        label_drop=arguments.get("cond_drop_rate", 0.1),
    )
    tensors = translate(state, RULES, SOURCE)
    own = module.state_dict()
    for name in own:
        if name.startswith("quantizer.") and name not in tensors:
            tensors[name] = torch.full(own[name].shape, math.nan)
    load_strict(module, tensors, SOURCE)
    return module.eval()
