"""TiTok's MaskGIT generators (bytedance/1d-tokenizer, modeling/maskgit.py) as MaskGIT.

Files: yucornetto/generator_titok_{l32,b64,s128}_imagenet. One table holds codes, the mask token, classes and no class;
here the first two are `tokens`, the others the conditioner's. BERT's projections of query, key and value are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.models.maskgit import MaskGIT
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "TiTok MaskGIT"
CLASSES = {"ImageBert_config": "bert", "UViTBert_config": "uvit"}
GENERATOR = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "dropout", "attn_drop"}
GENERATOR |= {"image_seq_len", "condition_num_classes", "model_type", "num_steps", "class_label_dropout"}
GENERATOR |= {"randomize_temperature", "guidance_scale", "guidance_decay"}
CODE_CHANNELS = 12  # of TiTok's codes
BOTH = r"(weight|bias)"
LAYER = r"model\.encoder\.layer\.(\d+)"

BERT = [
    Rule(r"model\.embeddings\.position_embeddings\.weight", "position"),
    Rule(r"model\.embeddings\.token_type_embeddings\.weight", "segment"),
    Rule(rf"model\.embeddings\.LayerNorm\.{BOTH}", r"embedding_norm.\1"),
    *(
        Rule(rf"{LAYER}\.attention\.self\.{name}\.{BOTH}", r"trunk.blocks.\1.attention.qkv.\2", part=(i, 3))
        for i, name in enumerate(("query", "key", "value"))
    ),
    Rule(rf"{LAYER}\.attention\.output\.dense\.{BOTH}", r"trunk.blocks.\1.attention.out.\2"),
    Rule(rf"{LAYER}\.attention\.output\.LayerNorm\.{BOTH}", r"trunk.blocks.\1.norm1.\2"),
    Rule(rf"{LAYER}\.intermediate\.dense\.{BOTH}", r"trunk.blocks.\1.ffn.up.\2"),
    Rule(rf"{LAYER}\.output\.dense\.{BOTH}", r"trunk.blocks.\1.ffn.down.\2"),
    Rule(rf"{LAYER}\.output\.LayerNorm\.{BOTH}", r"trunk.blocks.\1.norm2.\2"),
    Rule(rf"model\.lm_head\.{BOTH}", r"head.linear.\1"),
]


def _uvit(half: int) -> list[Rule]:
    """Blocks of the two halves are numbered on; the middle one lies between them."""
    rules = []
    for group, index in ((r"in_blocks\.(\d+)", 0), ("mid_block()", half), (r"out_blocks\.(\d+)", half + 1)):

        def block(match: Any, index: int = index) -> str:
            return f"trunk.blocks.{index + int(match[1] or 0)}"

        names = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "attention.qkv", "attn.proj": "attention.out"}
        for theirs, ours in (names | {"mlp.fc1": "ffn.up", "mlp.fc2": "ffn.down"}).items():

            def target(match: Any, ours: str = ours, block: Any = block) -> str:
                return f"{block(match)}.{ours}.{match[2]}"

            rules.append(Rule(rf"{group}\.{theirs}\.{BOTH}".replace("attn.", r"attn\."), target))
    return [
        *rules,
        Rule(rf"out_blocks\.(\d+)\.skip_linear\.{BOTH}", r"trunk.skips.\1.\2"),
        Rule(r"pos_embed", "position", change=lambda t: t[0]),
        Rule(rf"norm\.{BOTH}", r"trunk.norm.\1"),
        Rule(rf"lm_head\.{BOTH}", r"head.linear.\1"),
    ]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MaskGIT:
    """config: {"ImageBert_config" or "UViTBert_config": the original's config}, of which `model` is read."""
    name = next(iter(config), None)
    if len(config) != 1 or name not in CLASSES:
        raise ValueError(f"{SOURCE}: config names {sorted(config)}, expected one of {', '.join(CLASSES)}")
    arch, sections = CLASSES[name], dict(config[name].get("model", {}))
    arguments = dict(sections.get("generator", {}))
    unknown = (set(arguments) - GENERATOR) | (set(sections) - {"generator", "vq_model"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    bert = arch == "bert"
    table = "model.embeddings.word_embeddings.weight" if bert else "embeddings.weight"
    rows, width = shape(state, table, SOURCE)
    vocab_size = shape(state, "model.lm_head.weight" if bert else "lm_head.weight", SOURCE)[0]
    length = shape(state, "model.embeddings.position_embeddings.weight" if bert else "pos_embed", SOURCE)[-2] - 1
    hidden = shape(
        state, f"{'model.encoder.layer.0.intermediate.dense' if bert else 'mid_block.mlp.fc1'}.weight", SOURCE
    )
    classes = rows - vocab_size - 2
    depth = highest(state, rf"{LAYER}\..*", SOURCE) if bert else 2 * highest(state, r"in_blocks\.(\d+)\..*", SOURCE)
    told = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": hidden[0], "image_seq_len": length}
    check(arguments, told | {"condition_num_classes": classes}, SOURCE)
    check(sections.get("vq_model", {}), {"codebook_size": vocab_size}, SOURCE)
    if "num_attention_heads" not in arguments:
        raise ValueError(f"{SOURCE}: the weights do not tell the number of heads: give num_attention_heads")
    spec = TokenSpec(SequenceLayout.line(length), (Part(length, vocab_size, CODE_CHANNELS),), 256)
    module = MaskGIT(
        spec,
        classes,
        depth=depth,
        width=width,
        heads=arguments["num_attention_heads"],
        hidden=hidden[0],
        arch=arch,
        steps=arguments.get("num_steps", 8),
        dropout=arguments.get("dropout", 0.1),
        attention_dropout=arguments.get("attn_drop", 0.1),
        label_drop=arguments.get("class_label_dropout", 0.1),
    )
    rest = {key: value for key, value in state.items() if key != table}
    tensors = translate(rest, BERT if bert else _uvit(depth // 2), SOURCE)
    tensors["tokens.weight"], tensors["conditioner.table.weight"] = state[table].split([vocab_size + 1, classes + 1])
    load_strict(module, tensors, SOURCE)
    return module.eval()
