"""D-AR's tokenizer (showlab/D-AR, tokenizer/tokenizer_image/vq_model.py) as DARTokenizer.

File: D-AR-tokenizer_v1.pt; pass its `ema` entry, or `model`. `codebook_used`, a ring of recent ids, is dropped. The
original's time runs from noise to data, so its velocity is ours negated; its noisy patches order channels before rows
and columns, ours behind them; its modulation has shift, scale, gate of attention, then of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.dar import DARTokenizer
from vtok.quantize.vq import VQ

SOURCE = "D-AR tokenizer"
ARGUMENTS = {"encoder_patch_size", "num_encoder_layers", "num_decoder_layers", "query_low_rank", "encoder_dim"}
ARGUMENTS |= {"decoder_dim", "vq_dim", "vq_codebook_size", "num_denoising_steps", "num_query_groups", "num_all_queries"}
ARGUMENTS |= {"queries_per_step", "vq_enable", "sampling_resolution", "diff_decoder"}
FLOW_ARGUMENTS = {"in_dim", "out_dim", "dim", "cond_dim", "patch_size", "depth", "data_std", "time_shift", "mlp_head"}
FLOW_ARGUMENTS |= {"share_time_encoding"}
HEAD = 64  # channels of a head, fixed in the original
P = r"(weight|bias)"


def reordered(weight: Tensor) -> Tensor:
    """Rows (shift, scale, gate) x (attention, feed-forward) to gate 1, gate 2, scale 1, scale 2, shift 1, shift 2."""
    parts = weight.chunk(6)
    return torch.cat([parts[i] for i in (2, 5, 1, 4, 0, 3)])


def attention(source: str, target: str) -> list[Rule]:
    """Self-attention with q, k, v joined."""
    rules = [Rule(rf"{source}\.{n}\.{P}", rf"{target}.qkv.\3", part=(i, 3)) for i, n in enumerate("qkv")]
    rules += [Rule(rf"{source}\.({n}_norm)\.{P}", rf"{target}.\3.\4") for n in "qk"]
    return [*rules, Rule(rf"{source}\.proj\.{P}", rf"{target}.out.\3")]


def rules(patch: int) -> list[Rule]:
    """The table for a flow with patches of that side."""

    def pixels_last(weight: Tensor) -> Tensor:  # [D, 3 p p, 1, 1] to [D, 3, p, p]
        return weight.view(len(weight), 3, patch, patch)

    def pixels_out(weight: Tensor) -> Tensor:  # rows (3, p, p) to (p, p, 3), negated
        return -weight.flatten(1).view(3, patch * patch, -1).transpose(0, 1).reshape(weight.shape[0], -1)

    def bias_out(bias: Tensor) -> Tensor:
        return -bias.view(3, patch * patch).T.reshape(-1)

    layer, block = r"(encoder|decoder)_layers\.(\d+)", r"diff_decoder\.(net)\.blocks\.(\d+)"
    trunk, ours = r"\1.blocks.\2", r"flow.blocks.\2"
    cross = [
        Rule(rf"{block}\.cross_attn\.q\.{P}", rf"{ours}.cross.q.\3"),
        Rule(rf"{block}\.cross_attn\.k\.{P}", rf"{ours}.cross.kv.\3", part=(0, 2)),
        Rule(rf"{block}\.cross_attn\.v\.{P}", rf"{ours}.cross.kv.\3", part=(1, 2)),
        Rule(rf"{block}\.cross_attn\.([qk]_norm)\.{P}", rf"{ours}.cross.\3.\4"),
        Rule(rf"{block}\.cross_attn\.proj\.{P}", rf"{ours}.cross.out.\3"),
    ]
    return [
        Rule(rf"patchify\.{P}", r"patches.conv.\1"),
        Rule(r"query_embedding\.weight", "queries"),
        Rule(rf"query_linear\.{P}", r"query_out.\1"),
        Rule(rf"{layer}\.gate(1|2)", rf"{trunk}.scale\3"),
        *attention(rf"{layer}\.attention", f"{trunk}.attention"),
        Rule(rf"{layer}\.(norm1|norm2)\.{P}", rf"{trunk}.\3.\4"),
        Rule(rf"{layer}\.mlp\.fc1\.{P}", rf"{trunk}.ffn.up.\3"),
        Rule(rf"{layer}\.mlp\.fc2\.{P}", rf"{trunk}.ffn.down.\3"),
        Rule(r"quant_in_conv\.weight", "project_in.weight", change=lambda w: w.flatten(1)),
        Rule(r"quant_out_conv\.weight", "project_out.weight", change=lambda w: w.flatten(1)),
        Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
        Rule(r"quantize\.codebook_used", None),
        Rule(r"decoder_embedding\.weight", "places"),
        Rule(rf"diff_decoder\.net\.cond_mlp\.{P}", r"flow.condition.\1"),
        Rule(r"diff_decoder\.net\.conv_in\.weight", "flow.conv_in.conv.weight", change=pixels_last),
        Rule(r"diff_decoder\.net\.conv_in\.bias", "flow.conv_in.conv.bias"),
        Rule(r"diff_decoder\.net\.conv_out\.weight", "flow.out.weight", change=pixels_out),
        Rule(r"diff_decoder\.net\.conv_out\.bias", "flow.out.bias", change=bias_out),
        Rule(rf"diff_decoder\.net\.repa_out\.(\d)\.{P}", r"flow.repa.\1.\2"),
        *attention(rf"{block}\.attention", f"{ours}.block.attention"),
        *cross,
        Rule(rf"{block}\.mlp\.fc1\.{P}", rf"{ours}.block.ffn.up.\3"),
        Rule(rf"{block}\.mlp\.fc2\.{P}", rf"{ours}.block.ffn.down.\3"),
        Rule(rf"{block}\.adaLN_modulation\.1\.{P}", rf"{ours}.block.modulation.\3", change=reordered),
        Rule(rf"{block}\.time_embed\.mlp\.0\.{P}", rf"{ours}.time.up.\3"),
        Rule(rf"{block}\.time_embed\.mlp\.2\.{P}", rf"{ours}.time.down.\3"),
        Rule(rf"{block}\.cond_embed\.(0|2)\.{P}", rf"{ours}.condition.\3.\4"),
    ]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DARTokenizer:
    """config: {"VQModel": the original's configuration, configs/tokenizer_v1.yaml: `model`}; the sampling resolution
    is the image size, 256 by default. A `note` beside it is ignored. Only the published kind of flow is supported.
    """
    arguments = dict(config.get("VQModel", {}))
    flow = dict(arguments.get("diff_decoder", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(flow) - FLOW_ARGUMENTS) | (set(config) - {"VQModel", "note"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if not arguments.get("vq_enable", True) or flow.get("mlp_head", False) or flow.get("share_time_encoding", False):
        raise ValueError(f"{SOURCE}: only vq_enable=True, mlp_head=False and share_time_encoding=False are supported")
    patch = int((shape(state, "diff_decoder.net.conv_in.weight", SOURCE)[1] // 3) ** 0.5)
    tensors = translate(state, rules(patch), SOURCE)
    vocab_size, channels = shape(state, "quantize.embedding.weight", SOURCE)
    dim, _, side, _ = shape(state, "patchify.weight", SOURCE)
    flow_dim = shape(state, "diff_decoder.net.conv_in.weight", SOURCE)[0]
    depths = [highest(state, rf"{half}_layers\.(\d+)\..*", SOURCE) for half in ("encoder", "decoder")]
    flow_depth = highest(state, r"diff_decoder\.net\.blocks\.(\d+)\..*", SOURCE)
    tokens, groups = arguments.get("num_all_queries", 256), arguments.get("num_query_groups", 8)
    low_rank = "query_linear.weight" in state
    found = {"encoder_patch_size": side, "encoder_dim": dim, "decoder_dim": dim, "vq_dim": channels}
    found |= {"vq_codebook_size": vocab_size, "num_encoder_layers": depths[0], "num_decoder_layers": depths[1]}
    found |= {"query_low_rank": low_rank, "queries_per_step": tokens // groups, "num_denoising_steps": groups}
    check(arguments, found, SOURCE)
    found = {"in_dim": 3, "out_dim": 3, "dim": flow_dim, "cond_dim": dim, "patch_size": patch, "depth": flow_depth}
    check(flow, found, SOURCE)
    tapped = "diff_decoder.net.repa_out.4.weight" in state
    module = DARTokenizer(
        image_size=arguments.get("sampling_resolution", 256),
        quantizer=VQ(vocab_size=vocab_size, channels=channels, l2_norm=True, beta=0.25),
        patch=side,
        dim=dim,
        depth=depths[0],
        decoder_depth=depths[1],
        heads=dim // HEAD,
        tokens=tokens,
        groups=groups,
        query_rank=shape(state, "query_embedding.weight", SOURCE)[1] if low_rank else None,
        max_tokens=shape(state, "query_embedding.weight", SOURCE)[0],
        flow_patch=patch,
        flow_dim=flow_dim,
        flow_depth=flow_depth,
        flow_heads=flow_dim // HEAD,
        data_std=flow.get("data_std", 1.0),
        time_shift=flow.get("time_shift", 1.0),
        repa_block=8 if tapped else None,
        repa_width=shape(state, "diff_decoder.net.repa_out.4.weight", SOURCE)[0] if tapped else 768,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
