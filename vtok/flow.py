"""Rectified flow between data and noise, and the solvers that walk it. Time 0 is data, time 1 is noise.

x_t = (1 - t) x_0 + t e and the velocity dx/dt = e - x_0 (Liu et al., arXiv 2209.03003; Lipman et al., arXiv
2210.02747). Papers that count time the other way are translated by their converter: t' = 1 - t and v' = -v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Solver = Literal["euler", "heun", "ab2"]


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
    (Adams-Bashforth, first step Euler). on_step(i, x, slope) is called after step i.
    """
    if solver not in ("euler", "heun", "ab2"):
        raise ValueError(f"solver={solver!r}: choose euler, heun or ab2")
    before: Tensor | None = None
    last = 0.0
    for i, (t, to) in enumerate(itertools.pairwise(grid)):
        step = to - t
        slope = velocity(x, t)
        used = slope
        if solver == "heun" and to != 0:
            used = 0.5 * (slope + velocity(x + step * slope, to))
        elif solver == "ab2" and before is not None:
            ratio = step / last
            used = (1 + 0.5 * ratio) * slope - 0.5 * ratio * before
        x, before, last = x + step * used, slope, step
        if on_step is not None:
            on_step(i, x, slope)
    return x


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times sigmoid(mean + std n) of standard normal numbers (SD3, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * normal)
