"""E-CAR: continuous tokens stage by stage at growing resolution, each stage a part of one denoising (arXiv 2412.14170).

Stage s moves a map from its start time to its end time only; the end is enlarged and noised again, which makes the
start of the next stage, and the last end is time 0. The trunk, FlowAR's, gives the states of a stage from the maps
before it, which are still noisy. So the whole costs about one denoising instead of one a scale (FlowAR).

Status: unofficial, from the abstract alone; no sizes, code or FID were found. Chosen by us: FlowAR's trunk and head;
evenly spaced end times 1 - s / S; the path between the stages of pyramidal flow matching (Jin et al., arXiv 2410.05954,
eqs. 10 to 15): after nearest enlargement by r from end time b, the next start is a = r b / (1 + (r - 1) b), the map is
scaled by (1 - a) / (1 - b), and noise that is correlated -1 / (r^2 - 1) inside a cell of r x r makes the noise white.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.gaussian import Moments
from vgen.generator import Canvas
from vgen.heads import DrawRule
from vgen.heads_block_flow import NOISE_STREAM, TIME_STREAM, at_tokens
from vgen.latents import enlarge, scale_map, shrink
from vgen.models.flowar import FlowAR
from vtok.flow import interpolate
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import TokenSpec


def start_after(end: float, ratio: int) -> float:
    """The time at which a stage starts when the one before, `ratio` times smaller, ended at `end`."""
    return ratio * end / (1 + (ratio - 1) * end)


def renoise(maps: Tensor, end: float, white: Tensor) -> Tensor:
    """Maps [B, h, w, C] at time `end` to the start of the next stage [B, r h, r w, C], with white noise like it."""
    side = white.shape[1]
    ratio = side // maps.shape[1]
    scale = (1 - start_after(end, ratio)) / (1 - end)
    inside = white - enlarge(shrink(white, maps.shape[1]), side, "nearest")  # variance 1 - 1 / r^2
    noise = inside * math.sqrt(ratio**2 / (ratio**2 - 1))
    return scale * (enlarge(maps, side, "nearest") + end * math.sqrt(ratio**2 - 1) * noise)


STOCHASTIC = "solver=euler_maruyama needs a path from noise to data; E-CAR's stages walk a part of it: choose euler"


class ECAR(FlowAR):
    """Arguments as FlowAR, and ends: the time at which each stage ends, falling, the last 0 (None = 1 - s / S). solver:
    any but euler_maruyama."""

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        head_depth: int,
        head_width: int,
        head_cross: bool = False,
        scales: int | None = 3,
        ends: Sequence[float] | None = None,
        solver_steps: int = 10,
        solver: str = "euler",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        label_drop: float = 0.1,
    ) -> None:
        if solver == "euler_maruyama":
            raise ValueError(STOCHASTIC)
        super().__init__(
            spec,
            num_classes,
            depth=depth,
            width=width,
            heads=heads,
            head_depth=head_depth,
            head_width=head_width,
            head_cross=head_cross,
            scales=scales,
            solver_steps=solver_steps,
            solver=solver,
            dropout=dropout,
            attention_dropout=attention_dropout,
            label_drop=label_drop,
        )
        stages = self.layout.steps
        self.ends = tuple(ends) if ends is not None else tuple(1 - (s + 1) / stages for s in range(stages))
        pairs = zip((1.0, *self.ends), self.ends)
        if len(self.ends) != stages or self.ends[-1] != 0 or any(not 0 <= to < t for t, to in pairs):
            raise ValueError(f"ends={list(self.ends)}: {stages} times falling from below 1 to 0 are needed")
        sides = [side for side, _ in self.layout.sides]
        ratios = [side // before for before, side in itertools.pairwise(sides)]
        self.starts = (1.0, *(start_after(end, ratio) for end, ratio in zip(self.ends, ratios)))
        self.register_buffer("times", torch.tensor([self.ends, self.starts]), persistent=False)

    def check_rule(self, rule: DrawRule) -> None:
        super().check_rule(rule)
        if rule.solver == "euler_maruyama":
            raise ValueError(STOCHASTIC)

    def path(
        self, canvas: Canvas, k: int, noise: SampleNoise, position: Tensor, rule: DrawRule
    ) -> tuple[Tensor, tuple[float, float]]:
        self.check_rule(rule)
        start = noise.normal(position, self.head.channels) * rule.temperature
        if k:
            before = scale_map(canvas.tokens, canvas.layout, k - 1)
            start = renoise(before, self.ends[k - 1], start.unflatten(1, canvas.layout.sides[k])).flatten(1, 2)
        return start, (self.ends[k], self.starts[k])

    def stages(
        self, canvas: Canvas, noise: SampleNoise, stream: int = NOISE_STREAM, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(starts, ends), each [B, L, C], of every stage's path, from the clean scales of `canvas`. Noise is carried
        from stage to stage as in sampling, so that the context has the law of the maps that a perfect flow would write.

        stream, temperature: of the white noise; those of a draw are 0 and its rule's.
        """
        layout, starts, ends = canvas.layout, [], []
        for k, (high, low) in enumerate(zip(self.starts, self.ends)):
            position = torch.arange(*layout.written(k, k + 1), device=canvas.tokens.device)
            white = noise.normal(position, self.head.channels, stream) * temperature
            white = white.unflatten(1, layout.sides[k])
            data, start, error = scale_map(canvas.tokens, layout, k), white, white
            if k:
                start = renoise(ends[-1], self.ends[k - 1], white)
                clean = enlarge(scale_map(canvas.tokens, layout, k - 1), layout.sides[k][0], "nearest")
                error = (start - (1 - high) * clean) / high
            starts.append(start)
            ends.append((1 - low) * data + low * error)
        return tuple(torch.cat([part.flatten(1, 2) for part in parts], dim=1) for parts in (starts, ends))

    def hold(self, tokens: Tensor, noise: SampleNoise, temperature: float = 1.0) -> Canvas:
        """Every stage's end, on the path that starts where the draw does."""
        return Canvas(self.stages(self.arrange(tokens), noise, 0, temperature)[1], self.layout)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """FlowAR's loss on the straight paths of the stages; the trunk reads those of a context, of the same noise."""
        canvas, noise = self.arrange_batch(batch["tokens"], batch, progress), SampleNoise(batch["key"])
        starts, ends = self.stages(canvas, noise)
        given = ends
        if "context" in batch:
            given = self.stages(self.arrange_batch(batch["context"], batch, progress), noise)[1]
        h = self(Canvas(given, self.layout), self.conditioner(batch["label"], self.dropped(batch)))
        share, each = self.shares(noise)
        x = interpolate(ends, starts, each)
        low, high = self.times
        error = self.head.error(h, x, low + share * (high - low), starts - ends, self.layout.sizes)
        return self.weighted(error)

    def shares(self, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        """How far along each stage's path training looks, [B, K], and the same of every token [B, L]."""
        share = noise.uniform(torch.arange(self.layout.steps, device=noise.seeds.device), TIME_STREAM)
        return share, at_tokens(share, self.layout.sizes)

    def moments(self, tokens: Tensor) -> Moments:
        keys = sample_seeds(0, 0, len(tokens)).to(tokens.device)
        starts, ends = self.stages(self.arrange(tokens), SampleNoise(keys))
        return Moments.of(ends, starts)

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        noise = SampleNoise(batch["key"])
        starts, ends = self.stages(self.arrange(batch["tokens"]), noise)
        _, each = self.shares(noise)
        best = moments.velocity(interpolate(ends, starts, each), each)
        return self.weighted((best - (starts - ends)).square().mean(-1))
