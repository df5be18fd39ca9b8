"""Data modules whose batches are a pure function of (seed, step): the exact-resume recipe.

Lightning's own resume replays data. Here the sampler counts steps, not epochs: global batch b holds the items at places
b * batch_size .. (b + 1) * batch_size - 1 of an endless stream of epochs (a batch may span two), each epoch permuted by
its own generator. The a-th accumulation slice and the r-th rank slice are cut out of that batch, so every world size
sees the same global batches. A sample's augmentation is keyed by (seed, epoch, index): no state of a loader or worker
exists that a checkpoint would have to hold. On resume the loader starts at the trainer's step.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vtok.cli import check_whole_number
from vtok.data.sources import Limited, Source, Sources
from vtok.data.transforms import CROPS, Crop, Draws, ImageTransform, to_float
from vtok.noise import key

Position = tuple[int, int]  # (epoch, index in the split)
WINDOW = 4  # blocks whose items are shuffled together, where items can only be read by blocks


class StepBatches(Sampler[list[Position]]):
    """Endless micro batches of (epoch, index); it has no length on purpose.

    size: items in the training set. batch_size: global, per optimizer step. start: first micro batch that `iter` gives.
    blocks: sizes of the blocks in which the items can only be read (parquet's row groups): whole blocks are shuffled,
    and then the items of every few of them.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int,
        start: int = 0,
        blocks: Sequence[int] | None = None,
    ) -> None:
        self.blocks = None if blocks is None else np.asarray(blocks)
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.rank, self.world, self.seed, self.start = rank, world, seed, start
        self.micro = micro_batch_size(batch_size, accumulate, world)
        if size < 1:
            raise ValueError("the training set is empty")
        self._order: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[list[Position]]:
        micro = self.start
        while True:
            yield self.batch(micro)
            micro += 1

    def batch(self, micro: int) -> list[Position]:
        """This rank's part of micro batch `micro`."""
        step, part = divmod(micro, self.accumulate)
        first = step * self.batch_size + (part * self.world + self.rank) * self.micro
        found: list[Position] = []
        while len(found) < self.micro:  # an epoch at a time
            epoch, offset = divmod(first + len(found), self.size)
            indices = self.order(epoch)[offset : offset + self.micro - len(found)].tolist()
            found += [(epoch, index) for index in indices]
        return found

    def order(self, epoch: int) -> torch.Tensor:
        """The items of an epoch as the stream has them, int64 [size]."""
        if epoch not in self._order:
            generator = torch.Generator().manual_seed(key(self.seed, epoch))
            self._order = {e: o for e, o in self._order.items() if abs(e - epoch) < 2}  # a batch may span two epochs
            self._order[epoch] = (
                torch.randperm(self.size, generator=generator)
                if self.blocks is None
                else block_order(self.blocks, generator)
            )
        return self._order[epoch]


def block_order(blocks: np.ndarray, generator: torch.Generator, window: int = WINDOW) -> torch.Tensor:
    """A permutation that stays within `window` shuffled blocks at a time: [sum(blocks)]."""
    starts = np.cumsum([0, *blocks])
    chosen = torch.randperm(len(blocks), generator=generator).tolist()
    parts = []
    for at in range(0, len(chosen), window):
        items = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in chosen[at : at + window]])
        parts.append(items[torch.randperm(len(items), generator=generator)])
    return torch.cat(parts)


