"""FlowAR: next-scale autoregression over any VAE's latents, each scale made by flow matching (arXiv 2412.15205).

The scales are area averages of one latent map. The input of a scale is the scale before it, enlarged to the full grid
and averaged down again; that of the first is the class. The trunk gives a state a position; the block flow head turns
noise into the tokens of the scale, given these states.

Status: unofficial. The repository holds no code: trunk, scales and loss weights follow a second-hand copy, and the head
is ours (vgen/heads_block_flow.py). No weights were compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.flow_draw import FlowDraw
from vgen.gaussian import Moments
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.heads_block_flow import BlockFlowHead
from vgen.latents import enlarge, gather_index, halved, pyramid, require_square, scale_map, shrink, stretched_rope
from vgen.two_stacks import TwoStacks, initialise, stacked_trunk
from vtok.acceleration import pairs, trunk_operations
from vtok.layers.cache import KVCache
from vtok.layers.trunk import Inputs
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec


class FlowAR(Generator):
    """Sizes as two stacks of blocks, width, heads; head depth x width: S 6 + 6, 768, 12; 2 x 1024. L 8 + 8, 1024, 16;
    12 x 1024, cross. H 15 + 15, 1536, 16; 12 x 1536, cross.

    spec: continuous tokens on one square grid. scales: how many, each half of the next, the last the grid (None = all
    down to an odd side). head_cross: attention of the head to the states. solver, solver_steps: see FlowDraw.
    """

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
        scales: int | None = None,
        solver_steps: int = 25,
        solver: str = "euler",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        label_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        side, channels = require_square(spec, type(self).__name__), spec.parts[0].channels
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = SequenceLayout.scales(halved(side, side, scales))
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width, vector=True)
        self.first = self.layout.sizes[0]
        self.stacks = TwoStacks(channels=channels, length=self.layout.length, dim=width)
        self.trunk = stacked_trunk(
            dim=width,
            depth=depth,
            heads=heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            checkpointing=checkpointing,
        )
        self.state_position = nn.Parameter(torch.empty(1, self.layout.length, width))
        self.head = BlockFlowHead(
            dim=width,
            channels=channels,
            width=head_width,
            depth=head_depth,
            cross=head_cross,
            flow=FlowDraw(solver_steps, solver),
        )
        for name, table in zip(("cos", "sin"), stretched_rope(self.layout, width // heads)):
            self.register_buffer(name, table, persistent=False)
        raster = gather_index(spec.layout, SequenceLayout.raster(side, side))
        self.register_buffer("raster", raster, persistent=False)
        initialise(self)
        nn.init.normal_(self.state_position, std=0.02)
        self.head.close()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_square(spec, cls.__name__)

    def arrange(self, tokens: Tensor) -> Canvas:
        return Canvas(pyramid(tokens[:, self.raster].unflatten(1, self.layout.sides[-1]), self.layout), self.layout)

    def restore(self, canvas: Canvas) -> Tensor:
        return canvas.tokens[:, -len(self.raster) :][:, self.raster.argsort()]

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        layout = canvas.layout
        a, b = layout.written(start, stop)
        parts = [cond.start.expand(-1, self.first, -1)] if start == 0 else []
        for k in range(max(start, 1), stop):
            before = enlarge(scale_map(canvas.tokens, layout, k - 1), layout.sides[-1][0])
            parts.append(self.stacks.project(shrink(before, layout.sides[k][0]).flatten(1, 2)))
        x = self.stacks.enter(torch.cat(parts, dim=1), a, b)
        return Inputs(
            x=x,
            rank=layout.ranks(start, stop, device=x.device),
            pattern=layout.pattern(start, stop),
            position=(self.cos[a:b], self.sin[a:b], None),
            vector=cond.vector,
            at={len(self.trunk.blocks) // 2: self.stacks.edit(a, b)},
        )

    def forward(
        self, canvas: Canvas, cond: Cond, start: int = 0, stop: int | None = None, cache: KVCache | None = None
    ) -> Tensor:
        a, b = canvas.layout.written(start, canvas.layout.steps if stop is None else stop)
        return super().forward(canvas, cond, start, stop, cache) + self.state_position[:, a:b]

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
        """As in Generator; given tokens of the scale bend the flow of the others."""
        layout, rows = canvas.layout, canvas.repeat(guide.streams)
        a, b = layout.written(k, k + 1)
        h = self(rows, cond, 0 if cache is None else k, k + 1, cache)[:, a - b :]
        position = torch.arange(a, b, device=h.device)
        start, span = self.path(canvas, k, noise, position, rule)
        tokens = self.head.draw(
            h,
            layout.sizes[k : k + 1],
            guide=guide,
            noise=noise,
            position=position,
            rule=rule,
            progress=Progress.of(layout, k),
            start=start,
            span=span,
            known=None if canvas.known is None else canvas.known[:, a:b],
            given=canvas.tokens[:, a:b],
        )
        if cache is not None:
            cache.commit(layout.reads[k] + cond.ahead(k))
        return tokens

    def path(
        self, canvas: Canvas, k: int, noise: SampleNoise, position: Tensor, rule: DrawRule
    ) -> tuple[Tensor | None, tuple[float, float]]:
        """(where scale k starts, None for fresh noise; the flow times at which it ends and starts)."""
        return None, (0.0, 1.0)

    @property
    def operations_formula(self) -> str:
        return super().operations_formula + ", of the trunk and of the head, which flows a scale at a time"

    def operations(self, key: Tensor | None = None) -> float:
        layout = self.layout
        trunk = trunk_operations(self.trunk, layout.length, pairs(layout), self.vectors)
        entered = self.stacks.operations(layout.length - self.first, layout.length)
        return trunk + entered + self.head.operations(layout.sizes)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Squared error of the velocity: the mean of each scale, weighted by its tokens over those of the last, summed.
        "nats" [B, L] is the error of every token (no likelihood).
        """
        canvas = self.arrange_batch(batch["tokens"], batch, progress)
        context = self.arrange_batch(batch["context"], batch, progress) if "context" in batch else canvas
        h = self(context, self.conditioner(batch["label"], self.dropped(batch)))
        error = self.head.loss(h, canvas.tokens, self.layout.sizes, noise=SampleNoise(batch["key"]))
        return self.weighted(error)

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        target, noise = self.arrange(batch["tokens"]).tokens, SampleNoise(batch["key"])
        _, x, velocity, time = self.head.noised(target, self.layout.sizes, noise)
        return self.weighted((moments.velocity(x, time) - velocity).square().mean(-1))

    def weighted(self, error: Tensor) -> dict[str, Tensor]:
        return {"loss": error.sum(1).mean() / self.layout.sizes[-1], "nats": error.detach()}
