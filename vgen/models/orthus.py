"""Orthus: one causal pass over latents, each drawn by a diffusion head (Kou et al., arXiv 2412.00127), for classes.

Position 0 reads the class, position p the latent p - 1; position p predicts latent p, as in LlamaGen. A latent enters
by soft vector quantisation: the mean of `codes` embeddings, weighted by softmax(-|latent - centre|^2 / tau). With
codes=0 it enters by one linear map, which is the causal model that MAR is compared with (Li et al., arXiv 2406.11838).

Status: unofficial. The published model is 7B, for text and images; nothing of it is for ImageNet. Chosen by us: the
class in the place of text; LlamaGen's blocks and rope; MAR's MLP as the head, and its size; all sizes; centres and
embeddings that are learned from the start, where the paper takes Chameleon's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.gaussian import Moments
from vgen.generator import Canvas, Generator
from vgen.heads_diffusion import DiffusionHead
from vgen.latents import require_grid
from vgen.two_stacks import initialise
from vtok.layers.rope import rope_2d
from vtok.layers.trunk import Inputs, Trunk
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import TokenSpec


class SoftCodes(nn.Module):
    """[.., D] of latents [.., C]: embeddings of `codes` centres, averaged by softmax(-|latent - centre|^2 / tau)."""

    def __init__(self, *, codes: int, channels: int, dim: int, tau: float) -> None:
        super().__init__()
        if codes < 2 or tau <= 0:
            raise ValueError(f"codes={codes}, tau={tau}: at least two centres, and a temperature above 0")
        self.centres, self.embeddings, self.tau = nn.Embedding(codes, channels), nn.Embedding(codes, dim), tau

    def forward(self, x: Tensor) -> Tensor:
        centres = self.centres.weight
        near = 2 * x.float() @ centres.float().T - centres.float().square().sum(-1)  # |x|^2 is the same for all
        return (near / self.tau).softmax(-1).to(self.embeddings.weight.dtype) @ self.embeddings.weight


class Orthus(Generator):
    """spec: continuous tokens on one grid. codes, tau: of `SoftCodes`; codes=0: a linear map. head_depth, head_width,
    solver_steps, repeats, clip: of the diffusion head (vgen/heads_diffusion.py)."""

    head: DiffusionHead

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        codes: int = 1024,
        tau: float = 1.0,
        head_depth: int = 6,
        head_width: int = 1024,
        solver_steps: int = 100,
        repeats: int = 4,
        clip: float | None = None,
        dropout: float = 0.0,
        label_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        length, channels = spec.layout.length, spec.parts[0].channels
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.layout = SequenceLayout((1,) * length, spec.layout.coords)
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.embed = (
            SoftCodes(codes=codes, channels=channels, dim=width, tau=tau) if codes else nn.Linear(channels, width)
        )
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=int(width * 8 / 3),
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.head = DiffusionHead(
            dim=width,
            channels=channels,
            width=head_width,
            depth=head_depth,
            solver_steps=solver_steps,
            repeats=repeats,
            clip=clip,
        )
        _, rows, columns = torch.tensor(self.layout.coords[:-1]).unbind(1)
        for name, table in zip(("cos", "sin"), rope_2d(rows, columns, width // heads)):
            own = torch.cat([torch.zeros(1, table.shape[1]), table])  # the class has no cell
            self.register_buffer(name, own, persistent=False)
        initialise(self)
        if codes:
            nn.init.normal_(self.embed.centres.weight)
        self.head.mlp.reset()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_grid(spec, cls.__name__)

    def inputs(self, canvas: Canvas, cond: Cond, start: int, stop: int) -> Inputs:
        layout = canvas.layout
        x = self.embed(canvas.tokens[:, max(start - 1, 0) : stop - 1])
        a, b = layout.read(start, stop)
        return Inputs(
            x=torch.cat([cond.start, x], dim=1) if start == 0 else x,
            rank=layout.ranks(start, stop, device=x.device),
            pattern=layout.pattern(start, stop),
            position=(self.cos[a:b], self.sin[a:b], None),
        )

    @property
    def operations_formula(self) -> str:
        return f"{super().operations_formula} + {self.head.operations_formula}"

    def operations(self, key: Tensor | None = None) -> float:
        entered = sum(p.numel() for p in self.embed.parameters() if p.dim() == 2)
        return super().operations(key) + 6.0 * entered * (self.layout.length - 1)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """The diffusion head's loss of all tokens; "nats" [B, L] is that of each (not nats)."""
        context = self.arrange(batch.get("context", batch["tokens"]))
        h = self(context, self.conditioner(batch["label"], self.dropped(batch)))
        error = self.head.loss(h, batch["tokens"], self.layout.sizes, noise=SampleNoise(batch["key"]))
        return {"loss": error.mean(), "nats": error.detach()}

    def gaussian_loss(self, batch: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
        tokens, noise = batch["tokens"], SampleNoise(batch["key"])
        h, network = moments.hidden(tokens), self.head.gaussian()
        error = self.head.loss(h, tokens, self.layout.sizes, noise=noise, network=network)
        return {"loss": error.mean(), "nats": error}
