"""Checkpoints of TencentARC/SEED-Voken (Open-MAGVIT2, IBQ): which of their weights to take.

The `state_dict` of a Lightning file holds the live weights, those of the losses, and an average as
`model_ema.<name without dots>` beside `model_ema.decay` and `model_ema.num_updates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# arguments of the original's classes that say how it was trained, which the weights do not depend on
TRAINING = {"ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "learning_rate", "resume_lr"}
TRAINING |= {"warmup_epochs", "scheduler_type", "min_learning_rate", "gradient_clip_val", "use_ema", "stage"}
TRAINING |= {"lr_drop_epoch", "lr_drop_rate", "use_shared_epoch", "sche_type", "wpe", "wp", "wp0", "max_iter"}
NETWORK = {"double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"}
NETWORK |= {"attn_resolutions", "dropout"}


def weights(state: Mapping[str, Tensor], choice: str, source: str) -> dict[str, Tensor]:
    """The tokenizer's entries of `state`: averaged ones ("ema"), live ones ("raw"), or what there is ("auto").

    Raises ValueError for another choice, and where an average is asked for that is not there for every weight.
    """
    if choice not in ("auto", "ema", "raw"):
        raise ValueError(f"{source}: weights={choice!r}: choose auto, ema or raw")
    averaged = {key.removeprefix("model_ema."): value for key, value in state.items() if key.startswith("model_ema.")}
    live = {k: v for k, v in state.items() if not k.startswith(("model_ema.", "loss."))}
    if choice == "raw" or (choice == "auto" and not averaged):
        return live
    missing = [key for key in live if key.replace(".", "") not in averaged]
    if missing:
        raise ValueError(f"{source}: no averaged weights of {missing[0]} and {len(missing) - 1} others: weights=raw")
    return {key: averaged[key.replace(".", "")] for key in live}


def loss_weights(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Parameters of the original's loss, as far as `arguments` hold its `lossconfig`."""
    return dict(arguments.get("lossconfig", {}).get("params", {}))
