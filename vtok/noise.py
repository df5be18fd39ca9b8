"""Randomness as a pure function of (seed of the sample, position, code, stream): the same on any batch, GPU or restart.

Counter-based generation after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the
splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) as the mixing function. Categorical draws are the Gumbel race
argmax(logits - log(-log1p(-u))): a small change of the logits rarely changes the winner (inverse-CDF draws would).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STREAM = 0xD1B54A32D192ED03
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch stores."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's shift is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, elementwise; multiplication wraps."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def key(*numbers: int) -> int:
    """One non-negative 63-bit key of some integers, order-sensitive: hash(seed, epoch, index) of the data pipeline."""
    h = 0
    for number in numbers:
        h = (h + _GOLDEN + (int(number) & _MASK64)) & _MASK64
        h = ((h ^ (h >> 30)) * _MIX1) & _MASK64
        h = ((h ^ (h >> 27)) * _MIX2) & _MASK64
        h ^= h >> 31
    return h >> 1


def keys(*numbers: int | np.ndarray) -> np.ndarray:
    """`key` of many at once: int64 [n], where some of the numbers are int64 arrays [n]."""
    h = np.zeros(1, np.uint64)  # no scalar: arrays wrap without a warning
    for number in numbers:
        number = number.astype(np.uint64) if isinstance(number, np.ndarray) else np.uint64(int(number) & _MASK64)
        h = _mixed(h + number + np.uint64(_GOLDEN))
    return (h >> np.uint64(1)).astype(np.int64)


def _mixed(h: np.ndarray) -> np.ndarray:
    """`mix` of uint64."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(_MIX1)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(_MIX2)
    return h ^ (h >> np.uint64(31))


def host_uniforms(keys: np.ndarray, count: int, stream: int) -> np.ndarray:
    """float32 [B, count]: what SampleNoise gives the samples of keys int64 [B] at positions 0..count-1, without a
    tensor, for what decides shapes: on a GPU the host would wait for it."""
    root = _mixed(keys.astype(np.uint64) + np.uint64(_STREAM * (stream + 1) & _MASK64))
    word = _mixed(root[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    unit = ((word >> np.uint64(24)).astype(np.float64) + 0.5) * 2.0**-40
    return unit.astype(np.float32)


def sample_seeds(seed: int, start: int, stop: int) -> Tensor:
    """Seeds int64 [stop - start] of the images start..stop-1 of a run: independent of batch, rank and restart."""
    return torch.from_numpy(keys(seed, np.arange(start, stop)))


@dataclass(frozen=True)
class SampleNoise:
    """Noise for B samples. `position` is int64 [n] or [B, n]; `stream` separates draws that share a position."""

    seeds: Tensor  # int64 [B]

    def to(self, device: torch.device | str) -> SampleNoise:
        return SampleNoise(self.seeds.to(device))

    def rows(self, index: Tensor | slice) -> SampleNoise:
        return SampleNoise(self.seeds[index])

    def _base(self, position: Tensor, stream: int) -> Tensor:
        """[B, n] well-mixed words, one per sample, position and stream."""
        position = position if position.dim() == 2 else position.unsqueeze(0)
        root = mix(self.seeds + _signed(_STREAM * (stream + 1))).unsqueeze(1)
        return mix(root + (position + 1) * _signed(_GOLDEN))

    @staticmethod
    def _unit(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """40 bits to (0, 1): never 0; in float32 it may round to 1, which the race below survives."""
        return (_shift(word, 24).to(torch.float64).add_(0.5) * 2.0**-40).to(dtype)

    def uniform(self, position: Tensor, stream: int = 0) -> Tensor:
        """float32 [B, n] in (0, 1]."""
        return self._unit(self._base(position, stream))

    def gumbel(self, position: Tensor, ids: Tensor, stream: int = 0) -> Tensor:
        """Standard Gumbel noise, float32 [B, n, v], of codes `ids`: int64 [v] or [B, n, v]."""
        word = mix(self._base(position, stream).unsqueeze(-1) + (ids + 1) * _signed(_GOLDEN))
        return -torch.log(-torch.log1p(-self._unit(word)))

    def normal(self, position: Tensor, channels: int, stream: int = 0) -> Tensor:
        """Standard normal noise, float32 [B, n, channels] (Box-Muller, computed in float64)."""
        index = torch.arange(channels, device=self.seeds.device)
        word = self._base(position, stream).unsqueeze(-1) + (index + 1) * _signed(_GOLDEN)
        radius = torch.sqrt(-2 * torch.log(self._unit(mix(word), torch.float64)))
        angle = 2 * math.pi * self._unit(mix(word ^ _signed(_STREAM)), torch.float64)
        return (radius * torch.cos(angle)).float()


def noise_of(key: Tensor | None, batch: Tensor) -> SampleNoise:
    """Noise of the samples of a training batch [B, ..] from their keys int64 [B]; None: keys of torch's generator."""
    if key is None:
        key = torch.randint(1 << 62, (len(batch),))
    return SampleNoise(key.to(batch.device))
