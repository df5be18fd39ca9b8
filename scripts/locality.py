"""What one input patch changes in ResTok's tokens, with the published reshape (`legacy_reshape`) and without.

At random weights: the question is what the architecture lets through, not what training makes of it. Measured on what
the quantizer gets, so that no threshold of a codebook hides a change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 8
FLAGS = {"off": False, "on": True}
# a token that takes no part in a change comes out bitwise equal, up to another order of sums in a product
CHANGED = 1e-5


def build(seed: int, legacy: bool) -> Any:
    """The small ResTok of 32 px at random weights; those of a seed are the same with the flag and without."""
    from hydra import compose, initialize_config_dir

    from vtok.config import instantiate

    options = ["data=cifar10", "tokenizer=restok_small", f"tokenizer.legacy_reshape={str(legacy).lower()}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=options)
    torch.manual_seed(seed)
    return instantiate(config.tokenizer, _convert_="all").eval()


def smooth(seed: int, size: int) -> Tensor:
    """Images [IMAGES, 3, size, size] in [-1, 1] whose neighbouring pixels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(IMAGES, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def by_patch(tokenizer: Any, images: Tensor, others: Tensor) -> Tensor:
    """Change [patches, N] of each latent when a patch, as large as the stride, is replaced by that of another image:
    length of the difference over the mean length of a latent, mean over the images."""
    before, side = tokenizer.features(images), tokenizer.stride
    scale = before.norm(dim=-1).mean()
    changes = []
    for y in range(0, images.shape[2], side):
        for x in range(0, images.shape[3], side):
            mixed = images.clone()
            mixed[:, :, y : y + side, x : x + side] = others[:, :, y : y + side, x : x + side]
            changes.append((tokenizer.features(mixed) - before).norm(dim=-1).mean(0) / scale)
    return torch.stack(changes)


@torch.no_grad()
def by_level(encoder: Any, latents: Tensor, others: Tensor) -> Tensor:
    """Change [levels, N] of each token when the latents [B, N, D] of one level are replaced before the projections."""
    before, start, changes = encoder.project(latents), 0, []
    for count in encoder.levels:
        mixed = latents.clone()
        mixed[:, start : start + count] = others[:, start : start + count]
        changes.append((encoder.project(mixed) - before).norm(dim=-1).mean(0) / before.norm(dim=-1).mean())
        start += count
    return torch.stack(changes)


def leaked(changes: Tensor, levels: Sequence[int]) -> float:
    """Of the pairs (level, token of a coarser level), the share in which replacing the level changes the token."""
    level = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
    pairs = torch.arange(len(levels))[:, None] > level
    return float((changes > CHANGED)[pairs].double().mean())


def local(changes: Tensor) -> float:
    """changes [patches, N]: of the squared change of the last `patches` latents, one a cell, the share in the latent of
    the patch's own cell, mean over the patches."""
    finest = changes[:, -len(changes) :].square()
    return float((finest.diagonal() / finest.sum(1)).mean())


def measure(seeds: Sequence[int]) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Figures (mean over the seeds) by flag, and the maps of the first seed: [by patch, by level] for each flag."""
    flags, maps = {}, {}
    for name, legacy in FLAGS.items():
        found = []
        for seed in seeds:
            tokenizer = build(seed, legacy)
            size = tokenizer.spec.image_size
            patches = by_patch(tokenizer, smooth(seed, size), smooth(seed + 1000, size))
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(2, IMAGES, tokenizer.tokens, tokenizer.encoder.trunk.dim, generator=generator)
            levels = by_level(tokenizer.encoder, *drawn)
            maps.setdefault(name, [patches, levels])
            found.append(
                {
                    "changed": float((patches > CHANGED).double().mean()),
                    "local": local(patches),
                    "leaked": leaked(levels, tokenizer.encoder.levels),
                    "least": float(patches.min()),
                    "most": float(patches.max()),
                }
            )
        flags[name] = {key: mean(values[key] for values in found) for key in found[0]}
        flags[name]["local_by_seed"] = [values["local"] for values in found]
    shape = {"seeds": len(seeds), "images": IMAGES, "tokens": tokenizer.tokens, "patches": len(patches)}
    return {**shape, "levels": list(tokenizer.encoder.levels), "flags": flags}, maps


def figure(path: Path, maps: dict[str, list[Tensor]], levels: Sequence[int]) -> None:
    """A PNG: changes by patch and by level, a column a flag; white lines between the levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, axes = plt.subplots(2, len(maps), figsize=(9, 5.6), squeeze=False)
    titles = ("One patch of the image", "One level of the latents, before the projections")
    labels = (("patch replaced", "change"), ("level replaced", "log10 of the change"))
    top = [max(float(parts[i].max()) for parts in maps.values()) for i in range(2)]
    scales = ((0.0, top[0]), (-3.0, math.log10(top[1])))
    for column, (flag, parts) in enumerate(maps.items()):
        for i, (label, unit) in enumerate(labels):
            axis, (low, high) = axes[i][column], scales[i]
            values = parts[i] if i == 0 else parts[i].clamp(min=10**low).log10()
            picture = axis.imshow(values, aspect="auto", vmin=low, vmax=high)
            start = 0
            for count in levels[:-1]:
                start += count
                axis.axvline(start - 0.5, color="white", linewidth=0.6)
            axis.set_title(f"{titles[i]} (legacy_reshape {flag})", fontsize=8)
            axis.set_xlabel("token", fontsize=8)
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            bar = shown.colorbar(picture, ax=axis)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(unit, fontsize=7)
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, dpi=110)
    plt.close(shown)