class EvaluationBatches(Sampler[list[Position]]):
    """Every item once over all ranks, in order: rank r takes r, r + world, ...; nothing is padded or repeated.

    All ranks have as many batches, since sharded weights are gathered by all of them together: a rank with fewer items
    takes smaller batches; where a batch is one item, one of a rank with more may hold two.
    """

    def __init__(self, *, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if size < world:
            raise ValueError(
                f"{size} held-out images are fewer than the {world} processes: raise data.limit_val, give more images, "
                "or use fewer processes"
            )
        self.indices = range(rank, size, world)
        most = -(-size // world)
        count = min(-(-most // batch_size), size // world)
        self.bounds = [*range(0, len(self.indices), batch_size), len(self.indices)]
        if len(self.bounds) - 1 != count:
            self.bounds = [len(self.indices) * k // count for k in range(count + 1)]

    def __iter__(self) -> Iterator[list[Position]]:
        for start, stop in itertools.pairwise(self.bounds):
            yield [(0, i) for i in self.indices[start:stop]]

    def __len__(self) -> int:
        return len(self.bounds) - 1


def micro_batch_size(batch_size: int, accumulate: int, world: int) -> int:
    """batch_size / (accumulate * world), or ValueError where that is no whole number."""
    if batch_size < 1 or accumulate < 1:
        raise ValueError(f"batch_size={batch_size} and accumulate={accumulate} must be at least 1")
    micro, rest = divmod(batch_size, accumulate * world)
    if rest or not micro:
        raise ValueError(
            f"batch_size={batch_size} (global) must be a multiple of devices ({world}) x accumulate ({accumulate}): "
            "change one of them"
        )
    return micro


def check_limits(limit_train: int | None, limit_val: int | None) -> None:
    """Raise ValueError unless both are None or at least 1."""
    for name, limit in (("limit_train", limit_train), ("limit_val", limit_val)):
        if limit is not None:
            check_whole_number(f"data.{name}", limit)
            if limit < 1:
                raise ValueError(f"data.{name}={limit} must be at least 1, or null for all images")


REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # to stop: SLURM's, torchrun's, submitit's


def outlive(worker: int) -> None:
    """Let a loader's worker live through the first request to stop, which SLURM sends to every process of a job: the
    training process finishes its step and saves first. A second SIGTERM ends the worker, as its parent's end does."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


class Loader(DataLoader):
    """A loader whose workers also live through a request that comes while they start: they inherit it blocked, until
    `outlive` has said what to do with it."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def float_images(batch: Any) -> Any:
    """The batch with "image", if it is uint8 [B, H, W, 3], as `to_float` makes it; any other batch as it is.

    Raises ValueError for uint8 images of another shape.
    """
    images = batch.get("image") if isinstance(batch, Mapping) else None
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        return batch
    if images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"a batch's images are uint8 {list(images.shape)}, expected [B, H, W, 3], or float [B, 3, H, W] in [-1, 1]"
        )
    return {**batch, "image": to_float(images)}


def keep_keys(batch: Any) -> Any:
    """The batch with "host_key" beside "key": the same int64 [B] as an array, which stays on the host, so that what is
    drawn from it there does not wait for the device."""
    if not isinstance(batch, Mapping) or "key" not in batch or "host_key" in batch:
        return batch
    return {**batch, "host_key": batch["key"].numpy()}


class StepData(LightningDataModule):
    """Loaders over a training and a held-out dataset that are indexed by (epoch, index) and give dicts.

    Images travel from the loader's workers to the device as uint8 [B, H, W, 3], and become float there, so a step gets
    float [B, 3, H, W] in [-1, 1]. A dataset may also give them so. The samples' keys are there twice, see `keep_keys`.
    """

    def __init__(self, *, batch_size: int, accumulate: int = 1, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate), ("workers", workers)):
            check_whole_number(f"data.{name}", value)
        micro_batch_size(batch_size, accumulate, 1)
        if workers < 0:
            raise ValueError(f"data.workers={workers} must be 0 or more")
        self.batch_size, self.accumulate, self.workers, self.seed = batch_size, accumulate, workers, seed

    def train_dataset(self) -> Dataset:
        raise NotImplementedError

    def val_dataset(self) -> Dataset:
        raise NotImplementedError

    @property
    def train_size(self) -> int:
        return len(self.train_dataset())

    @property
    def val_size(self) -> int:
        return len(self.val_dataset())

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world size) of the attached trainer, (0, 1) without one."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def start_step(self) -> int:
        """Optimizer steps already done, 0 without a trainer. Lightning adds up the steps of all optimizers that it
        wraps, so a module must wrap one only (vtok.lit does)."""
        return 0 if self.trainer is None else int(self.trainer.global_step)

    def train_dataloader(self, start: int | None = None) -> DataLoader:
        """Endless loader. start: first optimizer step; by default where the trainer stands."""
        self._check_trainer()
        dataset, (rank, world) = self.train_dataset(), self.place
        step = self.start_step() if start is None else start
        batches = StepBatches(
            size=len(dataset),
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=rank,
            world=world,
            seed=self.seed,
            start=step * self.accumulate,
            blocks=getattr(dataset, "blocks", None),
        )
        return self._loader(dataset, batches)

    def val_dataloader(self) -> DataLoader:
        """The held-out set, unaugmented, every item exactly once over all ranks."""
        self._check_trainer()
        dataset, (rank, world) = self.val_dataset(), self.place
        micro = max(1, self.batch_size // (self.accumulate * world))
        return self._loader(dataset, EvaluationBatches(size=len(dataset), batch_size=micro, rank=rank, world=world))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = float_images(super().transfer_batch_to_device(keep_keys(batch), device, dataloader_idx))
        # to float64 under precision=64-true, which came before, when the images were no floats
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def _loader(self, dataset: Dataset, batches: Sampler) -> DataLoader:
        # Creating an iterator draws from the loader's generator; the global one would then differ after a resume.
        return Loader(
            dataset,
            batch_sampler=batches,
            collate_fn=getattr(dataset, "collate", None),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(key(self.seed)),
            worker_init_fn=outlive,
        )

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("batches are already split over the devices: set trainer.use_distributed_sampler=false")
        module = trainer.lightning_module
        automatic = module is not None and module.automatic_optimization
        if automatic and trainer.accumulate_grad_batches != self.accumulate:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but "
                f"data.accumulate={self.accumulate}; make them equal"
            )


class KeyedImages(Dataset):
    """A source under a transform, indexed by (epoch, index).

    Gives {"image" uint8 [H, W, 3], "label", "key" = noise.key(seed, epoch, index), "index"}.
    """

    def __init__(self, source: Source, transform: ImageTransform, *, seed: int, augment: bool) -> None:
        self.source, self.transform, self.seed, self.augment = source, transform, seed, augment

    def __len__(self) -> int:
        return len(self.source)

    @property
    def blocks(self) -> Sequence[int] | None:
        """Sizes of the blocks in which the source is read, None where any order costs the same."""
        return getattr(self.source, "blocks", None)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        epoch, index = position
        sample_key = key(self.seed, epoch, index)
        image, label = self.source[index]
        array = self.transform(image, Draws(sample_key) if self.augment else None)
        picture = torch.from_numpy(np.array(array, order="C"))  # a copy: a cache's is read-only, a mirrored one strided
        return {"image": picture, "label": label, "key": sample_key, "index": index}


class ImageData(StepData):
    """Base of the image data modules: a subclass implements `prepare`.

    image_size: side in pixels. batch_size: global, per optimizer step. crop, flip, shift, window: see ImageTransform;
    the held-out set is never augmented. limit_train, limit_val: use only so many images, evenly spaced.
    """

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        crop: Crop = "center",
        flip: bool = False,
        shift: int = 0,
        window: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, accumulate=accumulate, workers=workers, seed=seed)
        check_whole_number("data.image_size", image_size)
        check_whole_number("data.shift", shift)
        if window is not None:
            check_whole_number("data.window", window)
        if image_size < 1:
            raise ValueError(f"data.image_size={image_size} must be positive")
        if crop not in CROPS:
            raise ValueError(f"data.crop={crop!r}: choose one of {', '.join(CROPS)}")
        if not 0 <= shift < image_size:
            raise ValueError(f"data.shift={shift} must lie in 0..{image_size - 1}")
        if window is not None and not 0 < window <= image_size:
            raise ValueError(f"data.window={window} must lie in 1..{image_size}, or be null for whole pictures")
        check_limits(limit_train, limit_val)
        self.image_size = image_size
        self.transform = ImageTransform(size=image_size, crop=crop, flip=flip, shift=shift, window=window)
        self.limit_train, self.limit_val = limit_train, limit_val
        self._sources: Sources | None = None

    def prepare(self) -> Sources:
        """Find (or fetch) the images: training source, held-out source, class names. Called once, by `setup`."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """As `setup`, which train.py has called in every process before Lightning comes to this. Downloads and caches
        are made once since the processes of a machine wait for each other at the files (files.one_at_a_time)."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Idempotent; the properties below call it, so no trainer is needed."""
        if self._sources is not None:
            return
        sources = self.prepare()
        for name, source in (("training", sources.train), ("held-out", sources.val)):
            if not len(source):
                raise ValueError(f"{type(self).__name__}: the {name} set is empty; check data.folder")
        train = sources.train if self.limit_train is None else Limited(sources.train, self.limit_train)
        val = sources.val if self.limit_val is None else Limited(sources.val, self.limit_val)
        self._sources = Sources(train, val, sources.class_names)

    @property
    def sources(self) -> Sources:
        """Images before the transform."""
        self.setup()
        return self._sources

    @property
    def class_names(self) -> list[str]:
        return self.sources.class_names

    @property
    def num_classes(self) -> int:
        """0 where there are no classes; labels are 0 then."""
        return len(self.class_names)

    def train_dataset(self) -> KeyedImages:
        return KeyedImages(self.sources.train, self.transform, seed=self.seed, augment=True)

    def val_dataset(self) -> KeyedImages:
        return KeyedImages(self.sources.val, self.transform, seed=self.seed, augment=False)
