"""ResTok (Kwai-Kolors/ResTok, modeling/restok.py) as ResTok, with the published reshape.

File: xushu-me/restok_l_128.r256_in1k, pytorch_model.bin (strip `_orig_mod.`), flat. config is the original's own
configuration file: {"ResTok_config": {"model": {"vq_model": ..}, "dataset": ..}}. Training files also hold the heads
that align with a pretrained network (kept) and that network itself, foundation_model.* (remove it first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.maskgit_vqgan import check_network, cnn_rules, cnn_shape
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.restok import ResTok, level_sizes
from vtok.quantize.vq import VQ

SOURCE = "ResTok"
ARGUMENTS = {"codebook_size", "token_size", "use_l2_norm", "commitment_cost", "entropy_loss_ratio", "is_legacy"}
ARGUMENTS |= {"vit_enc_model_size", "vit_dec_model_size", "vit_enc_patch_size", "vit_dec_patch_size"}
ARGUMENTS |= {"num_latent_tokens", "num_min_tokens", "test_num_latent_tokens", "hierarchy_stages"}
ARGUMENTS |= {"drop_latent_tokens", "drop_prob", "encoder_feature_supervision", "decoder_feature_supervision"}
ARGUMENTS |= {"use_vf", "reverse_proj"}
# options that only one value is published of
PUBLISHED = {"merge_tokens": True, "residual_image_tokens": True, "residual_latent_tokens": True, "multi_quant": True}
PUBLISHED |= {"learnable_latent_tokens": False, "learnable_dec_image_tokens": True, "vae_encoder": True}
PUBLISHED |= {"latent_hierarchy": True, "learnable_dec_feat_tokens": True, "reduction_ratio": 0.5}
PUBLISHED |= {"rope_base_len": 10000}
NOTES = {"vit_small", "pixel_encoder_and_decoder_replaced_by"}  # of the recorded references
WB = r"(weight|bias)"
HALF = r"(encoder|decoder)"

RULES = (
    Rule(rf"{HALF}\.ln_pre\.{WB}", r"\1.norm_in.\2"),
    Rule(rf"{HALF}\.ln_post\.{WB}", r"\1.norm_out.\2"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.gamma_(1|2)", r"\1.trunk.blocks.\2.scale\3"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.norm(1|2)\.{WB}", r"\1.trunk.blocks.\2.norm\3.\4"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.attn\.(q|v)_bias", r"\1.trunk.blocks.\2.attention.\3_bias"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.attn\.(q|k)_norm\.{WB}", r"\1.trunk.blocks.\2.attention.\3_norm.\4"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.attn\.qkv\.weight", r"\1.trunk.blocks.\2.attention.qkv.weight"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.attn\.proj\.{WB}", r"\1.trunk.blocks.\2.attention.out.\3"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.mlp\.fc1\.{WB}", r"\1.trunk.blocks.\2.ffn.up.\3"),
    Rule(rf"{HALF}\.blocks\.(\d+)\.mlp\.fc2\.{WB}", r"\1.trunk.blocks.\2.ffn.down.\3"),
    Rule(rf"encoder\.patch_embed\.{WB}", r"encoder.embed.\1"),
    Rule(r"encoder\.conv_out\.(\d+)\.weight", r"encoder.out.\1.weight", change=lambda x: x.flatten(1)),
    Rule(r"encoder\.conv_out\.(\d+)\.bias", r"encoder.out.\1.bias"),
    Rule(rf"decoder\.decoder_embed\.(\d+)\.{WB}", r"decoder.embed.\1.\2"),
    Rule(r"decoder\.ffn\.weight", "decoder.out.weight", change=lambda x: x.flatten(1)),
    Rule(r"decoder\.ffn\.bias", "decoder.out.bias"),
    Rule(r"decoder\.mask_token", "decoder.mask", change=lambda x: x.flatten(0, 1)),
    Rule(r"decoder\.latent_mask_token", "fill", change=lambda x: x.flatten(0, 1)),
    Rule(r"decoder\.feat_mask_token", "semantic_mask", change=lambda x: x.flatten(0, 1)),
    Rule(r"vf_proj\.weight", "align_levels.weight", change=lambda x: x.flatten(1)),
    Rule(r"vf_proj_dec\.weight", "align_cells.weight", change=lambda x: x.flatten(1)),
    Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
)


def rules(levels: int, latent_levels: int, stages: int) -> list[Rule]:
    """The table for CNNs of `levels` resolutions; the level embeddings, one parameter each, become tables."""
    found = [*cnn_rules("pixel_encoder", "cnn_encoder", levels), *cnn_rules("pixel_decoder", "cnn_decoder", levels)]
    for i in range(latent_levels):
        pattern = rf"{HALF}\.latent_token_level_embedding\.{i}"
        found.append(Rule(pattern, r"\1.latent_level", part=(i, latent_levels)))
    for i in range(stages):
        found.append(Rule(rf"encoder\.level_embedding\.{i}", "encoder.image_level", part=(i, stages)))
    return [*RULES, *found]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ResTok:
    """config: {"ResTok_config": the original's configuration}; see above."""
    given = config.get("ResTok_config", {})
    arguments = dict(given.get("model", {}).get("vq_model", {}))
    unknown = (set(arguments) - ARGUMENTS - set(PUBLISHED)) | (set(config) - {"ResTok_config"} - NOTES)
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    check(arguments, PUBLISHED, SOURCE)
    network = cnn_shape(state, "pixel_encoder", SOURCE)
    check_network(config.get("pixel_encoder_and_decoder_replaced_by", {}), network, SOURCE)
    latent_levels = highest(state, r"encoder\.latent_token_level_embedding\.(\d+)", SOURCE)
    stages = highest(state, r"encoder\.level_embedding\.(\d+)", SOURCE)
    tensors = translate(state, rules(len(network["multipliers"]), latent_levels, stages), SOURCE)
    tokens = 2 ** (latent_levels - 1)
    vocab_size, channels = shape(state, "quantize.embedding.weight", SOURCE)
    check(arguments, {"codebook_size": vocab_size, "token_size": channels, "num_latent_tokens": tokens}, SOURCE)
    check(arguments, {"hierarchy_stages": stages}, SOURCE)
    quantizer = VQ(
        vocab_size=vocab_size,
        channels=channels,
        l2_norm=arguments.get("use_l2_norm", False),
        beta=arguments.get("commitment_cost", 0.25),
        entropy_weight=arguments.get("entropy_loss_ratio", 0.0),
    )
    nested: Any = "all"
    if arguments.get("drop_latent_tokens", True):
        nested = keep_weights(tokens, arguments.get("num_min_tokens", 4), arguments.get("drop_prob", 0.2))
    module = ResTok(
        image_size=given.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256),
        quantizer=quantizer,
        tokens=tokens,
        encoder=size(state, "encoder"),
        decoder=size(state, "decoder"),
        stages=stages,
        legacy_reshape=arguments.get("is_legacy", True),
        nested=nested,
        semantic=shape(state, "vf_proj.weight", SOURCE)[0] if "vf_proj.weight" in state else None,
        width=shape(state, "pixel_encoder.conv_out.weight", SOURCE)[0],
        **network,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()


def keep_weights(tokens: int, least: int, drop_prob: float) -> dict[int, int]:
    """{number kept: weight}: 1, 2, 4, .. for the ends of the levels from `least` on, together a share of `drop_prob`.

    Published: {4: 1, 8: 2, 16: 4, 32: 8, 64: 16, 128: 124}.
    """
    ends = [sum(level_sizes(tokens)[: i + 1]) for i in range(len(level_sizes(tokens)))]
    ends = [end for end in ends if end >= least]
    weights = {end: 2**i for i, end in enumerate(ends[:-1])}
    return weights | {tokens: sum(weights.values()) * (int(1 / drop_prob) - 1)}


def size(state: Mapping[str, Tensor], half: str) -> tuple[int, int, int]:
    """(width, depth, heads) of the encoder or decoder; heads follow from the width of a head's norm."""
    depth = highest(state, rf"{half}\.blocks\.(\d+)\..*", SOURCE)
    width = shape(state, f"{half}.ln_pre.weight", SOURCE)[0]
    return width, depth, width // shape(state, f"{half}.blocks.0.attn.q_norm.weight", SOURCE)[0]
