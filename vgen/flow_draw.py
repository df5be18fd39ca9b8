"""Drawing continuous tokens by solving a flow: keyed noise, guidance on the velocity, the solver of choice.

Noise is keyed by the token's position and the solver step (stream 0: the start; stream 1 + i: step i of a stochastic
solver), so that a sample does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgen.guidance import Guidance, Progress, reads_null
from vgen.heads import DrawRule
from vtok.flow import settle, solve, solve_stochastic, times
from vtok.noise import SampleNoise

SOLVERS = ("euler", "heun", "ab2", "euler_maruyama")


Velocity = Callable[[Tensor, float, int], Tensor]


def pinned(velocity: Velocity, known: Tensor | None, tokens: Tensor, start: Tensor) -> Velocity:
    """A velocity that sees the known tokens, bool [B, n], on the straight path from `start` at time 1 to `tokens` at
    time 0, both [B, n, C], so that the others flow to what goes with them (replacement as in RePaint, Lugmayr et al.,
    arXiv 2201.09865, without its resampling)."""
    if known is None:
        return velocity
    return lambda x, t, *streams: velocity(torch.where(known[..., None], (1 - t) * tokens + t * start, x), t, *streams)


@dataclass(frozen=True)
class FlowDraw:
    """How many steps of which solver walk from noise to a token, where the draw rule does not say otherwise.

    euler, heun and ab2 take even steps; euler_maruyama is stochastic, down to time 0.04, with one last step to 0.
    """

    steps: int
    solver: str = "euler"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: choose {', '.join(SOLVERS)}")
        if self.steps < (2 if self.solver == "euler_maruyama" else 1):
            raise ValueError(f"solver_steps={self.steps} is too few for solver={self.solver}")

    def of(self, rule: DrawRule) -> FlowDraw:
        """The walk that a rule asks for. Raises ValueError where there is none."""
        rule.require_continuous()
        if rule.solver is None and rule.solver_steps is None:
            return self
        steps = self.steps if rule.solver_steps is None else rule.solver_steps
        return FlowDraw(steps, self.solver if rule.solver is None else rule.solver)

    def __call__(
        self,
        velocity: Velocity,
        channels: int,
        *,
        guide: Guidance,
        noise: SampleNoise,
        position: Tensor,
        rule: DrawRule,
        progress: Progress,
        start: Tensor | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Tokens float32 [B, n, channels].

        velocity(x, t, streams): of the first `streams` guidance streams, [streams * B, n, channels], at x float32 [B,
        n, channels]; of the conditional one alone where the scale is 1. position: int64 [n] or [B, n], keys the noise.
        start: x at time 1 where it is not fresh noise. span: the flow times that the solver's times 0 and 1 are
        (E-CAR), for guidance. The state is float64: forty small steps add up.
        """
        walk = self.of(rule)
        if walk is not self:
            return walk(
                velocity,
                channels,
                guide=guide,
                noise=noise,
                position=position,
                rule=replace(rule, solver=None, solver_steps=None),
                progress=progress,
                start=start,
                span=span,
            )
        low, high = span
        wide = torch.float32 if position.device.type == "mps" else torch.float64

        def normal(stream: int) -> Tensor:
            return noise.normal(position, channels, stream).to(wide) * rule.temperature

        def guided(x: Tensor, t: float) -> Tensor:
            now = replace(progress, time=low + t * (high - low))
            if not reads_null(guide, now):
                return velocity(x.float(), t, 1).to(wide)
            out = velocity(x.float(), t, guide.streams).to(wide)
            return guide(out.unflatten(0, (guide.streams, -1)), now)

        x = normal(0) if start is None else start.to(wide)
        if self.solver == "euler_maruyama":
            return solve_stochastic(guided, x, settle(self.steps), lambda i: normal(1 + i)).float()
        return solve(guided, x, times(self.steps), solver=self.solver).float()
