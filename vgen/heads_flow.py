"""The head of a trunk that is the velocity network itself (xAR, arXiv 2502.20388)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtok.layers.packed import float32_linear


class VelocityHead(nn.Module):
    """The velocity of every token straight from the trunk: one linear map, in float32, as errors add up in a solve."""

    def __init__(self, *, dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Velocity float32 [.., C] of h [.., D]."""
        return float32_linear(self.linear, h)

    def operations(self, tokens: int) -> float:
        """Operations of a training step of that many tokens (vtok/acceleration.py)."""
        return 6.0 * self.linear.weight.numel() * tokens

    def loss(self, h: Tensor, velocity: Tensor, sizes: Sequence[int]) -> Tensor:
        """Squared error, mean over channels, float32 [B, n], of h [B, n, D] and velocities [B, n, C]."""
        return (self(h) - velocity).square().mean(-1)
