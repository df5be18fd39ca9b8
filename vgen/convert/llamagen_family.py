"""Generators that are "LlamaGen, except": GigaTok and ReTok, D-AR, ResTok's HAR, DetailFlow, Hita and iFSQ's.

Keys are LlamaGen's and a few more; the functions here say which, and what the original's own arguments mean.
Files: GigaTok and ReTok GPT_*.pt, D-AR-{L,XL}-360K.pt, llamagen_l_c2i_restok_l_128.r256_in1k, DetailFlow-*-GPT-L,
Hita's GPT-{B,L,XL,XXL,2B}-*e.pt; strip `_orig_mod.` and take the weights out of "model" or "module" first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vgen.convert.llamagen import RULES, Found, convert_as, raster
from vgen.generator import Generator
from vgen.models.detailflow import DetailFlow
from vgen.models.har import HAR
from vgen.models.hita import HitaGPT
from vgen.models.llamagen import LlamaGen
from vgen.models.repa import LlamaGenREPA
from vtok.convert.table import Rule, highest
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, TokenSpec

CODE_CHANNELS = 8  # of all these tokenizers' codes but Hita's holistic ones
BOTH = r"(weight|bias)"
SPECIALS = Rule(r"spe_tok_embeddings\.special_embeddings\.weight", "specials.weight")


def line(found: Found, image_size: int = 256) -> TokenSpec:
    """One-dimensional tokens of one vocabulary."""
    part = Part(found.tokens, found.vocab_size, CODE_CHANNELS)
    return TokenSpec(SequenceLayout.line(found.tokens), (part,), image_size)


def gigatok(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Learned positions; optionally adaLN (a projection a block, or one with a learned offset a block) and qk-norm."""

    def from_dit(parts: int, dim: int) -> Callable[[Tensor], Tensor]:
        """Shift, scale, gate, twice (or shift, scale) to gates, scales, shifts (or scale, shift)."""
        order = (2, 5, 1, 4, 0, 3) if parts == 6 else (1, 0)
        return lambda tensor: torch.cat([tensor.chunk(parts, dim=dim)[i] for i in order], dim=dim)

    rules = [
        Rule(r"positional_embedding", "positions"),
        Rule(rf"layers\.(\d+)\.attention\.([qk]_norm)\.{BOTH}", r"trunk.blocks.\1.attention.\2.\3"),
        Rule(rf"layers\.(\d+)\.adaLN_modulation\.1\.{BOTH}", r"trunk.blocks.\1.modulation.\2", change=from_dit(6, 0)),
        Rule(r"layers\.(\d+)\.ada_gss", r"trunk.blocks.\1.offset", change=from_dit(6, 2)),
        Rule(rf"adaLN\.1\.{BOTH}", r"trunk.shared.\1", change=from_dit(6, 0)),
        Rule(rf"final_adaLN\.1\.{BOTH}", r"trunk.final.\1", change=from_dit(2, 0)),
    ]

    def make(found: Found) -> LlamaGen:
        given = found.arguments
        for name in ("rope", "no_adaLN_before"):
            if given.get(name):
                raise ValueError(f"GigaTok GPT: {name}={given[name]} is not supported; no published model has it")
        own, shared = given.get("use_adaLN", False), given.get("use_simple_adaLN", False)
        return LlamaGen(
            line(found),
            found.classes,
            position="learned",
            modulation="own" if own else "shared" if shared else "none",
            qk_norm="layer" if given.get("use_qk_norm", False) else "none",
            **found.sizes,
        )

    more = {"rope", "use_qk_norm", "use_flash_attn", "use_adaLN", "use_simple_adaLN", "no_adaLN_before"}
    return convert_as(state, config, make, source="GigaTok GPT", rules=rules, more=frozenset(more))


