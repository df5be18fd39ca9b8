"""Weights and inputs that two implementations can draw from a seed, so that only outputs are recorded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

SPECTRAL = ("._u", "._v")


def draw(module: nn.Module, seed: int) -> nn.Module:
    """Fill the floating state of a module with 0.05 * normal numbers in the sorted order of its keys.

    Gains of norms (one-dimensional weights) get a further 1; vectors of spectral norms get unit length.
    """
    random, state = np.random.RandomState(seed), module.state_dict()
    for name in sorted(state):
        if not state[name].is_floating_point():
            continue
        value = torch.from_numpy(0.05 * random.standard_normal(tuple(state[name].shape))).float()
        if name.endswith(SPECTRAL):
            value = value / value.norm()
        elif name.endswith("weight") and value.dim() == 1:
            value = value + 1
        state[name] = value
    module.load_state_dict(state)
    return module


def dino_state(*, seed: int, width: int = 384, depth: int = 12, side: int = 14) -> dict[str, Tensor]:
    """A state dict in the format of DINO's ViT file, drawn."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width), "norm.weight": (width,)}
    shapes |= {"norm.bias": (width,), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for name, inside, outside in (
            ("attn.qkv", width, 3 * width),
            ("attn.proj", width, width),
            ("mlp.fc1", width, 4 * width),
            ("mlp.fc2", 4 * width, width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (outside, inside), f"blocks.{i}.{name}.bias": (outside,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    random = np.random.RandomState(seed)
    state = {k: torch.from_numpy(0.05 * random.standard_normal(shapes[k])).float() for k in sorted(shapes)}
    return {k: v + 1 if "norm" in k and k.endswith("weight") else v for k, v in state.items()}


def ramp(batch: int, side: int) -> Tensor:
    """Images [batch, 3, side, side] in [-1, 1] that look like nothing but are the same everywhere."""
    values = torch.arange(batch * 3 * side * side, dtype=torch.float64)
    return torch.sin(values * 0.37 + torch.sin(values * 0.011) * 3).view(batch, 3, side, side).float()
