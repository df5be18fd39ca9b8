"""xAR: autoregression over entities of a latent map, each made by flow matching (Ren et al., arXiv 2502.20388).

An entity is a token, a cell, a subsample, a scale or the whole image. The trunk itself is the velocity network: the
input of step k is entity k at its own flow time, next to the earlier entities at theirs. In training every entity has
an independent time (noisy context learning); in sampling the earlier ones are clean: a finished entity is encoded again
at time 0 before its keys and values are kept. Class and time modulate every block, per entity.

Differs from the original: the clean encoding is a pass of its own, not half of the next entity's first one (the same
numbers); noise and times are keyed by sample; only cells were published, the other entities follow the paper's text,
scales being area averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vgen.conditioning import ClassConditioner, Cond
from vgen.flow_draw import FlowDraw, pinned
from vgen.gaussian import Moments
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.heads_flow import VelocityHead
from vgen.latents import Entity, entity_layout, gather_index, pyramid, require_grid, stretched_rope
from vgen.two_stacks import TwoStacks, initialise, stacked_trunk
from vtok.acceleration import linear_parameters
from vtok.flow import interpolate, logit_normal
from vtok.layers.cache import KVCache
from vtok.layers.time import TimeEmbedding
from vtok.layers.trunk import Inputs
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec

TIME_STREAM, NOISE_STREAM = 7101, 7102  # noise streams of the training times and of the noise that is mixed in


class XAR(Generator):
    """Published sizes (cells of 8 x 8 in a 16 x 16 map), as blocks, width, heads: B 2 x 8, 768, 12; L 2 x 16, 1024, 16;
    H 2 x 20, 1280, 16.

    spec: continuous tokens on one grid. depth: blocks of each of the two stacks. entity, entity_size: see
    vgen.latents.entity_layout. solver, solver_steps: of sampling, see FlowDraw. dropout: after attention and
    feed-forward and inside it.
    """

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        entity: Entity = "cell",
        entity_size: int | None = None,
        solver_steps: int = 40,
        solver: str = "euler_maruyama",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        height, columns = require_grid(spec, "xAR")
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = entity_layout(height, columns, entity, entity_size)
        self.flow = FlowDraw(solver_steps, solver)
        self.channels = spec.parts[0].channels
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width, vector=True)
        self.time = TimeEmbedding(dim=width, whole=True)
        self.stacks = TwoStacks(channels=self.channels, length=self.layout.length, dim=width)
        self.trunk = stacked_trunk(
            dim=width,
            depth=depth,
            heads=heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            checkpointing=checkpointing,
        )
        self.head = VelocityHead(dim=width, channels=self.channels)
        for name, table in zip(("cos", "sin"), stretched_rope(self.layout, width // heads)):
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("entities", self.layout.steps_of_tokens(), persistent=False)
        # scale is the one entity whose canvas is not a permutation of the tokens, even where it has one scale only
        index = torch.empty(0, dtype=torch.int64) if entity == "scale" else gather_index(spec.layout, self.layout)
        self.register_buffer("index", index, persistent=False)
        raster = entity_layout(height, columns, "token", None)
        self.register_buffer("raster", gather_index(spec.layout, raster), persistent=False)
        initialise(self)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_grid(spec, "xAR")

    @property
    def vectors(self) -> int:
        """A vector an entity: class and time."""
        return self.layout.steps

    def operations(self, key: Tensor | None = None) -> float:
        length = self.layout.length
        times = 6.0 * linear_parameters(self.time) * self.layout.steps
        return super().operations() + self.stacks.operations(length, length) + times

    def check_rule(self, rule: DrawRule) -> None:
        self.flow.of(rule)

    def arrange(self, tokens: Tensor) -> Canvas:
        if len(self.index):
            return Canvas(tokens[:, self.index], self.layout)
        maps = tokens[:, self.raster].unflatten(1, self.spec.layout.sides[0])
        return Canvas(pyramid(maps, self.layout), self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        if len(self.index):
            return canvas.tokens[:, self.index.argsort()]
        return canvas.tokens[:, -len(self.raster) :][:, self.raster.argsort()]

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        """canvas.tokens hold every entity at its time, canvas.time [R, K]; None means that all are clean."""
        layout = canvas.layout
        a, b = layout.written(start, stop)
        x = self.stacks.enter(self.stacks.project(canvas.tokens[:, a:b]), a, b)
        time = x.new_zeros(len(x), layout.steps) if canvas.time is None else canvas.time
        return Inputs(
            x=x,
            rank=layout.ranks(start, stop, device=x.device),
            pattern=layout.pattern(start, stop),
            position=(self.cos[a:b], self.sin[a:b], None),
            vector=cond.vector + self.time(time[:, start:stop]),
            each=self.entities[a:b] - start if len(set(layout.sizes[start:stop])) > 1 else None,
            at={len(self.trunk.blocks) // 2: self.stacks.edit(a, b)},
        )

    def draw(
        self,
        canvas: Canvas,
        cond: Cond,
        k: int,
        *,
        cache: KVCache | None,
        noise: SampleNoise,
        guide: Guidance,
        rule: DrawRule,
    ) -> Tensor:
        layout, rows = canvas.layout, replace(canvas, time=None).repeat(guide.streams)
        a, b = layout.written(k, k + 1)
        if cache is not None and k > 0:  # as context, the entity before is clean; read from the canvas: it may be given
            self(rows, cond, k - 1, k, cache)
            cache.commit(layout.reads[k - 1] + cond.ahead(k - 1))
        tokens, time = rows.tokens.clone(), rows.tokens.new_zeros(len(rows.tokens), layout.steps)
        noised = Canvas(tokens, layout, time=time)
        position = torch.arange(a, b, device=tokens.device) if canvas.order is None else canvas.order[:, a:b]

        def velocity(x: Tensor, t: float, streams: int) -> Tensor:
            tokens[:, a:b] = x.repeat(guide.streams, 1, 1)
            time[:, k] = t
            count, given, kept, seen = streams * len(x), cond, cache, noised
            if count < len(tokens) and not cond.at:  # edits may know all rows
                given, kept = cond.first(count), None if cache is None else cache.first(count)
                seen = replace(noised, tokens=tokens[:count], time=time[:count])
            return self.head(self(seen, given, 0 if cache is None else k, k + 1, kept)[:count, a - b :])

        if canvas.known is not None:
            start = noise.normal(position, self.channels) * rule.temperature
            velocity = pinned(velocity, canvas.known[:, a:b], canvas.tokens[:, a:b], start)
        return self.flow(
            velocity,
            self.channels,
            guide=guide,
            noise=noise,
            position=position,
            rule=rule,
            progress=Progress.of(layout, k),
        )

    def corrupt(self, canvas: Canvas, key: Tensor, context: Canvas | None = None) -> tuple[Canvas, Tensor]:
        """The canvas with every entity at a time of its own, sigmoid(N(0, 1)), and the velocities e - x [B, L, C].

        context: what is noised in the place of the canvas; x of the velocities stays the canvas's.
        """
        noise, length = SampleNoise(key), canvas.layout.length
        steps = torch.arange(canvas.layout.steps, device=key.device)
        time = logit_normal(noise.normal(steps, 1, TIME_STREAM)[..., 0])
        error = noise.normal(torch.arange(length, device=key.device), self.channels, NOISE_STREAM)
        noised = interpolate((context or canvas).tokens, error, time[:, self.entities])
        return replace(canvas, tokens=noised, time=time), error - canvas.tokens

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Mean squared error of the velocity; "nats" [B, L] is that of every token (no likelihood)."""
        canvas = self.arrange_batch(batch["tokens"], batch, progress)
        context = self.arrange_batch(batch["context"], batch, progress) if "context" in batch else None
        noised, velocity = self.corrupt(canvas, batch["key"], context)
        h = self(noised, self.conditioner(batch["label"], self.dropped(batch)))
        error = self.head.loss(h, velocity, self.layout.sizes)
        return {"loss": error.mean(), "nats": error.detach()}

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        noised, velocity = self.corrupt(self.arrange(batch["tokens"]), batch["key"])
        best = moments.velocity(noised.tokens, noised.time[:, self.entities])
        error = (best - velocity).square().mean(-1)
        return {"loss": error.mean(), "nats": error}

    def log_prob(self, canvas: Canvas, cond: Cond, *, context: Canvas | None = None) -> Tensor:
        raise ValueError("a flow gives no closed likelihood: xAR has no log_prob")
