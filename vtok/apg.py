"""Guidance of a flow decoder: classifier-free, or projected, which large scales do not oversaturate.

Classifier-free: Ho and Salimans, arXiv 2207.12598, as c + (s - 1)(c - u). Adaptive projected guidance: Sadat, Hilliges
and Weber, arXiv 2410.02416, algorithm 1: the difference c - u is averaged with a negative momentum over the steps, its
norm is limited, and of its part along c only `parallel` stays. FlexTok (arXiv 2502.13967) decodes with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtok.flow import Velocity

MOMENTUM, LIMIT = -0.5, 2.5  # FlexTok's

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """c + (s - 1)(c - u); bitwise c at s = 1."""
    return conditional if scale == 1 else conditional + (scale - 1) * (conditional - unconditional)


def projected(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    *,
    before: Tensor | None = None,
    momentum: float = MOMENTUM,
    parallel: float = 0.0,
    limit: float = LIMIT,
) -> tuple[Tensor, Tensor]:
    """Guided prediction and the running difference, both [B, C, H, W], of predictions of that shape.

    before: the running difference of the step before, None at the first. limit: largest norm of a sample's difference;
    0 for none. parallel: share kept of its part along the conditional prediction.
    """
    running = conditional - unconditional
    if before is not None:
        running = running + momentum * before
    change = running
    if limit > 0:
        norm = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        change = change * (limit / norm).clamp(max=1.0)
    # the projection of a small difference on a large prediction cancels in float32
    change, along = change.double(), torch.nn.functional.normalize(conditional.double().flatten(1), dim=1)
    along = along.view_as(conditional)
    side = (change * along).flatten(1).sum(1).view(-1, 1, 1, 1) * along
    change = (change - (1 - parallel) * side).to(conditional.dtype)
    return conditional + (scale - 1) * change, running


def guided(pair: Pair, scale: float, *, project: bool) -> Velocity:
    """Velocity for `flow.solve` from a function that gives the conditional and the unconditional one.

    It remembers the running difference between its calls: make one for each walk, and call it in order.
    """
    before: list[Tensor | None] = [None]

    def velocity(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = pair(x, t)
        if not project:
            return classifier_free(conditional, unconditional, scale)
        made, before[0] = projected(conditional, unconditional, scale, before=before[0])
        return made

    return velocity
