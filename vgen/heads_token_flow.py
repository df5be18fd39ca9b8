"""Token flow head: each continuous token is drawn by a small rectified flow given its hidden state.

The network and its place are MAR's (arXiv 2406.11838); the flow replaces its diffusion, as in the per-token head of
Transition Matching (Shaul et al., arXiv 2506.23589).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgen.flow_draw import FlowDraw
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.heads_continuous import ContinuousHead, Network, TokenMLP
from vtok.flow import interpolate
from vtok.noise import SampleNoise


class FlowHead(ContinuousHead):
    """depth x width of the MLP. solver_steps, solver: when sampling (vgen/flow_draw.py)."""

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        width: int = 1024,
        depth: int = 6,
        solver_steps: int = 25,
        solver: str = "euler",
        repeats: int = 4,
    ) -> None:
        super().__init__(channels=channels, repeats=repeats)
        self.walk = FlowDraw(solver_steps, solver)
        self.mlp = TokenMLP(dim=dim, channels=channels, outputs=channels, width=width, depth=depth)

    def check_rule(self, rule: DrawRule) -> None:
        self.walk.of(rule)

    def times(self, uniform: Tensor) -> Tensor:
        return uniform

    def denoising_loss(
        self, h: Tensor, target: Tensor, t: Tensor, noise: Tensor, network: Network | None = None
    ) -> Tensor:
        """Mean squared error of the velocity, float32 [..]."""
        velocity = (network or self.mlp)(interpolate(target, noise, t), t, h).float()
        return ((noise - target - velocity) ** 2).mean(-1)

    def draw(
        self,
        h: Tensor,
        sizes: Sequence[int],
        *,
        guide: Guidance,
        noise: SampleNoise,
        position: Tensor,
        rule: DrawRule,
        progress: Progress,
    ) -> Tensor:
        """Tokens float32 [B, n, C] from h [S * B, n, D]. Guidance is on the velocity; temperature scales the noise."""
        with torch.autocast(h.device.type, enabled=False):
            condition = self.mlp.condition(h.float())

            def velocity(x: Tensor, t: float, streams: int) -> Tensor:
                return self.mlp.at(x.repeat(streams, 1, 1), t, condition[: streams * len(x)])

            return self.walk(
                velocity, self.channels, guide=guide, noise=noise, position=position, rule=rule, progress=progress
            )
