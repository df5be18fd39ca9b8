"""Samples of fixed classes and seeds during training, so that grids of different steps and runs compare."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch

from vgen.pipeline import Pipeline
from vtok.callbacks import Pictures, grid
from vtok.noise import sample_seeds


class Samples(Pictures):
    """One column a class (the first `classes`), `per_class` rows, drawn with the averaged weights where there are some.

    guidance: scale, 1 = off; ignored by unconditional generators. chunk: images computed at once.
    """

    name = "samples"

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int,
        classes: int = 10,
        per_class: int = 4,
        guidance: float = 2.0,
        chunk: int = 40,
    ) -> None:
        super().__init__(folder, every=every)
        self.classes, self.per_class, self.guidance, self.chunk = classes, per_class, guidance, chunk

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> np.ndarray:
        generator = pl_module.variants()[""]
        tokenizer = trainer.datamodule.tokenizer.to(pl_module.device)
        columns = min(self.classes, generator.num_classes) or self.classes
        labels = torch.arange(columns).repeat(self.per_class) if generator.num_classes else torch.zeros(1).long()
        if generator.num_classes == 0:
            labels = torch.zeros(columns * self.per_class, dtype=torch.int64)
        pipeline = Pipeline(generator, tokenizer, chunk=min(self.chunk, len(labels)))
        scale = self.guidance if generator.num_classes else 1.0
        images = pipeline(labels, sample_seeds(0, 0, len(labels)), guidance=scale)
        return grid(images.numpy(), columns)
