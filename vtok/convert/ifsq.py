"""iFSQ's image autoencoders (Tencent-Hunyuan/iFSQ, ifsq/src/model) as CNNTokenizer: with FSQ, VQ, KL or as they are.

No file is published. A training checkpoint holds `ema_state_dict` (take `module.` off its keys) or
`state_dict.gen_model`. `running_mean` and `running_var`, statistics that nothing reads, are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import taming
from vtok.convert.table import Rule, check, shape, translate
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.fsq import FSQ
from vtok.quantize.kl import KL
from vtok.quantize.vq import VQ
from vtok.tokenizer import Quantizer

SOURCE = "iFSQ autoencoder"
STEEPNESS = {"scale_sigmoid_16": 1.6, "scale_sigmoid_20": 2.0}
COMMON = {"hidden_size", "z_channels", "hidden_size_mult", "attn_resolutions", "dropout", "resolution", "embed_dim"}
COMMON |= {"num_res_blocks", "norm_type", "double_z", "use_quant_layer", "encoder_resnet_blocks"}
COMMON |= {"decoder_resnet_blocks", "encoder_spatial_downsample", "decoder_spatial_upsample"}
CLASSES = {
    "ImageFSQVAEModel": {"levels", "factorized_bits", "do_simple_bound", "act_fun"},
    "ImageVQVAEModel": {"n_e", "beta"},
    "ImageVAEModel": {"deterministic"},
}
# what the networks below always are
FIXED = {"norm_type": "groupnorm", "double_z": True, "use_quant_layer": True, "attn_resolutions": []}

RULES = (
    Rule(r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    Rule(r"quantize\.running_(mean|var)", None),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CNNTokenizer:
    """config: {class of the original: its arguments}, the class one of CLASSES; their defaults are the original's."""
    if len(config) != 1 or next(iter(config)) not in CLASSES:
        raise ValueError(f"{SOURCE}: config names one of {', '.join(CLASSES)}, got {', '.join(config)}")
    ((name, arguments),) = config.items()
    unknown = set(arguments) - COMMON - CLASSES[name]
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    for key, value in FIXED.items():
        if arguments.get(key, value) != value:
            raise ValueError(f"{SOURCE}: only {key}={value} is supported, got {arguments[key]}")
    _check_levels(arguments)
    shapes = taming.sizes(state, SOURCE)
    tensors = translate(state, [*taming.rules(len(shapes["multipliers"])), *RULES], SOURCE)
    z_channels, channels = shape(state, "post_quant_conv.weight", SOURCE)[:2]
    found = {"hidden_size": shapes["channels"], "hidden_size_mult": shapes["multipliers"], "embed_dim": channels}
    check(arguments, found | {"num_res_blocks": shapes["blocks"], "z_channels": z_channels}, SOURCE)
    module = CNNTokenizer(
        image_size=arguments.get("resolution", 256),
        quantizer=_quantizer(name, arguments, state, channels),
        z_channels=2 * z_channels,
        decoder_z_channels=z_channels,
        dropout=arguments.get("dropout", 0.0),
        **shapes,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()


def _quantizer(name: str, arguments: Mapping[str, Any], state: Mapping[str, Tensor], channels: int) -> Quantizer:
    if name == "ImageVAEModel":
        return KL(channels=channels, deterministic=arguments.get("deterministic", False))
    if name == "ImageVQVAEModel":
        vocab_size = shape(state, "quantize.embedding.weight", SOURCE)[0]
        check(arguments, {"n_e": vocab_size}, SOURCE)
        # taming's first order of the two losses: its beta weighs the codebook's, not the commitment
        weight = arguments.get("beta", 0.5)
        return VQ(vocab_size=vocab_size, channels=channels, l2_norm=False, beta=1.0, codebook_weight=weight)
    levels, groups = arguments.get("levels", [5, 5, 5, 5]), arguments.get("factorized_bits")
    if not arguments.get("do_simple_bound", False):
        return FSQ(levels=levels, groups=groups)
    activation = arguments.get("act_fun", "tanh")
    if activation not in STEEPNESS:
        raise ValueError(f"{SOURCE}: act_fun={activation!r}: the original knows {', '.join(STEEPNESS)}")
    return FSQ(levels=levels, activation="ifsq", steepness=STEEPNESS[activation], groups=groups)


def _check_levels(arguments: Mapping[str, Any]) -> None:
    """All resolutions have the same blocks, and all but the lowest resample: the original could mix them."""
    for key in ("encoder_resnet_blocks", "decoder_resnet_blocks"):
        if set(arguments.get(key, [])) - {"ResnetBlock2D"}:
            raise ValueError(f"{SOURCE}: only {key} of ResnetBlock2D is supported, got {arguments[key]}")
    down, up = arguments.get("encoder_spatial_downsample"), arguments.get("decoder_spatial_upsample")
    if down is not None and list(down) != ["Downsample"] * (len(down) - 1) + [""]:
        raise ValueError(f"{SOURCE}: only encoder_spatial_downsample at all but the last level works, got {down}")
    if up is not None and list(up) != [""] + ["Upsample"] * (len(up) - 1):
        raise ValueError(f"{SOURCE}: only decoder_spatial_upsample at all but the first level works, got {up}")
