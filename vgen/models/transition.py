"""Transition Matching (Shaul et al., arXiv 2506.23589): a chain of T levels from noise X_0 to data X_T whose kernel
p(X_t+1 | X_t) is learned, the next level being drawn token by token from a small flow head on the trunk's states.

Here is DTM (difference): X_t = (1 - t/T) X_0 + (t/T) X_T; the head draws Y = X_T - X_0 given a bidirectional trunk over
X_t, and X_t+1 = X_t + Y / T. ARTM and FHTM, whose tokens come one after another, are in transition_causal.py.

Status: unofficial. The paper's models are 1.7B text-to-image; no code, class-conditional model or FID on ImageNet
exists. Chosen by us: xAR's blocks, modulated by class and level, with rope and a table of positions; MAR's MLP as the
head; T, widths and solver steps; the head gets the level through the trunk's state alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.gaussian import Moments, posterior
from vgen.generator import Canvas, Generator, conditioned
from vgen.guidance import Guidance
from vgen.heads import DrawRule
from vgen.heads_token_flow import FlowHead
from vgen.latents import require_grid
from vgen.two_stacks import initialise
from vtok.acceleration import linear_parameters, trunk_operations
from vtok.flow import interpolate, spread
from vtok.layers.cache import KVCache
from vtok.layers.rope import rope_2d
from vtok.layers.time import TimeEmbedding
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec

LEVEL_STREAM, NOISE_STREAM = 7401, 7402


def level_layout(spec: TokenSpec, sizes: tuple[int, ...], **fields: Any) -> SequenceLayout:
    """Levels 0, 1, .. of the tokens of a spec, one behind the other, written in steps of the given sizes."""
    levels = range(sum(sizes) // spec.layout.length)
    return SequenceLayout(sizes, tuple((t, r, c) for t in levels for _, r, c in spec.layout.coords), **fields)


def checked(spec: TokenSpec | Mapping[str, Any], family: str, levels: int) -> TokenSpec:
    spec = TokenSpec.from_config(spec)
    require_grid(spec, family)
    if levels < 1:
        raise ValueError(f"levels={levels}: at least one transition is learned")
    return spec


class Transition(Generator):
    """What the three share: T + 1 levels over the tokenizer's tokens, the first pure noise, the last the image."""

    levels: int
    head: FlowHead

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_grid(spec, cls.__name__)

    def chain(
        self, tokens: Tensor, noise: SampleNoise | None = None, stream: int = NOISE_STREAM, temperature: float = 1.0
    ) -> Tensor:
        """Levels [B, (T + 1) N, C] of tokens [B, N, C], each with noise of its own; None leaves the noise away."""
        count, parts = tokens.shape[1], []
        for level in range(self.levels + 1):
            position = torch.arange(level * count, (level + 1) * count, device=tokens.device)
            error = 0 if noise is None else noise.normal(position, tokens.shape[2], stream) * temperature
            parts.append(level / self.levels * tokens + (1 - level / self.levels) * error)
        return torch.cat(parts, dim=1)

    def arrange(self, tokens: Tensor) -> Canvas:
        return Canvas(self.chain(tokens), self.layout)

    def hold(self, tokens: Tensor, noise: SampleNoise, temperature: float = 1.0) -> Canvas:
        """Level 0 is the noise from which the draw starts."""
        return Canvas(self.chain(tokens, noise, 0, temperature), self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        return canvas.tokens[:, -self.spec.layout.length :]

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
        if k:
            return super().draw(canvas, cond, k, cache=cache, noise=noise, guide=guide, rule=rule)
        if cache is not None:  # what the step reads, the class, is seen by later ones
            self(canvas.repeat(guide.streams), cond, 0, 1, cache)
            cache.commit(canvas.layout.reads[0] + cond.ahead(0))
        position = torch.arange(canvas.layout.sizes[0], device=canvas.tokens.device)
        return noise.normal(position, self.head.channels) * rule.temperature

    def moments(self, tokens: Tensor) -> Moments:
        return Moments.of(tokens)

    def given(self, batch: Mapping[str, Any], progress: float) -> tuple[Tensor, Tensor]:
        """Clean tokens [B, N, C], the targets, and those whose noised levels are read: the context, if any."""
        data = self.restore(self.arrange_batch(batch["tokens"], batch, progress))
        if "context" not in batch:
            return data, data
        return data, self.restore(self.arrange_batch(batch["context"], batch, progress))


class DTM(Transition):
    """Difference transitions. Levels are Markov, so that nothing is kept: there is no cache, a step is one full pass.

    spec: continuous tokens on one grid. levels: T. head_depth, head_width: of the MLP. solver, solver_steps: FlowDraw.
    """

    caches = False

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        levels: int,
        depth: int,
        width: int,
        heads: int,
        head_depth: int = 4,
        head_width: int = 1024,
        solver_steps: int = 4,
        solver: str = "euler",
        repeats: int = 4,
        dropout: float = 0.0,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        spec = checked(spec, "DTM", levels)
        self.spec, self.num_classes, self.label_drop, self.levels = spec, num_classes, label_drop, levels
        self.layout = level_layout(spec, (spec.layout.length,) * (levels + 1))
        channels = spec.parts[0].channels
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width, vector=True)
        self.time, self.project = TimeEmbedding(dim=width), nn.Linear(channels, width)
        self.position = nn.Embedding(spec.layout.length, width)  # rope alone cannot tell where a noisy token stands
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=int(width * 8 / 3),
            eps=1e-6,
            ffn="geglu",
            bias="qkv",
            modulation="own",
            dropout=dropout,
        )
        self.head = FlowHead(
            dim=width,
            channels=channels,
            width=head_width,
            depth=head_depth,
            solver_steps=solver_steps,
            solver=solver,
            repeats=repeats,
        )
        _, rows, columns = torch.tensor(spec.layout.coords).unbind(1)
        for name, table in zip(("cos", "sin"), rope_2d(rows, columns, width // heads)):
            self.register_buffer(name, table, persistent=False)
        initialise(self)
        for layer in (*(block.modulation for block in self.trunk.blocks), self.trunk.final):
            nn.init.zeros_(layer.weight)
        self.head.mlp.reset()

    def hold(self, tokens: Tensor, noise: SampleNoise, temperature: float = 1.0) -> Canvas:
        """One noise, the start of the draw, runs through all levels."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        start = noise.normal(position, tokens.shape[2]) * temperature
        shares = [level / self.levels for level in range(self.levels + 1)]
        return Canvas(torch.cat([share * tokens + (1 - share) * start for share in shares], dim=1), self.layout)

    def read(self, x: Tensor, time: Tensor, cond: Cond, level: Tensor) -> Inputs:
        """One level a row: values x [R, N, C] at flow times [R], which predict those of int64 `level` [R]."""
        inputs = Inputs(
            x=self.project(x) + self.position.weight,
            rank=torch.zeros(x.shape[1], dtype=torch.int64, device=x.device),
            pattern="full",
            position=(self.cos, self.sin, None),
            vector=cond.vector + self.time(time)[:, None],
        )
        count = x.shape[1]
        place = level[:, None] * count + torch.arange(count, device=x.device)
        return conditioned(inputs, cond, place=place)

    def forward(
        self, canvas: Canvas, cond: Cond, start: int = 0, stop: int | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """As in Generator, each level being a row of the trunk; the states of level 0, which is noise, are zeros."""
        stop, first, rows = canvas.layout.steps if stop is None else stop, max(start, 1), len(canvas.tokens)
        count = self.spec.layout.length
        parts = [canvas.tokens.new_zeros(rows, count, self.trunk.dim)] if start == 0 else []
        if stop > first:
            before = canvas.tokens[:, (first - 1) * count : (stop - 1) * count].unflatten(1, (-1, count)).flatten(0, 1)
            level = torch.arange(first, stop, device=before.device)
            time = 1 - (level - 1) / self.levels
            each = {name: getattr(cond, name) for name in ("prefix", "vector")}
            each = {name: None if v is None else v.repeat_interleave(len(time), 0) for name, v in each.items()}
            repeated = Cond(cond.start, **each, at=cond.at)
            h = self.run(self.read(before, time.repeat(rows), repeated, level.repeat(rows)))
            parts.append(h.unflatten(0, (rows, -1)).flatten(1, 2))
        return torch.cat(parts, dim=1)

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
        drawn = super().draw(canvas, cond, k, cache=None, noise=noise, guide=guide, rule=rule)
        if k == 0:
            return drawn
        a, b = canvas.layout.written(k - 1, k)
        return canvas.tokens[:, a:b] + drawn / self.levels

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Error of the head's velocity at one level a sample; "nats" [B, N] is that of every token (no likelihood)."""
        (data, context), noise = self.given(batch, progress), SampleNoise(batch["key"])
        start, time = self.level_of(data, noise)
        cond = self.conditioner(batch["label"], self.dropped(batch))
        level = ((1 - time) * self.levels).round().long() + 1
        h = self.run(self.read(interpolate(context, start, time), time, cond, level))
        error = self.head.loss(h, data - start, (data.shape[1],), noise=noise)
        return {"loss": error.mean(), "nats": error.detach()}

    @property
    def operations_formula(self) -> str:
        return f"{super().operations_formula}, of one level, + {self.head.operations_formula}"

    def operations(self, key: Tensor | None = None) -> float:
        """One level a sample."""
        count = self.spec.layout.length
        entered = 6.0 * (self.project.weight.numel() * count + linear_parameters(self.time))
        return entered + trunk_operations(self.trunk, count, count * count, 1) + self.head.operations(count)

    def level_of(self, data: Tensor, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        """Noise X_0 like the data and the flow time [B] of the level that training looks at."""
        position = torch.arange(data.shape[1], device=data.device)
        level = (noise.uniform(position[:1], LEVEL_STREAM)[:, 0] * self.levels).long().clamp(max=self.levels - 1)
        return noise.normal(position, data.shape[2], NOISE_STREAM), 1 - level / self.levels

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        """Given X_t at the same place, X_T is Gaussian, and with it X_T - X_0 = (X_T - X_t) T / (T - t)."""
        data, noise = batch["tokens"], SampleNoise(batch["key"])
        start, time = self.level_of(data, noise)
        x, t = interpolate(data, start, time), spread(time, data)
        mean, variance = posterior(moments.mean, moments.variance, x, 1 - t)
        h, network = torch.cat([(mean - x) / t, variance / t**2], dim=-1), self.head.gaussian()
        error = self.head.loss(h, data - start, (data.shape[1],), noise=noise, network=network)
        return {"loss": error.mean(), "nats": error}
