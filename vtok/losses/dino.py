"""A discriminator on frozen DINO features: small heads with spectral norm read a ViT-S/16 at several depths.

The idea is StyleGAN-T's (Sauer et al., arXiv 2301.09515, after Projected GANs); the architecture is the one of VAR's
tokenizer code that Hita-U, GigaTok, ResTok and DetailFlow train. DINO: Caron et al., arXiv 2104.14294, weights
dino_deitsmall16_pretrain.pth. Two differences: the random crop of half of the images is drawn by the augmentation
(`DiffAug(size=224, crop=0.5)`), not in here, and batches that the virtual batch does not divide are accepted.
Heads have 7.39 M parameters. GELU is the tanh form, as there; the bias of the keys moves nothing and is kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vtok.layers.trunk import Inputs, Trunk
from vtok.losses.augment import resize
from vtok.losses.frozen import Frozen, find_weights, read_weights
from vtok.precision import full

FILE = "dino_deitsmall16_pretrain.pth"
SIZE = "83 MB"
SOURCE = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to logits [B, (len(depths) + 1) * (size / 16)^2].

    weights_path: the file of DINO's weights or its folder. size: side to which images are resized before DINO (224
    published; others resize its positions). depths: blocks whose outputs are read, beside the embedding. kernel: width
    of the heads' second convolution along the flat tokens. width, depth, heads: of the ViT.
    """

    def __init__(
        self,
        *,
        weights_path: str | Path | None = None,
        size: int = 224,
        depths: tuple[int, ...] = (2, 5, 8, 11),
        kernel: int = 9,
        virtual_batch: int = 8,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
    ) -> None:
        super().__init__()
        if size % 16:
            raise ValueError(f"size={size}: DINO's patches have 16 px, so a multiple of 16")
        if not depths or sorted(set(depths)) != list(depths) or not 0 <= depths[0] <= depths[-1] < depth:
            raise ValueError(f"depths={list(depths)}: name blocks 0..{depth - 1} in rising order")
        state = read_weights(
            find_weights(weights_path, FILE),
            who="the DINO discriminator",
            size=SIZE,
            source=SOURCE,
            remedy="choose another objective.gan.discriminator",
        )
        self.size = size
        self.features = Frozen(DinoFeatures(state, width=width, depth=depth, heads=heads, size=size, depths=depths))
        self.heads = nn.ModuleList(_Head(width, kernel, virtual_batch) for _ in range(len(depths) + 1))

    def forward(self, images: Tensor) -> Tensor:
        levels = self.features(resize(full(images), self.size))
        return torch.cat([head(level) for head, level in zip(self.heads, levels)], 1)


class DinoFeatures(nn.Module):
    """Images [B, 3, size, size] to patch tokens plus the class token, [B, width, (size / 16)^2] per depth."""

    def __init__(
        self, state: dict[str, Tensor], *, width: int, depth: int, heads: int, size: int, depths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.depths = depths
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.trunk = Trunk(
            dim=width,
            depth=depths[-1] + 1,  # deeper blocks are not read
            heads=heads,
            hidden=4 * width,
            norm="layer",
            eps=1e-6,
            ffn="gelu_tanh",
            bias="qkv",
            final_norm=False,
        )
        self.load_state_dict(translate(state, depths[-1] + 1, depth))
        self.register_buffer("cls", state["cls_token"].float())
        self.register_buffer("positions", resample(state["pos_embed"].float(), size // 16))
        self.register_buffer("shift", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patches(((images + 1) / 2 - self.shift) / self.scale).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], 1) + self.positions
        found: list[Tensor] = []

        def keep(h: Tensor) -> Tensor:
            found.append((full(h[:, 1:]) + full(h[:, :1])).transpose(1, 2))
            return h

        at = {0: keep, **{depth + 1: keep for depth in self.depths[:-1]}}
        keep(self.trunk(Inputs(x, torch.zeros(x.shape[1], device=x.device).long(), "full", at=at)))
        return found


class _Head(nn.Module):
    """Tokens [B, width, n] to logits [B, n]: 1 x 1 block, residual block over neighbouring tokens, 1 x 1."""

    def __init__(self, width: int, kernel: int, virtual_batch: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv1d(width, width, 1), eps=1e-12)
        self.second = spectral_norm(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular"), eps=1e-12
        )
        self.norm1, self.norm2 = LocalBatchNorm(width, virtual_batch), LocalBatchNorm(width, virtual_batch)
        self.out = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.first(x)), 0.2)
        x = (x + F.leaky_relu(self.norm2(self.second(x)), 0.2)) * 0.5**0.5
        return self.out(x).squeeze(1)


class LocalBatchNorm(nn.Module):
    """Batch norm of [B, C, n] over tokens and runs of at most `virtual_batch` images, without running statistics."""

    def __init__(self, channels: int, virtual_batch: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.virtual_batch, self.eps = virtual_batch, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        runs = []
        for part in full(x).tensor_split(-(-len(x) // self.virtual_batch)):
            variance, mean = torch.var_mean(part, (0, 2), correction=0, keepdim=True)
            runs.append((part - mean) * (variance + self.eps).rsqrt())
        return torch.cat(runs) * self.weight[:, None] + self.bias[:, None]


def translate(state: dict[str, Tensor], used: int, depth: int) -> dict[str, Tensor]:
    """DINO's keys to ours for the first `used` of `depth` blocks; a key that is missing or unknown is a ValueError."""
    inner = {
        "norm1": "norm1",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "norm2": "norm2",
        "mlp.fc1": "ffn.up",
        "mlp.fc2": "ffn.down",
    }
    names = {f"patch_embed.proj.{kind}": f"patches.{kind}" for kind in ("weight", "bias")}
    for i in range(depth):
        for theirs, ours in inner.items():
            names |= {f"blocks.{i}.{theirs}.{kind}": f"trunk.blocks.{i}.{ours}.{kind}" for kind in ("weight", "bias")}
    known = {*names, "cls_token", "pos_embed", "norm.weight", "norm.bias"}
    if wrong := sorted(known ^ set(state)):
        raise ValueError(f"these are not DINO's weights: {wrong[0]} is {'unknown' if wrong[0] in state else 'missing'}")
    late = tuple(f"trunk.blocks.{i}." for i in range(used, depth))
    return {ours: state[theirs] for theirs, ours in names.items() if not ours.startswith(late)}


def resample(positions: Tensor, side: int) -> Tensor:
    """Position table [1, 1 + n * n, C] for a grid of another side, bilinear; the class token's row stays."""
    cls, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = grid.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)
