"""Training of a generator under Lightning: the loss is the generator's own, in nats a token, measured per step too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.corruption import Corruption
from vtok.lit import Lit
from vtok.optim import Recipe

STEPS_SHOWN = 12  # a next-token order has hundreds of steps; per-step losses are for next-scale and the like


class LitGenerator(Lit):
    """Trains a vgen.generator.Generator on token batches. Labels are dropped inside the generator.

    class_names go into the checkpoint, so that samples can be labelled and classes asked for by name. corruption: of
    the inputs in training; held-out losses are of clean ones. teacher: images [B, 3, H, W] to a frozen vision model's
    (class, patches [B, n, D]); the patches become batch["patches"] (LlamaGen-REPA).
    """

    kind = "generator"

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        *,
        class_names: Sequence[str] = (),
        corruption: Corruption | None = None,
        teacher: Callable[[Tensor], tuple[Tensor | None, Tensor]] | None = None,
    ) -> None:
        super().__init__(module, recipe)
        self.class_names, self.corruption, self.teacher = list(class_names), corruption, teacher

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
        batch = batch if self.corruption is None else self.corruption(batch)
        if self.teacher is not None:
            with torch.no_grad():
                batch = {**batch, "patches": self.teacher(batch["image"])[1]}
        out = self.module.loss(batch, progress=min(1.0, self.global_step / self.recipe.steps))
        return out["loss"], {"loss": out["loss"].detach(), "nats": out["nats"].mean()}, None

    def validate_module(self, module: nn.Module, batch: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
        nats = module.loss(batch, progress=1.0)["nats"].float()
        found = {"loss" + suffix: nats.mean(1).sum()}
        layout = module.layout
        if 1 < layout.steps <= STEPS_SHOWN and nats.shape[1] == layout.length:
            for step in range(layout.steps):
                a, b = layout.written(step, step + 1)
                found[f"nats_step_{step:02d}{suffix}"] = nats[:, a:b].mean(1).sum()
        return found

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["module"]["class_names"] = self.class_names
