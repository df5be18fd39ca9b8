"""Rectified flow between data and noise, and the solvers that walk it. Time 0 is data, time 1 is noise.

x_t = (1 - t) x_0 + t e and the velocity dx/dt = e - x_0 (Liu et al., arXiv 2209.03003; Lipman et al., arXiv
2210.02747). Papers that count time the other way are translated by their converter: t' = 1 - t and v' = -v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vtok.noise import SampleNoise

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]
Solver = Literal["euler", "heun", "ab2", "ab2_uniform"]


def spread(t: Tensor, like: Tensor) -> Tensor:
    """t [B] or [B, ..] with trailing dimensions of one, to broadcast against `like`."""
    return t.reshape(*t.shape, *[1] * (like.dim() - t.dim()))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of data and noise of one shape [B, ..] at times t [B, ..]."""
    t = spread(t, data)
    return (1 - t) * data + t * noise


def data_of(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The data that a velocity at (x, t) points to: x - t v."""
    return x - spread(t, x) * velocity


def times(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 down to 0: uniform u, moved by shift u / (1 + (shift - 1) u) (SD3, arXiv 2403.03206)."""
    if steps < 1:
        raise ValueError(f"a flow needs at least one step, got {steps}")
    return [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps + 1)]


def solve(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    *,
    solver: Solver = "euler",
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from time grid[0] to grid[-1], one solver step between neighbours.

    "heun" averages the slopes at both ends (not where the end is 0); "ab2" extrapolates from the slope before
    (Adams-Bashforth, first step Euler); "ab2_uniform" does so with the weights 3/2 and -1/2 of equal steps whatever the
    grid, as D-AR (arXiv 2505.23660) does. on_step(i, x, slope) is called after step i.
    """
    if solver not in ("euler", "heun", "ab2", "ab2_uniform"):
        raise ValueError(f"solver={solver!r}: choose euler, heun, ab2 or ab2_uniform")
    before: Tensor | None = None
    last = 0.0
    for i, (t, to) in enumerate(itertools.pairwise(grid)):
        step = to - t
        slope = velocity(x, t)
        used = slope
        if solver == "heun" and to != 0:
            used = 0.5 * (slope + velocity(x + step * slope, to))
        elif solver in ("ab2", "ab2_uniform") and before is not None:
            ratio = step / last if solver == "ab2" else 1.0
            used = (1 + 0.5 * ratio) * slope - 0.5 * ratio * before
        x, before, last = x + step * used, slope, step
        if on_step is not None:
            on_step(i, x, slope)
    return x


def settle(steps: int, end: float = 0.04) -> list[float]:
    """steps + 1 times: 1 down to `end` in equal parts, then 0, for a stochastic solver whose score is 1 / t (xAR)."""
    if steps < 2:
        raise ValueError(f"a stochastic solver needs at least two steps, got {steps}")
    return [1 + (end - 1) * i / (steps - 1) for i in range(steps)] + [0.0]


def solve_stochastic(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    normal: Callable[[int], Tensor],
    *,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Euler-Maruyama on the stochastic process with the marginals of the flow and diffusion w = 2 t (SiT, Ma et al.,
    arXiv 2401.08740, eq. 4): dx = (v - w s / 2) dt + sqrt(w) dW with the score s = -(x + (1 - t) v) / t, so that the
    drift is x + (2 - t) v.

    normal(i): standard normal numbers like x for step i, i = 0 .. len(grid) - 3; the last step adds none.
    """
    last = len(grid) - 2
    for i, (t, to) in enumerate(itertools.pairwise(grid)):
        drift = x + (2 - t) * velocity(x, t)
        x = x + (to - t) * drift
        if i < last:
            x = x + math.sqrt(2 * t * abs(to - t)) * normal(i)
        if on_step is not None:
            on_step(i, x, drift)
    return x


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times t moved as the grid of `times` is."""
    return shift * t / (1 + (shift - 1) * t)


def normal_map(noise: SampleNoise, channels: int, height: int, width: int, *, stream: int = 0) -> Tensor:
    """Standard normal start or target noise of every sample, float32 [B, channels, height, width]."""
    position = torch.arange(height * width, device=noise.seeds.device)
    return noise.normal(position, channels, stream).transpose(1, 2).unflatten(2, (height, width))


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times sigmoid(mean + std n) of standard normal numbers (SD3, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * normal)
