"""Open-MAGVIT2's tokenizers (TencentARC/SEED-Voken, src/Open_MAGVIT2/models/lfqgan.py) as MAGVIT2Tokenizer.

Files: imagenet_256_L.ckpt, imagenet_128_L.ckpt and the pretrained ones of 2^14 and 2^18 codes; pass `state_dict`. The
first release counted the bits of an id from the other end, which ids made with it follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.checkpoint import load_strict
from vtok.convert import seed_voken, taming
from vtok.convert.table import Rule, check, shape, translate
from vtok.models.magvit2 import MAGVIT2Tokenizer
from vtok.quantize.binary import LFQ

SOURCE = "Open-MAGVIT2"
ARGUMENTS = {"ddconfig", "lossconfig", "n_embed", "embed_dim", "sample_minimization_weight"}
ARGUMENTS |= {"batch_maximization_weight", "token_factorization", "factorized_bits"} | seed_voken.TRAINING


def rules(levels: int) -> list[Rule]:
    """The table for an autoencoder of `levels` resolutions."""

    def adaptive(match: re.Match) -> str:
        return f"decoder.adaptive.{levels - 1 - int(match[1])}.{'scale' if match[2] == 'gamma' else 'bias'}.{match[3]}"

    return [
        Rule(rf"encoder\.down\.(\d+)\.downsample\.{taming.NORM}", r"encoder.levels.\1.resample.conv.\2"),
        Rule(rf"decoder\.adaptive\.(\d+)\.(gamma|beta)\.{taming.NORM}", adaptive),
        *taming.rules(levels),
    ]


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MAGVIT2Tokenizer:
    """config: {"VQModel": arguments of the original's class}.

    Beside it: `image_size` of the specification (256 by default); `weights`, which of the file's, "auto" by default.
    """
    arguments = dict(config.get("VQModel", {}))
    network = dict(arguments.get("ddconfig", {}))
    unknown = set(arguments) - ARGUMENTS | set(config) - {"VQModel", "image_size", "weights"}
    unknown |= set(network) - seed_voken.NETWORK
    if unknown:
        raise ValueError(f"{SOURCE}: unknown arguments {sorted(unknown)}")
    state = seed_voken.weights(state, config.get("weights", "auto"), SOURCE)
    shapes = taming.sizes(state, SOURCE)
    tensors = translate(state, rules(len(shapes["multipliers"])), SOURCE)
    bits = shape(state, "encoder.conv_out.weight", SOURCE)[0]
    check(arguments, {"n_embed": 2**bits, "embed_dim": bits}, SOURCE)
    found = {"z_channels": bits, "ch": shapes["channels"], "ch_mult": shapes["multipliers"]}
    check(network, found | {"num_res_blocks": shapes["blocks"], "double_z": False}, SOURCE)
    loss = seed_voken.loss_weights(arguments)
    quantizer = LFQ(
        bits=bits,
        beta=loss.get("commit_weight", 0.25),
        entropy_weight=loss.get("codebook_weight", 0.1),
        sample_weight=arguments.get("sample_minimization_weight", 1.0),
        batch_weight=arguments.get("batch_maximization_weight", 1.0),
        groups=arguments.get("factorized_bits") if arguments.get("token_factorization") else None,
    )
    module = MAGVIT2Tokenizer(
        image_size=config.get("image_size", 256),
        quantizer=quantizer,
        **{k: shapes[k] for k in ("channels", "multipliers", "blocks")},
    )
    load_strict(module, tensors, SOURCE)
    return module.eval()
