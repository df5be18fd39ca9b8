"""VAR's transformer (FoundationVision/VAR, models/var.py) as VAR.

Files: var_d{16,20,24,30,36}.pth, flat; some states carry the prefix "var." and, under "vae.quantize.", the quantizer
that the inputs need. Without it the quantizer is filled with NaN until `adopt(tokenizer)`. The buffers `lvl_1L`,
`attn_bias_for_masking` and `zero_k_bias` are dropped: they follow from the layout. The slot order is ours already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgen.models.var import VAR
from vtok.checkpoint import load_strict
from vtok.config import describe
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.convert.var import ARGUMENTS as VQVAE_ARGUMENTS
from vtok.convert.var import SIDES
from vtok.layout import SequenceLayout
from vtok.quantize.residual import MultiScaleVQ
from vtok.tokenizer import Part, TokenSpec

SOURCE = "VAR"
ARGUMENTS = {"num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "drop_rate", "attn_drop_rate"}
ARGUMENTS |= {"drop_path_rate", "norm_eps", "shared_aln", "cond_drop_rate", "attn_l2_norm", "patch_nums"}
ARGUMENTS |= {"flash_if_available", "fused_if_available"}
BOTH = r"(weight|bias)"

RULES = [
    Rule(r"(?:var\.)?pos_start", "start"),
    Rule(r"(?:var\.)?pos_1LC", "position"),
    Rule(rf"(?:var\.)?word_embed\.{BOTH}", r"map_embedding.\1"),
    Rule(r"(?:var\.)?class_emb\.weight", "conditioner.table.weight"),
    Rule(r"(?:var\.)?lvl_embed\.weight", "level_embedding.weight"),
    Rule(
        r"(?:var\.)?blocks\.(\d+)\.attn\.scale_mul_1H11",
        r"trunk.blocks.\1.attention.log_scale",
        change=lambda t: t.reshape(-1, 1, 1),
    ),
    Rule(r"(?:var\.)?blocks\.(\d+)\.attn\.(q_bias|v_bias)", r"trunk.blocks.\1.attention.\2"),
    Rule(r"(?:var\.)?blocks\.(\d+)\.attn\.mat_qkv\.weight", r"trunk.blocks.\1.attention.qkv.weight"),
    Rule(rf"(?:var\.)?blocks\.(\d+)\.attn\.proj\.{BOTH}", r"trunk.blocks.\1.attention.out.\2"),
    Rule(rf"(?:var\.)?blocks\.(\d+)\.ffn\.fc1\.{BOTH}", r"trunk.blocks.\1.ffn.up.\2"),
    Rule(rf"(?:var\.)?blocks\.(\d+)\.ffn\.fc2\.{BOTH}", r"trunk.blocks.\1.ffn.down.\2"),
    Rule(rf"(?:var\.)?blocks\.(\d+)\.ada_lin\.1\.{BOTH}", r"trunk.blocks.\1.modulation.\2"),
    Rule(r"(?:var\.)?blocks\.(\d+)\.ada_gss", r"trunk.blocks.\1.offset"),
    Rule(rf"(?:var\.)?shared_ada_lin\.1\.{BOTH}", r"trunk.shared.\1"),
    Rule(rf"(?:var\.)?head_nm\.ada_lin\.1\.{BOTH}", r"trunk.final.\1"),
    Rule(rf"(?:var\.)?head\.{BOTH}", r"head.linear.\1"),
    Rule(r"vae\.quantize\.embedding\.weight", "quantizer.codebook.weight"),
    Rule(rf"vae\.quantize\.quant_resi\.qresi_ls\.(\d+)\.{BOTH}", r"quantizer.phi.\1.\2"),
    Rule(rf"vae\.quantize\.quant_resi\.qresi\.{BOTH}", r"quantizer.phi.0.\1"),
    Rule(rf"vae\.quantize\.quant_resi\.(\d+)\.{BOTH}", r"quantizer.phi.\1.\2"),
    Rule(r"vae\.quantize\.ema_vocab_hit_SV", None),
    Rule(r"(?:var\.)?lvl_1L", None),
    Rule(r"(?:var\.)?attn_bias_for_masking", None),
    Rule(r"(?:var\.)?blocks\.\d+\.attn\.zero_k_bias", None),
]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> VAR:
    """config: {"VAR": arguments, "VQVAE": arguments}; what they leave out has the value of the published models."""
    arguments, vqvae = dict(config.get("VAR", {})), dict(config.get("VQVAE", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(vqvae) - VQVAE_ARGUMENTS) | (set(config) - {"VAR", "VQVAE", "note"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if arguments.get("norm_eps", 1e-6) != 1e-6 or arguments.get("mlp_ratio", 4) != 4:
        raise ValueError(f"{SOURCE}: only norm_eps=1e-6 and mlp_ratio=4 are supported")
    prefix = "var." if any(key.startswith("var.") for key in state) else ""
    rows, width = shape(state, f"{prefix}class_emb.weight", SOURCE)
    vocab_size, channels = (
        shape(state, f"{prefix}head.weight", SOURCE)[0],
        shape(state, f"{prefix}word_embed.weight", SOURCE)[1],
    )
    depth = highest(state, r"(?:var\.)?blocks\.(\d+)\..*", SOURCE)
    l2_attention = f"{prefix}blocks.0.attn.scale_mul_1H11" in state
    heads = (
        state[f"{prefix}blocks.0.attn.scale_mul_1H11"].numel() if l2_attention else arguments.get("num_heads", depth)
    )
    shared = f"{prefix}shared_ada_lin.1.weight" in state
    sides = tuple(arguments.get("patch_nums", vqvae.get("v_patch_nums", SIDES)))
    told = {"num_classes": rows - 1, "embed_dim": width, "depth": depth, "num_heads": heads, "shared_aln": shared}
    check(arguments, {**told, "attn_l2_norm": l2_attention}, SOURCE)
    if shape(state, f"{prefix}pos_1LC", SOURCE)[1] != sum(side * side for side in sides):
        raise ValueError(f"{SOURCE}: pos_1LC {tuple(state[f'{prefix}pos_1LC'].shape)} does not fit patch_nums={sides}")
    quantizer = MultiScaleVQ(
        vocab_size=vocab_size,
        channels=channels,
        sides=sides,
        l2_norm=vqvae.get("using_znorm", False),
        beta=vqvae.get("beta", 0.25),
        phi=vqvae.get("share_quant_resi", 4),
        phi_weight=abs(vqvae.get("quant_resi", 0.5)),
    )
    layout = SequenceLayout.scales(sides)
    spec = TokenSpec(layout, (Part(layout.length, vocab_size, channels),), 16 * sides[-1], describe(quantizer))
    module = VAR(
        spec,
        rows - 1,
        depth=depth,
        width=width,
        heads=heads,
        modulation="shared" if shared else "own",
        l2_attention=l2_attention,
        dropout=arguments.get("drop_rate", 0.0),
        attention_dropout=arguments.get("attn_drop_rate", 0.0),
        drop_path=arguments.get("drop_path_rate", 0.1 * depth / 24),
        label_drop=arguments.get("cond_drop_rate", 0.1),
    )
    tensors = translate(state, RULES, SOURCE)
    if not any(key.startswith("quantizer.") for key in tensors):
        tensors |= {
            k: torch.full(v.shape, math.nan) for k, v in module.state_dict().items() if k.startswith("quantizer.")
        }
    load_strict(module, tensors, SOURCE)
    return module.eval()
