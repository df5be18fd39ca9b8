"""RAR (bytedance/1d-tokenizer, modeling/rar.py) as RAR.

Files: rar_{b,l,xl,xxl}.bin, flat. The original's one embedding table (codes, mask, classes, none) becomes the token
table and the class table; the modulation's slots shift, scale, gate are put into our order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgen.models.rar import RAR, SPARE
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "RAR"
ARGUMENTS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "dropout", "attn_drop"}
ARGUMENTS |= {"image_seq_len", "condition_num_classes", "use_checkpoint"}
CODE_CHANNELS = 256  # of MaskGIT's VQGAN, whose 1,024 codes the published models predict
BOTH = r"(weight|bias)"


def from_dit(tensor: Tensor) -> Tensor:
    """Rows of a 6 d projection from DiT's order (shift, scale, gate, twice) to gates, scales, shifts."""
    return torch.cat([tensor.chunk(6)[i] for i in (2, 5, 1, 4, 0, 3)])


RULES = [
    Rule(r"cls_token", "start"),
    Rule(r"codes\.weight", "tokens.weight"),
    Rule(r"classes\.weight", "conditioner.table.weight"),
    Rule(r"pos_embed", "positions", change=lambda t: t[0]),
    Rule(r"target_aware_pos_embed", "targets", change=lambda t: t[0]),
    Rule(r"timesteps_embeddings", "places", change=lambda t: t[0]),
    Rule(rf"blocks\.(\d+)\.(norm1|norm2)\.{BOTH}", r"trunk.blocks.\1.\2.\3"),
    Rule(rf"blocks\.(\d+)\.attn\.(qkv|q_norm|k_norm)\.{BOTH}", r"trunk.blocks.\1.attention.\2.\3"),
    Rule(rf"blocks\.(\d+)\.attn\.proj\.{BOTH}", r"trunk.blocks.\1.attention.out.\2"),
    Rule(rf"blocks\.(\d+)\.mlp\.fc1\.{BOTH}", r"trunk.blocks.\1.ffn.up.\2"),
    Rule(rf"blocks\.(\d+)\.mlp\.fc2\.{BOTH}", r"trunk.blocks.\1.ffn.down.\2"),
    Rule(rf"blocks\.(\d+)\.adaLN_modulation\.1\.{BOTH}", r"trunk.blocks.\1.modulation.\2", change=from_dit),
    Rule(rf"adaln_before_head\.adaLN_modulation\.1\.{BOTH}", r"trunk.final.\1"),
    Rule(rf"lm_head\.{BOTH}", r"head.linear.\1"),
]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> RAR:
    """config: {"RAR_config": {"model": {"generator": arguments, "vq_model": {"codebook_size"}}}}, with the heads."""
    sections = dict(config.get("RAR_config", {}).get("model", {}))
    arguments = dict(sections.get("generator", {}))
    unknown = (
        (set(arguments) - ARGUMENTS) | (set(config) - {"RAR_config"}) | (set(sections) - {"generator", "vq_model"})
    )
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if "num_attention_heads" not in arguments:
        raise ValueError(f"{SOURCE}: the weights do not tell the number of heads: give generator.num_attention_heads")
    vocab_size, width = shape(state, "lm_head.weight", SOURCE)
    classes = shape(state, "embeddings.weight", SOURCE)[0] - vocab_size - 2
    tokens = shape(state, "pos_embed", SOURCE)[1] - SPARE
    depth = highest(state, r"blocks\.(\d+)\..*", SOURCE)
    hidden = shape(state, "blocks.0.mlp.fc1.weight", SOURCE)[0]
    told = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": hidden, "image_seq_len": tokens}
    check(arguments, {**told, "condition_num_classes": classes}, SOURCE)
    check(sections.get("vq_model", {}), {"codebook_size": vocab_size}, SOURCE)
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{SOURCE}: {tokens} tokens are not a square grid")
    state = dict(state)
    table = state.pop("embeddings.weight")
    state |= {"codes.weight": table[: vocab_size + 1], "classes.weight": table[vocab_size + 1 :]}
    module = RAR(
        TokenSpec(SequenceLayout.raster(side, side), (Part(tokens, vocab_size, CODE_CHANNELS),), 16 * side),
        classes,
        depth=depth,
        width=width,
        heads=arguments["num_attention_heads"],
        hidden=hidden,
        dropout=arguments.get("dropout", 0.1),
        attention_dropout=arguments.get("attn_drop", 0.1),
    )
    load_strict(module, translate(state, RULES, SOURCE), SOURCE)
    return module.eval()
