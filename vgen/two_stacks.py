"""The transformer of xAR and FlowAR: two stacks of the same blocks with a norm, a linear map and positions in between.

The split is inherited from MAR's encoder and decoder; both stacks see all positions with one mask, so it is one trunk
of 2 x depth blocks with an edit of the residual stream in the middle. Blocks: weightless RMSNorm, GEGLU of 8/3 of the
width, biases, rope over the grid, modulation by class and time (arXiv 2502.20388 and 2412.15205).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtok.layers.trunk import Trunk


def stacked_trunk(
    *, dim: int, depth: int, heads: int, dropout: float, attention_dropout: float, checkpointing: bool
) -> Trunk:
    """The 2 x depth blocks. dropout: after attention and feed-forward and on the feed-forward's hidden values."""
    return Trunk(
        dim=dim,
        depth=2 * depth,
        heads=heads,
        hidden=int(dim * 4.0 * 2 / 3),
        norm="rms",
        eps=1e-6,
        ffn="geglu",
        bias="qkv",
        modulation="own",
        dropout=dropout,
        ffn_dropout=dropout,
        attention_dropout=attention_dropout,
        checkpointing=checkpointing,
        final_norm="plain",
    )


class TwoStacks(nn.Module):
    """What enters the first stack and what stands between the two. Stays float32 beside a bf16 trunk."""

    def __init__(self, *, channels: int, length: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, dim)
        self.enter_norm, self.middle_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.middle = nn.Linear(dim, dim)
        self.enter_position = nn.Parameter(torch.empty(1, length, dim))
        self.middle_position = nn.Parameter(torch.empty(1, length, dim))

    def enter(self, x: Tensor, a: int, b: int) -> Tensor:
        """Embedded values x [R, b - a, D] of positions a..b-1, with their place, normed."""
        return self.enter_norm(x + self.enter_position[:, a:b])

    def operations(self, embedded: int, positions: int) -> float:
        """Operations of a training step of so many embedded values and positions (vtok/acceleration.py)."""
        return 6.0 * (self.project.weight.numel() * embedded + self.middle.weight.numel() * positions)

    def edit(self, a: int, b: int) -> Callable[[Tensor], Tensor]:
        """The change of h [R, b - a, D] on entry to the second stack."""

        def change(h: Tensor) -> Tensor:
            return (self.middle(self.middle_norm(h.float())) + self.middle_position[:, a:b]).to(h.dtype)

        return change


def initialise(module: nn.Module) -> None:
    """Linear weights Xavier-uniform, biases 0; tables and positions normal, std 0.02; nothing starts at zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, TwoStacks):
            nn.init.normal_(part.enter_position, std=0.02)
            nn.init.normal_(part.middle_position, std=0.02)