def dar(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Rope along the sequence, the class included."""

    def make(found: Found) -> LlamaGen:
        return LlamaGen(line(found), found.classes, position="rope_1d", **found.sizes)

    return convert_as(state, config, make, source="D-AR GPT")


def har(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Levels; spe_token_num is always block_size - 1."""

    def make(found: Found) -> HAR:
        if found.arguments.get("spe_token_num", found.tokens - 1) != found.tokens - 1:
            raise ValueError(f"HAR: spe_token_num={found.arguments['spe_token_num']}, only block_size - 1 is supported")
        return HAR(line(found), found.classes, first=found.arguments.get("ar_token_num", 4), **found.sizes)

    more = frozenset({"ar_token_num", "spe_token_num"})
    return convert_as(state, config, make, source="HAR", rules=[SPECIALS], more=more)


def detailflow(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Groups; learnable_tok_embeddings (false froze the token table) says nothing about the numbers."""

    def make(found: Found) -> DetailFlow:
        group, first = found.arguments.get("group_size", 8), found.arguments.get("causal_num")
        return DetailFlow(line(found), found.classes, group=group, first=first or group, **found.sizes)

    more = frozenset({"group_size", "causal_num", "learnable_tok_embeddings"})
    return convert_as(state, config, make, source="DetailFlow GPT", rules=[SPECIALS], more=more)


def hita(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """Two tables and a head of twice the vocabulary: holistic queries first, then the grid. last_query=grid: as the
    original samples, which its published numbers are of; its training read the last query by its own table."""
    rules = [Rule(r"slot_embeddings\.weight", "queries.weight"), Rule(r"slot_pos\.weight", "query_positions")]

    def make(found: Found) -> HitaGPT:
        queries, side = found.arguments.get("num_slots", 128), math.isqrt(found.tokens)
        if side * side != found.tokens:
            raise ValueError(f"Hita GPT: block_size={found.tokens} is not a square grid")
        return HitaGPT(hita_spec(queries, side, found.vocab_size), found.classes, last_query="grid", **found.sizes)

    return convert_as(state, config, make, source="Hita GPT", rules=rules, more=frozenset({"num_slots"}))


def ifsq(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """LlamaGen, or with z_dims LlamaGen-REPA. vocab_size may be a list: more than one are sizes of sub-codes, the first
    of which counts fastest in our ids, as in FSQ's indices."""
    arguments = dict(config.get("Transformer_ModelArgs", {}))
    sizes = arguments.get("vocab_size")
    factors = tuple(sizes) if isinstance(sizes, Sequence) and len(sizes) > 1 else ()
    if isinstance(sizes, Sequence):
        arguments["vocab_size"] = math.prod(sizes)
    have = [len(state[key]) for i in range(len(factors)) if (key := f"{i}_emb.weight") in state]
    if have != list(factors):
        raise ValueError(f"iFSQ GPT: vocab_size={list(sizes)} in the config, but the weights have sub-codes {have}")
    widths = arguments.get("z_dims") or []
    if len(widths) > 1:
        raise ValueError(f"iFSQ GPT: z_dims={list(widths)}: only one vision model is supported")
    rules = [Rule(rf"projectors\.0\.([024])\.{BOTH}", r"projector.\1.\2")] if widths else []
    rules += _sub_codes(len(factors)) if factors else []

    def make(found: Found) -> LlamaGen:
        more = {}
        if factors:
            depth = highest(state, r"factorized_blocks\.(\d+)\..*", "iFSQ GPT")
            more = {"factors": factors, "factor_depth": depth, "factor_tied": True}
        spec = raster(found, "iFSQ GPT")
        if not widths:
            return LlamaGen(spec, found.classes, **more, **found.sizes)
        if found.sizes["theta"] != 10000 or found.sizes["attention_dropout"]:
            raise ValueError("iFSQ GPT: with z_dims only rope_base=10000 and attn_dropout_p=0 are supported")
        taken = {k: v for k, v in found.sizes.items() if k not in ("theta", "attention_dropout")}
        block, hidden = found.arguments.get("encoder_depth", 8), found.arguments.get("projector_dim", 2048)
        return LlamaGenREPA(spec, found.classes, block=block, channels=widths[0], hidden=hidden, **more, **taken)

    more = frozenset({"factorized_n_layer", "use_checkpoint", "z_dims", "encoder_depth", "projector_dim"})
    config = {**config, "Transformer_ModelArgs": arguments}
    vocab_size = math.prod(factors) if factors else None
    return convert_as(state, config, make, source="iFSQ GPT", rules=rules, more=more, vocab_size=vocab_size)


def _sub_codes(count: int) -> list[Rule]:
    """Of tables, outputs and the transformer over sub-codes, whose blocks are named as the trunk's are."""
    blocks = [
        replace(rule, pattern=rule.pattern.replace("layers", "factorized_blocks"), target=f"head.{rule.target}")
        for rule in RULES
        if rule.pattern.startswith("layers")
    ]
    tables = [Rule(rf"{i}_emb\.weight", "head.tokens.weight", part=(i, count)) for i in range(count)]
    outputs = [Rule(rf"output\.{i}\.weight", "head.linear.weight", part=(i, count)) for i in range(count)]
    return [*blocks, *tables, *outputs, Rule(r"norm\.weight", "head.trunk.norm.weight")]


def hita_spec(queries: int, side: int, vocab_size: int) -> TokenSpec:
    """Holistic queries on a line, then a square grid."""
    coords = tuple((0, 0, i) for i in range(queries)) + tuple((1, r, c) for r in range(side) for c in range(side))
    parts = (Part(queries, vocab_size, 12), Part(side * side, vocab_size, CODE_CHANNELS))
    return TokenSpec(SequenceLayout((1,) * len(coords), coords), parts, 16 * side)
