"""LlamaGen's class-conditional GPT (FoundationVision/LlamaGen, autoregressive/models/gpt.py) as LlamaGen.

Files: c2i_{B,L,XL,XXL,3B}_{256,384}.pt, under the key "model" where DDP wrote them. `freqs_cis` (a rope table that some
hold) is dropped: ours is rebuilt. Gate and value of the feed-forward become one projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vgen.generator import Generator
from vgen.models.llamagen import LlamaGen
from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

SOURCE = "LlamaGen GPT"
CLASS = "Transformer_ModelArgs"
ARGUMENTS = {"dim", "n_layer", "n_head", "n_kv_head", "multiple_of", "ffn_dim_multiplier", "rope_base", "norm_eps"}
ARGUMENTS |= {"initializer_range", "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p"}
ARGUMENTS |= {"drop_path_rate", "num_classes", "caption_dim", "class_dropout_prob", "model_type", "vocab_size"}
ARGUMENTS |= {"cls_token_num", "block_size", "max_batch_size", "max_seq_len"}
CODE_CHANNELS = 8  # of the published tokenizers VQ-16 and VQ-8

RULES = [
    Rule(r"cls_embedding\.embedding_table\.weight", "conditioner.table.weight"),
    Rule(r"tok_embeddings\.weight", "tokens.weight"),
    Rule(r"layers\.(\d+)\.attention_norm\.weight", r"trunk.blocks.\1.norm1.weight"),
    Rule(r"layers\.(\d+)\.ffn_norm\.weight", r"trunk.blocks.\1.norm2.weight"),
    Rule(r"layers\.(\d+)\.attention\.wqkv\.weight", r"trunk.blocks.\1.attention.qkv.weight"),
    Rule(r"layers\.(\d+)\.attention\.wo\.weight", r"trunk.blocks.\1.attention.out.weight"),
    Rule(r"layers\.(\d+)\.feed_forward\.w1\.weight", r"trunk.blocks.\1.ffn.up.weight", part=(0, 2)),
    Rule(r"layers\.(\d+)\.feed_forward\.w3\.weight", r"trunk.blocks.\1.ffn.up.weight", part=(1, 2)),
    Rule(r"layers\.(\d+)\.feed_forward\.w2\.weight", r"trunk.blocks.\1.ffn.down.weight"),
    Rule(r"norm\.weight", "trunk.norm.weight"),
    Rule(r"output\.weight", "head.linear.weight"),
    Rule(r"freqs_cis", None),
]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LlamaGen:
    """config: {"Transformer_ModelArgs": arguments}, at least n_head and, where it is not 256, block_size."""

    def make(found: Found) -> LlamaGen:
        return LlamaGen(raster(found, SOURCE), found.classes, **found.sizes)

    return convert_as(state, config, make, source=SOURCE)


@dataclass(frozen=True)
class Found:
    """What weights and arguments tell: arguments as given, and `sizes`, ours for every family of this kind."""

    arguments: dict[str, Any]
    tokens: int
    vocab_size: int
    classes: int
    sizes: dict[str, Any]


def raster(found: Found, source: str, channels: int = CODE_CHANNELS) -> TokenSpec:
    """Tokens on a square grid, of a tokenizer with stride 16. ValueError where their number is no square."""
    side = math.isqrt(found.tokens)
    if side * side != found.tokens:
        raise ValueError(f"{source}: block_size={found.tokens} is not a square grid")
    part = Part(found.tokens, found.vocab_size, channels)
    return TokenSpec(SequenceLayout.raster(side, side), (part,), 16 * side)


def convert_as(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    make: Callable[[Found], Generator],
    *,
    source: str,
    rules: Sequence[Rule] = (),
    more: frozenset[str] = frozenset(),
    vocab_size: int | None = None,
) -> Generator:
    """A model of LlamaGen's kind. make: builds the module; rules, more: keys and arguments that LlamaGen lacks, rules
    before LlamaGen's own; vocab_size: where there is no one table of tokens that tells it."""
    arguments = dict(config.get(CLASS, {}))
    unknown = (set(arguments) - ARGUMENTS - more) | (set(config) - {CLASS})
    if unknown:
        raise ValueError(f"{source}: unknown arguments {sorted(unknown)}")
    if "n_head" not in arguments:
        raise ValueError(f"{source}: the weights do not tell the number of heads: give {CLASS}.n_head")
    refused = {"n_kv_head": (None, arguments["n_head"]), "model_type": ("c2i",), "cls_token_num": (1,)}
    for name, allowed in (refused | {"norm_eps": (1e-5,), "drop_path_rate": (0.0,)}).items():
        if arguments.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{source}: {name}={arguments[name]} is not supported, only {allowed[-1]}")
    if arguments.get("resid_dropout_p", 0.1) != arguments.get("ffn_dropout_p", 0.1):
        raise ValueError(f"{source}: resid_dropout_p and ffn_dropout_p differ; our block has one dropout")
    tensors = translate(state, [*rules, *RULES], source)
    rows, width = shape(state, "cls_embedding.embedding_table.weight", source)
    vocab_size = vocab_size or shape(state, "tok_embeddings.weight", source)[0]
    depth = highest(state, r"layers\.(\d+)\..*", source)
    hidden = shape(state, "layers.0.feed_forward.w1.weight", source)[0]
    check(arguments, {"dim": width, "n_layer": depth, "vocab_size": vocab_size, "num_classes": rows - 1}, source)
    sizes = {
        "depth": depth,
        "width": width,
        "heads": arguments["n_head"],
        "multiple_of": arguments.get("multiple_of", 256),
        "theta": float(arguments.get("rope_base", 10000)),
        "token_dropout": arguments.get("token_dropout_p", 0.1),
        "dropout": arguments.get("resid_dropout_p", 0.1),
        "attention_dropout": arguments.get("attn_dropout_p", 0.0),
        "label_drop": arguments.get("class_dropout_prob", 0.1),
    }
    module = make(Found(arguments, arguments.get("block_size", 256), vocab_size, rows - 1, sizes))
    have = module.trunk.blocks[0].ffn.down.in_features
    if have != hidden:
        raise ValueError(f"{source}: multiple_of makes the feed-forward {have} wide, but the weights have {hidden}")
    load_strict(module, tensors, source)
    return module.eval()
