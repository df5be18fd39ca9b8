"""Guidance: how the streams of a step are combined, and how its scale moves during generation.

One convention: c + (s - 1)(c - u), bitwise c at s = 1, which means off. VAR's published t is s = 1 + t. Null rows run
from the first step to the last one that is guided, also at steps between whose scale is 1, since their cache must not
have holes; without a cache, in guided steps alone. A solver that moves tokens runs them only at times whose scale is
not 1: what it computes on the way is not kept. One step alone counts as the last: schedules have their whole scale
there. Schedules: specs of the papers named at each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vtok.layout import SequenceLayout


@dataclass(frozen=True)
class Progress:
    """Where generation stands: step of steps; share of tokens decided before and after it; flow time (1 = noise)."""

    step: int
    steps: int
    before: float = 0.0
    after: float = 1.0
    time: float = 0.0

    @classmethod
    def of(cls, layout: SequenceLayout, step: int) -> Progress:
        """Of a step of a layout, counted from 0."""
        a, b = layout.written(step, step + 1)
        return cls(step, layout.steps, a / layout.length, b / layout.length)

    @property
    def ramp(self) -> float:
        """0 at the first step, 1 at the last, also where that is the first."""
        return self.step / (self.steps - 1) if self.steps > 1 else 1.0


Schedule = Callable[[Progress], float]


class Guidance(Protocol):
    """How the outputs of `streams` condition streams (the first conditional, the others null) become one."""

    streams: int

    def __call__(self, out: Tensor, progress: Progress) -> Tensor:
        """Combine out [streams, B, ..] to [B, ..]."""


@dataclass(frozen=True)
class Unguided:
    """The conditional stream alone."""

    streams: int = 1

    def __call__(self, out: Tensor, progress: Progress) -> Tensor:
        return out[0]


@dataclass(frozen=True)
class ClassifierFree:
    """c + (s - 1)(c - u), Ho & Salimans, arXiv 2207.12598; streams are conditional, null."""

    schedule: Schedule
    streams: int = 2

    def __call__(self, out: Tensor, progress: Progress) -> Tensor:
        scale = self.schedule(progress)
        conditional, null = out[0], out[1]
        if scale == 1:
            return conditional
        return conditional + (scale - 1) * (conditional - null)


@dataclass(frozen=True)
class Constant:
    """scale at every step (LlamaGen)."""

    scale: float

    def __call__(self, progress: Progress) -> float:
        return self.scale


@dataclass(frozen=True)
class Linear:
    """From `start` at the first step to `scale` at the last (VAR: start 1, scale 1 + cfg; D-AR; xAR).

    reached: the step at which `scale` is reached where it comes before the last; growth goes on behind it (FlexVAR: 9).
    """

    scale: float
    start: float = 1.0
    reached: int | None = None

    def __call__(self, progress: Progress) -> float:
        early = self.reached is not None and self.reached < progress.steps - 1
        ramp = progress.step / self.reached if early else progress.ramp
        return self.start + (self.scale - self.start) * ramp


@dataclass(frozen=True)
class Cosine:
    """1 + (scale - 1)(1 - cos(pi (k/K)^power)) / 2, step k of K (RAR's power-cosine; power 1 is the plain cosine);
    scale where K is 1."""

    scale: float
    power: float = 1.0

    def __call__(self, progress: Progress) -> float:
        u = (progress.step / progress.steps) ** self.power if progress.steps > 1 else 1.0
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Interval:
    """scale while low <= share of steps done <= high, 1 outside (Kynkaanniemi et al., arXiv 2404.07724; GigaTok). One
    step alone has all shares: scale if any is inside.

    first: scale also at the first step, as the published samplers of GigaTok and ReToK have it.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    first: bool = False

    def __call__(self, progress: Progress) -> float:
        first, last = (0.0, 1.0) if progress.steps == 1 else (progress.ramp, progress.ramp)
        inside = (self.low <= last and first <= self.high) or (self.first and progress.step == 0)
        return self.scale if inside else 1.0


@dataclass(frozen=True)
class Count:
    """1 + (scale - 1) times the share of tokens decided after the step (MAR's linear).

    tokens: how many there are; with it, the last step counts one of them as open, as MAR's code does.
    """

    scale: float
    tokens: int | None = None

    def __call__(self, progress: Progress) -> float:
        share = progress.after if self.tokens is None else min(progress.after, 1 - 1 / self.tokens)
        return 1 + (self.scale - 1) * share


@dataclass(frozen=True)
class Previous:
    """1 + (scale - 1) k / K at step k of K (TiTok's linear: scale 1 + its cfg; ELM, with one token a step); scale where
    K is 1."""

    scale: float

    def __call__(self, progress: Progress) -> float:
        if progress.steps == 1:
            return self.scale
        return 1 + (self.scale - 1) * progress.step / progress.steps


@dataclass(frozen=True)
class Gate:
    """Linear's ramp from `start` to `scale` over the steps, while the flow time is at most `high`; 1 above (FlowAR)."""

    scale: float
    high: float = 1.0
    start: float = 1.0

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.scale - self.start) * progress.ramp if progress.time <= self.high else 1.0


SCHEDULES = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "interval": Interval,
    "count": Count,
    "previous": Previous,
    "gate": Gate,
}


def reads_null(guide: Guidance, progress: Progress) -> bool:
    """Whether the scale is not 1 there; true where the guidance or its schedule is none of those here, which alone are
    known to say so before they are asked."""
    if type(guide) is not ClassifierFree or not isinstance(guide.schedule, tuple(SCHEDULES.values())):
        return True
    return guide.schedule(progress) != 1


def guided_steps(guide: Guidance, layout: SequenceLayout) -> list[bool]:
    """Which steps of a layout read null rows at some flow time: Gate alone looks at it, open at time 0 if at any."""
    return [reads_null(guide, Progress.of(layout, k)) for k in range(layout.steps)]


def guidance(scale: float, schedule: str = "constant", **options: float) -> Unguided | ClassifierFree:
    """Guidance by name. scale 1 with the schedules here means off at every step: no null row is run.

    Raises ValueError for an unknown schedule or option.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r}: choose {', '.join(SCHEDULES)}")
    try:
        chosen = SCHEDULES[schedule](scale, **options)
    except TypeError as error:
        raise ValueError(f"guidance schedule {schedule}: {str(error).split('.__init__() ')[-1]}") from None
    off = scale == 1 and options.get("start", 1) == 1
    return Unguided() if off else ClassifierFree(chosen)
