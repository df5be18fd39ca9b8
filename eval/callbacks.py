"""Distances during training, on the averaged weights: FD and IS of a generator's samples, rFD of a tokenizer.

    python train.py experiment=digits_llamagen ... callbacks=fd monitor=val/fd
    python train.py experiment=cifar10_tokenizer ... callbacks=rfd monitor=val/rfd

They are measured in the validation of every so many steps and can choose the best checkpoint. Here and not in vgen and
vtok, because those are installed without eval. Neither touches the random numbers of training. The numbers are for
comparing the steps of one run; for a table, run eval.fid.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import distributed as dist

from eval.features import Extractor, make_extractor
from eval.measure import Measured, empty, measure
from eval.moments import Statistics, frechet_distance
from eval.references import DATA_SPLITS, reference_statistics
from eval.sources import Images, from_data, from_run
from vtok import rng
from vtok.noise import SampleNoise, sample_seeds

BATCH = 64


class Distances(L.Callback):
    """Measures at the first validation and then at validations `every` steps apart; in between the old values stand.

    every: optimizer steps. extractor, weights_path: as in eval.fid. A subclass says what `values` are.
    """

    monitors: tuple[str, ...] = ()
    whole_weights = True  # every process draws by itself, which sharded weights cannot

    def __init__(self, *, every: int, extractor: str = "auto", weights_path: str | None = None) -> None:
        if every < 1:
            raise ValueError(f"callbacks: every={every} must be at least one step")
        self.every, self.name, self.weights_path = every, extractor, weights_path
        self.step: int | None = None
        self.found: dict[str, float] = {}
        self._extractor: Extractor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.found = state_dict["step"], state_dict["found"]

    def values(self, trainer: L.Trainer, pl_module: L.LightningModule, extractor: Extractor) -> dict[str, float]:
        """Metrics by name, the same on every process."""
        raise NotImplementedError

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        if self.step is None or step - self.step >= self.every:
            say = print if trainer.is_global_zero else lambda *_: None
            if self._extractor is None:
                self._extractor = make_extractor(
                    self.name, weights_path=self.weights_path, device=pl_module.device, say=say
                )
            modes = [(m, m.training) for m in pl_module.modules()]
            try:
                with rng.untouched(0), torch.no_grad():
                    self.found = self.values(trainer, pl_module, self._extractor)
            finally:
                for module, mode in modes:
                    module.training = mode
            self.step = step
            pl_module.record(self.found)
        pl_module.log_dict(self.found, logger=False, sync_dist=trainer.world_size > 1)  # for monitors, as in Lit


class SampleDistance(Distances):
    """val/fd and val/is of `images` samples with balanced classes and fixed seeds, shared among the processes.

    reference: val, train (of the run's data), or an npz as in eval.fid. guidance: scale, 1 = off; ignored by
    unconditional generators.
    """

    monitors = ("val/fd", "val/is")

    def __init__(
        self,
        *,
        every: int = 1000,
        images: int = 1000,
        reference: str = "val",
        guidance: float = 1.5,
        chunk: int = 50,
        extractor: str = "auto",
        weights_path: str | None = None,
    ) -> None:
        super().__init__(every=every, extractor=extractor, weights_path=weights_path)
        self.images, self.reference, self.guidance, self.chunk = images, reference, guidance, chunk
        self._statistics: Statistics | None = None

    def values(self, trainer: L.Trainer, pl_module: L.LightningModule, extractor: Extractor) -> dict[str, float]:
        from vgen.pipeline import Pipeline

        if self._statistics is None:
            data = getattr(trainer.datamodule, "data", None)
            if self.reference in DATA_SPLITS and data is None:
                raise ValueError(
                    f"callbacks: reference={self.reference} needs images, data=codes has none: give the npz that "
                    "eval.fid save_reference=<npz> writes"
                )
            self._statistics = reference_statistics(self.reference, data, extractor, batch_size=BATCH)[0]
        tokenizer = trainer.datamodule.tokenizer.to(pl_module.device)
        pipeline = Pipeline(pl_module.variants()[""], tokenizer, chunk=self.chunk)
        guide = self.guidance if pipeline.generator.num_classes else 1.0
        drawn = from_run(
            pipeline, name="samples", count=self.images, plan="balanced", seed=0, guidance=guide, rule=_plain_rule()
        )
        found = share(drawn, extractor, trainer, splits=min(10, self.images))
        distance = frechet_distance(found.moments.statistics(), self._statistics)
        return {"val/fd": distance, "val/is": found.score.result()["mean"]}


class ReconstructionDistance(Distances):
    """val/rfd of `images` held-out images (null: all), evenly spaced, against the same originals."""

    monitors = ("val/rfd",)

    def __init__(
        self,
        *,
        every: int = 1000,
        images: int | None = None,
        extractor: str = "auto",
        weights_path: str | None = None,
    ) -> None:
        super().__init__(every=every, extractor=extractor, weights_path=weights_path)
        self.images = images
        self._originals: Images | None = None
        self._statistics: Statistics | None = None

    def values(self, trainer: L.Trainer, pl_module: L.LightningModule, extractor: Extractor) -> dict[str, float]:
        if self._originals is None:
            self._originals = from_data(trainer.datamodule, "val", self.images)
            self._statistics = share(self._originals, extractor, trainer).moments.statistics()
        copies = reconstructed(self._originals, pl_module.variants()[""].eval(), pl_module.device, trainer)
        found = share(copies, extractor, trainer)
        return {"val/rfd": frechet_distance(found.moments.statistics(), self._statistics)}


def reconstructed(originals: Images, tokenizer: Any, device: torch.device, trainer: L.Trainer) -> Images:
    """`originals` through the tokenizer, with the draws of eval.reconstruction."""
    from vtok.data.transforms import to_float, to_uint8

    def span(size: int, first: int, last: int):
        place = first
        for batch in originals.part(size, first, last):
            x = to_float(batch.to(device), channels_last=True)
            noise = SampleNoise(sample_seeds(0, place, place + len(batch)).to(device))
            with trainer.precision_plugin.forward_context():
                made = tokenizer.decode(tokenizer.encode(x, noise=noise), noise=noise)
            place += len(batch)
            yield to_uint8(made.float()).cpu()

    return Images("reconstructions", originals.count, lambda size: span(size, 0, originals.count), None, "direct", span)


def share(images: Images, extractor: Extractor, trainer: L.Trainer, *, splits: int | None = None) -> Measured:
    """A pass that is shared among the processes by whole chunks, without overlap, and summed at the end."""
    world, rank = trainer.world_size, trainer.global_rank
    units = -(-images.count // images.unit)
    first, last = (min(units * r // world * images.unit, images.count) for r in (rank, rank + 1))
    found = measure(images, extractor, batch_size=BATCH, splits=splits, span=(first, last), advance=lambda count: None)
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, {k: torch.from_numpy(v) for k, v in found.arrays().items()})
        found = empty(images, extractor, splits=splits)
        for part in parts:  # in the order of the ranks, so all get the same bits
            if int(part["moments_count"]):
                found.take({k: v.numpy() for k, v in part.items()})
    return found


def _plain_rule() -> Any:
    from vgen.heads import DrawRule

    return DrawRule()
