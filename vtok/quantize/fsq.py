"""Finite scalar quantisation: every channel is rounded to a few levels; the codebook is their product, without losses.

FSQ: Mentzer et al., arXiv 2309.15505. iFSQ (Tencent, 2026) replaces the tanh by 2 sigmoid(1.6 z) - 1, which maps a
unit Gaussian to a nearly uniform density, and drops the margin and the half-level offset, so levels must be odd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vtok.precision import full
from vtok.quantize.statistics import code_statistics
from vtok.tokenizer import Quantized, Quantizer

EPS = 1e-3  # tanh's bound lies this share outside of the outermost level, which stays reachable


class FSQ(Quantizer):
    """Rounds channel i to levels[i] values. The id is sum_i digit_i * product(levels[:i]).

    activation: "tanh" (FSQ: even levels span -1 .. 1 - 2/L) or "ifsq" (odd levels only). steepness: the a of iFSQ's
    2 sigmoid(a z) - 1; 2 makes it tanh(z). groups: how many consecutive channels make up each sub-code of `split`, for
    generators that predict an id in parts; iFSQ's [2, 2] turns 83,521 codes into two of 289.
    """

    def __init__(
        self,
        *,
        levels: Sequence[int],
        activation: Literal["tanh", "ifsq"] = "tanh",
        steepness: float = 1.6,
        groups: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.levels = tuple(int(level) for level in levels)
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels must be numbers of at least 2, got {self.levels}")
        if activation not in ("tanh", "ifsq"):
            raise ValueError(f"activation={activation!r}: choose tanh or ifsq")
        if activation == "ifsq" and any(level % 2 == 0 for level in self.levels):
            raise ValueError(f"activation=ifsq needs odd levels, got {self.levels}")
        self.activation, self.steepness = activation, steepness
        self.vocab_size, self.channels = math.prod(self.levels), len(self.levels)
        self.groups = check_groups(groups, self.channels)
        basis = [math.prod(self.levels[:i]) for i in range(self.channels)]
        # derived from `levels`, so not part of a checkpoint
        self.register_buffer("counts", torch.tensor(self.levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @property
    def factors(self) -> tuple[int, ...]:
        levels = iter(self.levels)
        return tuple(math.prod(next(levels) for _ in range(count)) for count in self.groups)

    def bound(self, z: Tensor) -> Tensor:
        """z squeezed so that rounding gives -(L // 2) .. (L - 1) // 2."""
        levels = self.counts.float()
        if self.activation == "ifsq":
            return (2 * torch.sigmoid(self.steepness * z) - 1) * (levels - 1) / 2
        half = (levels - 1) * (1 + EPS) / 2
        offset = 0.5 * (1 - self.counts % 2)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def forward(self, z: Tensor) -> Quantized:
        """z [B, L, C] or [B, h, w, C], any float dtype. Quantized.z has z's shape, float32, within [-1, 1]."""
        with torch.autocast(z.device.type, enabled=False):
            half = (self.counts // 2).float()
            bounded = self._bounded(z)
            steps = bounded.detach().round()
            scaled = bounded / half
            codes = steps / half + (scaled - scaled.detach())
        ids = self._ids(steps).flatten(1)
        stats = code_statistics(ids, self.vocab_size, everywhere=self.training)
        return Quantized(codes, codes.flatten(1, -2), ids, {}, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z."""
        with torch.autocast(z.device.type, enabled=False):
            return self._ids(self._bounded(z).round()).flatten(1)

    def lookup(self, ids: Tensor) -> Tensor:
        half = self.counts // 2
        digits = (ids.unsqueeze(-1) // self.basis) % self.counts
        return (digits - half).float() / half.float()

    def _bounded(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.channels:
            raise ValueError(f"z has {z.shape[-1]} channels, the quantizer {self.channels} (one per entry of levels)")
        return self.bound(full(z))

    def _ids(self, steps: Tensor) -> Tensor:
        return ((steps.long() + self.counts // 2) * self.basis).sum(-1)


def check_groups(groups: Sequence[int] | None, channels: int) -> tuple[int, ...]:
    """`groups` as a tuple, one group of all channels for None. Raises ValueError unless they add up to `channels`."""
    found = (channels,) if groups is None else tuple(int(count) for count in groups)
    if not found or min(found) < 1 or sum(found) != channels:
        raise ValueError(f"groups={list(found)} must be positive numbers that add up to the {channels} channels")
    return found
