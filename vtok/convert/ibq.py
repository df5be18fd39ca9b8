"""IBQ's tokenizers (TencentARC/SEED-Voken, src/IBQ/models/ibqgan.py, class IBQ) as CNNTokenizer.

Files: imagenet256_{1024,8192,16384,262144}.ckpt; pass `state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import seed_voken, taming
from vtok.convert.table import Rule, check, shape, translate
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.ibq import IBQ

SOURCE = "IBQ"
ARGUMENTS = {"ddconfig", "lossconfig", "n_embed", "embed_dim", "beta", "use_entropy_loss", "entropy_temperature"}
ARGUMENTS |= {"sample_minimization_weight", "batch_maximization_weight", "l2_normalize"} | seed_voken.TRAINING


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CNNTokenizer:
    """config: {"IBQ": arguments of the original's class}.

    Beside it: `image_size` of the specification (256 by default); `weights`, which of the file's, "auto" by default.
    """
    arguments = dict(config.get("IBQ", {}))
    network = dict(arguments.get("ddconfig", {}))
    unknown = set(arguments) - ARGUMENTS | set(config) - {"IBQ", "image_size", "weights"}
    unknown |= set(network) - seed_voken.NETWORK
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    if arguments.get("l2_normalize", False):
        raise ValueError(f"{SOURCE}: only l2_normalize=false is supported")
    state = seed_voken.weights(state, config.get("weights", "auto"), SOURCE)
    shapes = taming.sizes(state, SOURCE)
    table = Rule(r"quantize\.embedding\.weight", "quantizer.codebook")
    tensors = translate(state, [*taming.rules(len(shapes["multipliers"])), table], SOURCE)
    vocab_size, channels = shape(state, "quantize.embedding.weight", SOURCE)
    z_channels = shape(state, "encoder.conv_out.weight", SOURCE)[0]
    check(arguments, {"n_embed": vocab_size, "embed_dim": channels}, SOURCE)
    found = {"z_channels": z_channels, "ch": shapes["channels"], "ch_mult": shapes["multipliers"]}
    check(network, found | {"num_res_blocks": shapes["blocks"], "double_z": False}, SOURCE)
    weight = seed_voken.loss_weights(arguments).get("entropy_loss_weight", 0.05)
    quantizer = IBQ(
        vocab_size=vocab_size,
        channels=channels,
        beta=arguments.get("beta", 0.25),
        entropy_weight=weight if arguments.get("use_entropy_loss", True) else 0.0,
        sample_weight=arguments.get("sample_minimization_weight", 1.0),
        batch_weight=arguments.get("batch_maximization_weight", 1.0),
        temperature=arguments.get("entropy_temperature", 0.01),
    )
    module = CNNTokenizer(
        image_size=config.get("image_size", 256),
        quantizer=quantizer,
        z_channels=z_channels,
        dropout=network.get("dropout", 0.0),
        **shapes,
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
