"""Autoregressive Transition Matching (Shaul et al., arXiv 2506.23589): ARTM and FHTM. See transition.py for the frame.

Every level X_t = (1 - t/T) X_0 + (t/T) X_T has noise X_0 of its own, and the flow head draws the tokens of X_t+1 one
after another. In ARTM they see all of X_t and those before them; in FHTM everything is causal over X_0 .. X_t+1.

Status: unofficial, as DTM. Chosen by us: LlamaGen's blocks; the class as the first position; tables of levels and of
positions, rope by the cell that is read; the last position read predicts; MAR's MLP as the head; T and all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.gaussian import Moments, posterior
from vgen.generator import Canvas
from vgen.heads_token_flow import FlowHead
from vgen.models.transition import Transition, checked, level_layout
from vgen.two_stacks import initialise
from vtok.acceleration import pairs, trunk_operations
from vtok.layers.rope import rope_2d
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import visible
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec


class CausalTransition(Transition):
    """What ARTM and FHTM share; arguments as DTM's."""

    markov: bool

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
        solver_steps: int = 10,
        solver: str = "euler",
        repeats: int = 4,
        dropout: float = 0.0,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        spec = checked(spec, type(self).__name__, levels)
        count, channels = spec.layout.length, spec.parts[0].channels
        self.spec, self.num_classes, self.label_drop, self.levels = spec, num_classes, label_drop, levels
        later = levels - 1
        if self.markov:  # every level reads the one before whole, in both directions, and then its own tokens
            feeds, causal = (1, *(count, *(1,) * (count - 1)) * levels), ()
            source = [i for t in range(levels) for i in range(t * count, (t + 2) * count - 1)]
            group = [t + 1 for t in range(levels) for _ in range(2 * count - 1)]
        else:
            feeds, causal = (1, count, *(1,) * (levels * count - 1)), (False, True, *(False,) * (levels * count - 1))
            source, group = list(range((later + 2) * count - 1)), [0] * ((later + 2) * count - 1)
        self.layout = level_layout(spec, (count, *(1,) * (levels * count)), feeds=feeds, causal=causal)
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.project, self.level_embedding = nn.Linear(channels, width), nn.Embedding(levels + 1, width)
        self.position = nn.Embedding(count, width)
        self.trunk = Trunk(dim=width, depth=depth, heads=heads, hidden=int(width * 8 / 3), dropout=dropout)
        self.head = FlowHead(
            dim=width,
            channels=channels,
            width=head_width,
            depth=head_depth,
            solver_steps=solver_steps,
            solver=solver,
            repeats=repeats,
        )
        level, rows, columns = torch.tensor([(0, 0, 0), *(self.layout.coords[i] for i in source)]).unbind(1)
        last = [self.layout.read(k, k + 1)[1] - 1 for k, size in enumerate(self.layout.sizes) for _ in range(size)]
        tables = {"source": torch.tensor([0, *source]), "level": level, "group": torch.tensor([0, *group])}
        tables |= {"last": torch.tensor(last)} | dict(zip(("cos", "sin"), rope_2d(rows, columns, width // heads)))
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        initialise(self)
        self.head.mlp.reset()

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        layout, (a, b) = canvas.layout, canvas.layout.read(start, stop)
        first = 1 if start == 0 else 0
        inside = slice(a + first, b)
        x = self.project(canvas.tokens[:, self.source[inside]]) + self.level_embedding(self.level[inside])
        x = x + self.position(self.source[inside] % self.spec.layout.length)
        if start == 0:
            x = torch.cat([cond.start, x], dim=1)
        rank, mask = layout.ranks(0, stop, device=x.device), None
        if self.markov:  # of the levels before, only the one that it starts from; the class is group 0
            group = self.group[:b]
            mask = visible(rank[a:], rank) & ((group[a:, None] == group) | (group == 0))
            if start and cond.prefix is not None:  # all of it stands in the cache, before the class
                mask = torch.cat([mask.new_ones(len(mask), cond.prefix.shape[1]), mask], dim=1)
        w, v = layout.written(start, stop)
        return Inputs(
            x=x,
            rank=rank[a:],
            pattern=layout.pattern(start, stop),
            position=(self.cos[a:b], self.sin[a:b], None),
            read=self.last[w:v] - a,
            mask=mask,
        )

    @property
    def operations_formula(self) -> str:
        return f"{super().operations_formula} + {self.head.operations_formula}"

    def operations(self, key: Tensor | None = None) -> float:
        """Of the levels before, a position of ARTM sees only the one that its own level starts from."""
        count, reads = self.spec.layout.length, sum(self.layout.reads)
        if self.markov:  # in each level those of the one before see each other, and a token sees them and those so far
            inside = count * count + sum(count + token for token in range(1, count))
            seen = reads + self.levels * inside  # and all see the class
        else:
            seen = pairs(self.layout)
        entered = 6.0 * self.project.weight.numel() * (reads - 1)
        return entered + trunk_operations(self.trunk, reads, seen) + self.head.operations(self.levels * count)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Error of the head's velocity over all levels but the noise; "nats" [B, T N] is that of every token."""
        (data, context), noise = self.given(batch, progress), SampleNoise(batch["key"])
        levels, count = self.chain(data, noise), data.shape[1]
        read = levels if context is data else self.chain(context, noise)
        h = self(Canvas(read, self.layout), self.conditioner(batch["label"], self.dropped(batch)))
        error = self.head.loss(h[:, count:], levels[:, count:], self.layout.sizes[1:], noise=noise)
        return {"loss": error.mean(), "nats": error.detach()}

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        """Given the earlier levels at the same place, X_T is Gaussian, and so is X_t+1."""
        data, noise = batch["tokens"], SampleNoise(batch["key"])
        levels, count, parts = self.chain(data, noise), data.shape[1], []
        mean, variance = moments.mean, moments.variance
        for level in range(self.levels):
            seen, share = levels[:, level * count : (level + 1) * count], (level + 1) / self.levels
            prior = (moments.mean, moments.variance) if self.markov else (mean, variance)
            mean, variance = posterior(*prior, seen, level / self.levels)
            parts.append(torch.cat([share * mean, share**2 * variance + (1 - share) ** 2], dim=-1))
        h, network = torch.cat(parts, dim=1), self.head.gaussian()
        error = self.head.loss(h, levels[:, count:], self.layout.sizes[1:], noise=noise, network=network)
        return {"loss": error.mean(), "nats": error}


class ARTM(CausalTransition):
    """A level given the one before it: all of that, and the tokens of its own so far."""

    markov = True


class FHTM(CausalTransition):
    """A level given all before it, causal throughout: one long sequence, as a language model's."""

    markov = False
