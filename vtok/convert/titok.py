"""TiTok and TA-TiTok (bytedance/1d-tokenizer, modeling/titok.py, modeling/tatitok.py) as TiTok.

Files: yucornetto/tokenizer_titok_*_imagenet and turkeyju/tokenizer_tatitok_*, flat state dicts. config is the
original's own configuration file, {"TiTok_config": {"model": {"vq_model": ..}, "dataset": ..}}, where what is left out
has the original's default: is_legacy true, finetune_decoder true, quantize_mode vq.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert.maskgit_vqgan import check_network, cnn_rules, cnn_shape
from vtok.convert.table import Rule, check, highest, shape, translate
from vtok.models.titok import PatchHead, ProxyHead, TiTok
from vtok.quantize.kl import KL
from vtok.quantize.vq import VQ
from vtok.tokenizer import Quantizer

SOURCE = "TiTok"
ARGUMENTS = {"codebook_size", "token_size", "use_l2_norm", "commitment_cost", "clustering_vq", "quantize_mode"}
ARGUMENTS |= {"vit_enc_model_size", "vit_dec_model_size", "vit_enc_patch_size", "vit_dec_patch_size"}
ARGUMENTS |= {"num_latent_tokens", "finetune_decoder", "is_legacy", "pretrained_tokenizer_weight"}
ARGUMENTS |= {"text_context_length", "text_embed_dim"}
NOTES = {"vit_small", "pixel_decoder_replaced_by", "pixel_quantize_replaced_by"}  # of the recorded references
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
WB = r"(weight|bias)"
HALF = r"(encoder|decoder)"

RULES = (
    Rule(r"latent_tokens", "encoder.latents"),
    Rule(rf"{HALF}\.class_embedding", r"\1.register"),
    Rule(rf"{HALF}\.positional_embedding", r"\1.position"),
    Rule(rf"{HALF}\.latent_token_positional_embedding", r"\1.latent_position"),
    Rule(rf"{HALF}\.ln_pre\.{WB}", r"\1.norm_in.\2"),
    Rule(rf"{HALF}\.ln_post\.{WB}", r"\1.trunk.norm.\2"),
    Rule(rf"{HALF}\.transformer\.(\d+)\.ln_(1|2)\.{WB}", r"\1.trunk.blocks.\2.norm\3.\4"),
    Rule(rf"{HALF}\.transformer\.(\d+)\.attn\.in_proj_{WB}", r"\1.trunk.blocks.\2.attention.qkv.\3"),
    Rule(rf"{HALF}\.transformer\.(\d+)\.attn\.out_proj\.{WB}", r"\1.trunk.blocks.\2.attention.out.\3"),
    Rule(rf"{HALF}\.transformer\.(\d+)\.mlp\.c_fc\.{WB}", r"\1.trunk.blocks.\2.ffn.up.\3"),
    Rule(rf"{HALF}\.transformer\.(\d+)\.mlp\.c_proj\.{WB}", r"\1.trunk.blocks.\2.ffn.down.\3"),
    Rule(rf"encoder\.patch_embed\.{WB}", r"encoder.embed.conv.\1"),
    Rule(r"encoder\.conv_out\.weight", "encoder.out.weight", change=lambda x: x.flatten(1)),
    Rule(r"encoder\.conv_out\.bias", "encoder.out.bias"),
    Rule(r"decoder\.mask_token", "decoder.mask", change=lambda x: x.flatten(0, 1)),
    Rule(rf"decoder\.decoder_embed\.{WB}", r"decoder.embed.\1"),
    Rule(rf"decoder\.text_guidance_proj\.{WB}", r"decoder.text.\1"),
    Rule(r"decoder\.text_guidance_positional_embedding", "decoder.text_position"),
    Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    Rule(r"quantize\.embed_prob", None),  # TA-TiTok: how often codes were used, for restarts
)
PROXY = (
    Rule(r"decoder\.ffn\.(0|2)\.weight", r"head.project.\1.weight", change=lambda x: x.flatten(1)),
    Rule(r"decoder\.ffn\.(0|2)\.bias", r"head.project.\1.bias"),
    Rule(r"pixel_quantize\.embedding\.weight", "head.codes.weight"),
)
PATCHES = (
    Rule(r"decoder\.ffn\.0\.weight", "head.project.weight", change=lambda x: x.flatten(1)),
    Rule(r"decoder\.ffn\.0\.bias", "head.project.bias"),
    Rule(rf"decoder\.conv_out\.{WB}", r"head.smooth.\1"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> TiTok:
    """config: {"TiTok_config": the original's configuration}; see above."""
    given = config.get("TiTok_config", {})
    arguments = dict(given.get("model", {}).get("vq_model", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"TiTok_config"} - NOTES)
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    legacy, proxy = arguments.get("is_legacy", True), arguments.get("finetune_decoder", True)
    rules = list(RULES)
    tokens, _ = shape(state, "latent_tokens", SOURCE)
    _, _, patch, _ = shape(state, "encoder.patch_embed.weight", SOURCE)
    decoder = size(state, "decoder", "vit_small" in config)
    if proxy:
        network = cnn_shape(state, "pixel_decoder", SOURCE)
        check_network(config.get("pixel_decoder_replaced_by", {}), network, SOURCE)
        rules += [*PROXY, *cnn_rules("pixel_decoder", "head.cnn", len(network["multipliers"]))]
        codes, width = shape(state, "pixel_quantize.embedding.weight", SOURCE)
        head = ProxyHead(dim=decoder[0], codes=codes, width=width, **network)
    elif legacy:
        raise ValueError(f"{SOURCE}: is_legacy without finetune_decoder is a first stage, which has no pixels")
    else:
        rules += PATCHES
        head = PatchHead(dim=decoder[0], patch=patch)
    text = None
    if "decoder.text_guidance_proj.weight" in state:
        length, _ = shape(state, "decoder.text_guidance_positional_embedding", SOURCE)
        text = [length, shape(state, "decoder.text_guidance_proj.weight", SOURCE)[1]]
        check(arguments, {"text_context_length": text[0], "text_embed_dim": text[1]}, SOURCE)
    tensors = translate(state, rules, SOURCE)
    side = round((shape(state, "encoder.positional_embedding", SOURCE)[0] - 1) ** 0.5)
    check(arguments, {"num_latent_tokens": tokens, "vit_enc_patch_size": patch}, SOURCE)
    check(given.get("dataset", {}).get("preprocessing", {}), {"crop_size": side * patch}, SOURCE)
    for half, name in (("encoder", "vit_enc_model_size"), ("decoder", "vit_dec_model_size")):
        if name in arguments and "vit_small" not in config and SIZES[arguments[name]] != size(state, half, False):
            raise ValueError(f"{SOURCE}: {name}={arguments[name]} in the config, but the weights differ")
    module = TiTok(
        image_size=side * patch,
        quantizer=bottleneck(state, arguments),
        head=head,
        tokens=tokens,
        encoder=size(state, "encoder", "vit_small" in config),
        decoder=decoder,
        legacy_reshape=legacy,
        text=text,
        patch=patch,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()


def bottleneck(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Quantizer:
    """The quantizer that `quantize_mode` names."""
    mode = arguments.get("quantize_mode", "vq")
    if mode == "vae":
        channels = shape(state, "decoder.decoder_embed.weight", SOURCE)[1]
        check(arguments, {"token_size": channels}, SOURCE)
        if "quantize.embedding.weight" in state:
            raise ValueError(f"{SOURCE}: quantize_mode=vae, but the weights have a codebook")
        return KL(channels=channels)
    if mode != "vq":
        raise ValueError(f"{SOURCE}: quantize_mode={mode!r} is neither vq nor vae")
    vocab_size, width = shape(state, "quantize.embedding.weight", SOURCE)
    check(arguments, {"codebook_size": vocab_size, "token_size": width}, SOURCE)
    l2_norm, beta = arguments.get("use_l2_norm", False), arguments.get("commitment_cost", 0.25)
    return VQ(vocab_size=vocab_size, channels=width, l2_norm=l2_norm, beta=beta)


def size(state: Mapping[str, Tensor], half: str, replaced: bool) -> tuple[int, int, int]:
    """(width, depth, heads) of the encoder or decoder.

    Heads are not in the shapes: those of the published size of this width, and 2 in the recorded reference.
    """
    depth = highest(state, rf"{half}\.transformer\.(\d+)\..*", SOURCE)
    width = shape(state, f"{half}.ln_pre.weight", SOURCE)[0]
    heads = {published[0]: published[2] for published in SIZES.values()}
    if width not in heads and not replaced:
        raise ValueError(f"{SOURCE}: a width of {width} is none of {sorted(heads)}")
    return width, depth, heads.get(width, 2)
