"""GigaTok's and ReToK's tokenizers (SilentView/GigaTok, zfu006/ReTok; tokenizer/tokenizer_image/vq/vq_vit_model.py).

Files: VQ_SS256_e100.pt, VQ_SB256_e200.pt, VQ_BL256_e200.pt, VQ_BL256_dino_disc.pt, VQ_XLXXL256_e300.pt; for ReToK
VQ_SB256_e250.pt. Pass their `model` entry (or `ema`). `codebook_used`, a ring of recent ids, is dropped. Attention
weights are split into q, k and v; ReToK's two tables of positions become one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import llamagen
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.gigatok import GigaTok
from vtok.quantize.vq import VQ

SOURCE = "GigaTok"
NAME = "VQVitModelPlusArgs"
NOTES = ("vit_small", "replaced")  # of the goldens: what stands in for the published sizes
HEADS = {"tiny": 4, "small": 8, "base": 12, "large": 16, "xl": 20, "xxl": 24}
DEFAULTS = {"codebook_l2_norm": True, "commit_loss_beta": 0.25, "entropy_loss_ratio": 0.0, "rot": False}
READ = {*DEFAULTS, "codebook_size", "codebook_embed_dim", "codebook_show_usage", "encoder_ch_mult", "decoder_ch_mult"}
READ |= {"model_size", "encoder_size", "decoder_size", "num_latent_tokens", "z_channels", "distill_depth"}
READ |= {"out_inner_dim", "fea_rec_loss_weight"}
# arguments of the original with the one value that all published models have and that ours implements
FIXED = {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True, "use_attn": False, "dropout_p": 0.0}
FIXED |= {"fea_rec_loss_type": "mse", "last_level_2d_query_init": False, "multi_level_2d_query_init": False}
FIXED |= {"learnable_1d_query_init": False, "learnable_2d_query_init": False, "rope_1d": False, "rope_2d": False}
FIXED |= {"use_rope": False, "use_qk_norm": False, "use_flash_attn": False, "use_lfq": False, "stochastic": False}
FIXED |= {"simvq": False, "with_prior_model": False, "encoder_2d_distill": False, "res_up_down_sample": False}
FIXED |= {"res_codebook_updown_sample": False, "downsample_improve": False}

WB = r"(weight|bias)"
FORMER = {"s2to1encoder": "to_tokens", "s1to2decoder": "to_grid"}


def _rules() -> tuple[Rule, ...]:
    rules = [
        Rule(rf"decoder\.conv_blocks\.(\d+)\.upsample\.conv1\.{WB}", r"decoder.levels.\1.resample.conv.\2"),
        Rule(rf"(encoder|decoder)\.mid\.(\d+)\.(norm1|conv1|norm2|conv2)\.{WB}", r"\1.mid.\2.\3.\4"),
        Rule(rf"decoder\.adaptive\.(\d+)\.gamma\.{WB}", r"decoder.adaptive.\1.scale.\2"),
        Rule(rf"decoder\.adaptive\.(\d+)\.beta\.{WB}", r"decoder.adaptive.\1.bias.\2"),
        Rule(rf"s1to2decoder\.distill_mlp\.(\d+)\.{WB}", r"alignment.\1.\2"),
        Rule(rf"s1to2decoder\.conv_out\.{WB}", r"to_grid.out.\1"),
        Rule(r"s2to1encoder\.conv_out\.weight", "to_tokens.out.weight", change=lambda w: w.flatten(1)),
        Rule(r"s2to1encoder\.conv_out\.bias", "to_tokens.out.bias"),
        Rule(rf"s2to1encoder\.global_proj\.{WB}", r"to_tokens.query.\1"),
        Rule(r"quant_conv\.weight", "project_in.weight", change=lambda w: w.flatten(1)),
        Rule(r"post_quant_conv\.weight", "project_out.weight", change=lambda w: w.flatten(1)),
    ]
    for theirs, ours in FORMER.items():
        rules += [
            Rule(rf"{theirs}\.ln_pre\.{WB}", rf"{ours}.norm_in.\1"),
            Rule(rf"{theirs}\.(?:en|de)coder_embed\.{WB}", rf"{ours}.embed.\1"),
            Rule(rf"{theirs}\.ln_post\.{WB}", rf"{ours}.norm.\1"),
            Rule(rf"{theirs}\.transformer\.(\d+)\.(norm[123])\.{WB}", rf"{ours}.layers.\1.\2.\3"),
            Rule(rf"{theirs}\.transformer\.(\d+)\.linear1\.{WB}", rf"{ours}.layers.\1.ffn.up.\2"),
            Rule(rf"{theirs}\.transformer\.(\d+)\.linear2\.{WB}", rf"{ours}.layers.\1.ffn.down.\2"),
        ]
        for there, here in (("self_attn", "own"), ("multihead_attn", "cross")):
            layer = rf"{theirs}\.transformer\.(\d+)\.{there}\."
            split = tuple(rf"{ours}.layers.\1.{here}.{part}.\2" for part in "qkv")
            rules += [
                Rule(rf"{layer}in_proj_{WB}", split),
                Rule(rf"{layer}out_proj\.{WB}", rf"{ours}.layers.\1.{here}.out.\2"),
            ]
    # the encoder's queries are its tokens, the decoder's the cells of the grid
    for theirs, ours, tokens, cells in (
        ("s2to1encoder", "to_tokens", "position", "place"),
        ("s1to2decoder", "to_grid", "place", "position"),
    ):
        rules.append(Rule(rf"{theirs}\.positional_embedding", f"{ours}.{cells}", change=position_table))
        rules.append(Rule(rf"{theirs}\.latent_token_positional_embedding", f"{ours}.{tokens}", change=position_table))
    return (*rules, *llamagen.RULES)  # the convolutions have LlamaGen's names


def position_table(table: Tensor) -> Tensor:
    """[L, 1, D], with the batch in the middle, to [L, D]."""
    return table.squeeze(1)


RULES = _rules()


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> GigaTok:
    """config: {"VQVitModelPlusArgs": arguments of the original}; what is left out has its default there.

    Head counts follow from encoder_size and decoder_size; beside them, "encoder_heads" and "decoder_heads" override
    them. The auxiliary reconstruction, a matter of training, is off.
    """
    module = GigaTok(**arguments_of(state, config, SOURCE))
    load_strict(module, translate(state, RULES, SOURCE), SOURCE)
    return module.eval()


def arguments_of(state: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arguments of our constructor, for GigaTok and what builds on it. Raises ValueError where they do not fit."""
    given = dict(config.get(NAME, {}))
    unknown = (set(given) - READ - set(FIXED)) | (set(config) - {NAME, *NOTES, "encoder_heads", "decoder_heads"})
    if unknown:
        raise ValueError(f"{source}: unknown arguments {sorted(unknown)}")
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{source}: {name}={given[name]} is an option that no published model has")
    settings = DEFAULTS | {name: given[name] for name in DEFAULTS if name in given}
    vocab_size, width = shape(state, "quantize.embedding.weight", source)
    tokens = shape(state, "s2to1encoder.latent_token_positional_embedding", source)[0]
    channels = shape(state, "encoder.conv_in.weight", source)[0]
    z_channels = shape(state, "encoder.conv_out.weight", source)[0]
    found = {"codebook_size": vocab_size, "codebook_embed_dim": width, "z_channels": z_channels}
    check(given, found | {"num_latent_tokens": tokens}, source)
    multipliers = {half: llamagen.level_multipliers(state, half, channels, source) for half in ("encoder", "decoder")}
    check(given, {f"{half}_ch_mult": multipliers[half] for half in multipliers}, source)
    stride = 2 ** (len(multipliers["encoder"]) - 1)
    aligned = "s1to2decoder.distill_mlp.4.weight" in state
    if aligned and given.get("distill_depth") is None:
        raise ValueError(f"{source}: distill_depth is missing in the config, but the weights hold a distill_mlp")
    return dict(
        image_size=stride * math.isqrt(shape(state, "s2to1encoder.positional_embedding", source)[0]),
        quantizer=VQ(
            vocab_size=vocab_size,
            channels=width,
            l2_norm=settings["codebook_l2_norm"],
            beta=settings["commit_loss_beta"],
            entropy_weight=settings["entropy_loss_ratio"],
            rotation=settings["rot"],
        ),
        tokens=tokens,
        encoder=_former(state, config, given, "encoder", source),
        decoder=_former(state, config, given, "decoder", source),
        channels=channels,
        multipliers=multipliers["encoder"],
        decoder_multipliers=multipliers["decoder"],
        blocks=highest(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\..*", source),
        z_channels=z_channels,
        alignment_depth=given["distill_depth"] if aligned else None,
        alignment_channels=shape(state, "s1to2decoder.distill_mlp.4.weight", source)[0] if aligned else 768,
        feature_weight=given.get("fea_rec_loss_weight", 1.0),
    )


def _former(state: Mapping[str, Tensor], config: Mapping, given: Mapping, half: str, source: str) -> list[int]:
    """(width, layers, heads) of one Q-Former."""
    theirs = {"encoder": "s2to1encoder", "decoder": "s1to2decoder"}[half]
    width = shape(state, f"{theirs}.{half}_embed.weight", source)[0]
    depth = highest(state, rf"{theirs}\.transformer\.(\d+)\..*", source)
    size = given.get(f"{half}_size") or given.get("model_size") or "small"
    heads = config.get(f"{half}_heads", HEADS.get(size))
    if heads is None:
        raise ValueError(f"{source}: {half}_size={size!r}: choose {', '.join(HEADS)}, or give {half}_heads")
    return [width, depth, heads]
