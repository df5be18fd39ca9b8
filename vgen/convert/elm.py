"""ELM's class-conditional transformer (Pepper-lll/LMforImageGeneration, llama/ar_model.py) as LlamaGen with sub-codes.

Files: gpt/{L,XL}-{1-16,2-8,2-10,2-12}.pth, gpt/XXL-{1-16,2-10,2-12}.pth, gpt/2B-2-12.pth of xuantonglll/ELM. Its tables
of sub-codes are concatenated and projected, ours are summed: every table is put through its part of the projection
here, which gives the same numbers. The first sub-code counts fastest in our ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgen.convert.llamagen import CLASS, Found, convert_as, raster
from vgen.models.llamagen import LlamaGen
from vtok.convert.table import Rule, highest, shape

SOURCE = "ELM"
# options of its class that no published file uses, as they are there; `split_embder` is never read
OFF = {"use_adaLN": False, "attn_type": "sdp", "pause": False, "cls_row": False, "pos_type": "rope2d"}
MORE = frozenset({*OFF, "pause_num", "token_each", "split_embder", "code_dim"})


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LlamaGen:
    """config: {"Transformer_ModelArgs": arguments}, at least n_head and, where it is not 256, block_size."""
    arguments = dict(config.get(CLASS, {}))
    arguments.pop("vocab_size", None)  # its class overwrites it by 2 ** code_dim
    for name, value in OFF.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{SOURCE}: {name}={arguments[name]} is not supported, only {value}")
    count = 1 if "tok_embedder.weight" in state else highest(state, r"tok_embedder\.(\d+)\.weight", SOURCE)
    if arguments.get("token_each", count) != count:
        raise ValueError(f"{SOURCE}: token_each={arguments['token_each']} in the config, but the weights have {count}")
    if count == 1:
        sizes = (shape(state, "tok_embedder.weight", SOURCE)[0],)
        rules = [Rule(r"tok_embedder\.weight", "tokens.weight")]
    else:
        sizes = tuple(shape(state, f"tok_embedder.{i}.weight", SOURCE)[0] for i in range(count))
        rules = [Rule(rf"tok_embedder\.{i}\.weight", "tokens.weight", part=(i, count)) for i in range(count)]
        rules += [Rule(rf"output\.{i}\.weight", "head.linear.weight", part=(i, count)) for i in range(count)]
        state = projected(state, count)
    bits = arguments.get("code_dim", sizes[0].bit_length() - 1)
    if {2**bits} != set(sizes):
        raise ValueError(f"{SOURCE}: code_dim={bits} in the config, but the weights have tables of {list(sizes)} rows")

    def make(found: Found) -> LlamaGen:
        spec = raster(found, SOURCE, bits * count)
        return LlamaGen(spec, found.classes, factors=sizes if count > 1 else None, **found.sizes)

    config = {**config, CLASS: arguments}
    return convert_as(state, config, make, source=SOURCE, rules=rules, more=MORE, vocab_size=math.prod(sizes))


def projected(state: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The state without `proj`, its tables put through it."""
    state, width = dict(state), shape(state, "tok_embedder.0.weight", SOURCE)[1]
    have, want = shape(state, "proj.weight", SOURCE), (width, count * width)
    if have != want:
        raise ValueError(f"{SOURCE}: proj.weight is {have}, not {want}")
    parts = state.pop("proj.weight").double().split(width, dim=1)
    for i, part in enumerate(parts):
        table = state[f"tok_embedder.{i}.weight"]
        state[f"tok_embedder.{i}.weight"] = (table.double() @ part.T).to(table.dtype)
    return state
