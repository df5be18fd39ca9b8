"""The KL-16 autoencoder of MAR, xAR and FlowAR (LTH14/mar and OliverRensu/xAR, models/vae.py) as CNNTokenizer.

File: kl16.ckpt; pass its `model` entry. Its decoder has attention in the middle only. The original's generators scale
its latents by 0.2325 themselves; here `scale` makes the tokens come out scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import taming
from vtok.convert.table import check, shape, translate
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.kl import KL

SOURCE = "KL-16 autoencoder"
ARGUMENTS = {"embed_dim", "ch_mult", "use_variational"}
REPLACED = "encoder_and_decoder_replaced_by"
SCALE = 0.2325  # 1 / standard deviation of the published file's latents over ImageNet


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CNNTokenizer:
    """config: {"AutoencoderKL": arguments of the original's class}.

    Beside it: `image_size` of the specification (256 by default); `scale` of the tokens (0.2325 by default). The
    goldens' note that encoder and decoder were replaced by smaller ones switches the check of the widths off.
    """
    arguments = dict(config.get("AutoencoderKL", {}))
    unknown = (set(arguments) - ARGUMENTS) | (set(config) - {"AutoencoderKL", REPLACED, "image_size", "scale"})
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if not arguments.get("use_variational", True):
        raise ValueError(f"{SOURCE}: only use_variational=true is supported")
    shapes = taming.sizes(state, SOURCE)
    tensors = translate(state, taming.rules(len(shapes["multipliers"])), SOURCE)
    channels = shape(state, "post_quant_conv.weight", SOURCE)[1]
    check(arguments, {"embed_dim": channels}, SOURCE)
    if REPLACED not in config:
        check(arguments, {"ch_mult": shapes["multipliers"]}, SOURCE)
    module = CNNTokenizer(
        image_size=config.get("image_size", 256),
        quantizer=KL(channels=channels, scale=config.get("scale", SCALE)),
        z_channels=None,
        **shapes,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
