"""Embedding of flow times: sinusoids through a two-layer perceptron (DiT, Peebles & Xie, arXiv 2212.09748)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(position: Tensor, channels: int, longest: float = 10000.0) -> Tensor:
    """float32 [.., channels] of positions [..]: cosines, then sines, of frequencies from 1 down to 1 / longest."""
    half = channels // 2
    grid = torch.arange(half, dtype=torch.float32, device=position.device)
    angle = position.float().unsqueeze(-1) * torch.exp(-math.log(longest) / half * grid)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Vectors [.., dim] of times [..] in [0, 1].

    whole: times become thousandths, rounded down, before they are embedded, as the weights of xAR and FlowAR expect;
    without it 1000 t goes in as it is. longest: ratio of the highest to about the lowest frequency.
    """

    def __init__(self, *, dim: int, frequencies: int = 256, whole: bool = False, longest: float = 10000.0) -> None:
        super().__init__()
        self.frequencies, self.whole, self.longest = frequencies, whole, longest
        self.up, self.down = nn.Linear(frequencies, dim), nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        scaled = time.float() * 1000
        waves = sinusoids(scaled.floor() if self.whole else scaled, self.frequencies, self.longest)
        return self.down(nn.functional.silu(self.up(waves.to(self.up.weight.dtype))))
