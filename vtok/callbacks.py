"""What a person watches during training: the speed and the time left, and pictures of fixed held-out images.

Neither moves the global random number generators: a run with pictures has the same losses as one without.
"""

from __future__ import annotations

import io
import logging
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtok import rng
from vtok.acceleration import peak_rate, utilisation
from vtok.checkpoint import write_atomic
from vtok.data.transforms import to_uint8
from vtok.noise import SampleNoise, keys


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W, 3] side by side on white, row by row: [rows * (H + gap) + gap, ..., 3]."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[gap + y * (height + gap) :, gap + x * (width + gap) :][:height, :width] = image
    return sheet


def save_picture(sheet: np.ndarray, path: Path, *, smallest: int = 256) -> None:
    """PNG of uint8 [H, W, 3], atomically; enlarged by a whole factor where the longer side is below `smallest`."""
    factor = max(1, smallest // max(sheet.shape[:2]))
    buffer = io.BytesIO()
    Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(buffer, format="PNG")
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def show_picture(trainer: L.Trainer, name: str, sheet: np.ndarray) -> None:
    """Hand a picture to the loggers that take pictures (W&B, TensorBoard)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[Image.fromarray(sheet)], step=trainer.global_step)
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(name, sheet, trainer.global_step, dataformats="HWC")


def quiet() -> None:
    """Silence what Lightning says about itself and what is meant as it is."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*in eval mode at the start of training.*",  # the averaged copy
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        "This DataLoader will create",  # more workers than cores: vgen.training.crowded says it once
        ".*`IterableDataset` has `__len__`.*",
        ".*Checkpoint directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)


class Pictures(L.Callback):
    """Draws something every so many steps, at the first one and at the end, without touching the random numbers.

    A subclass implements `draw` and names its files. `folder`: pictures go to <folder>/<name>_<step>.png.
    """

    name: str
    everywhere = False  # whether all ranks must take part in `draw`

    def __init__(self, folder: str | Path, *, every: int) -> None:
        self.folder, self.every = Path(folder), every
        self._done = -1

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> np.ndarray:
        """The sheet, uint8 [H, W, 3]. Runs without gradients and with seeded generators."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._done = trainer.global_step if trainer.global_step > 0 else -1  # a resumed run has this picture

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.between_steps and trainer.global_step % self.every == 0:
            self._picture(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._picture(trainer, pl_module)

    def _picture(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._done or not (trainer.is_global_zero or self.everywhere):
            return
        self._done = step
        modes = [(m, m.training) for m in pl_module.modules()]
        try:
            with rng.untouched(0), torch.no_grad():
                sheet = self.draw(trainer, pl_module)
        finally:
            for module, mode in modes:
                module.training = mode
        if trainer.is_global_zero:
            save_picture(sheet, self.folder / f"{self.name}_{step:07d}.png")
            show_picture(trainer, self.name, sheet)


class Reconstructions(Pictures):
    """Held-out images, spread over the set and always the same, in columns: original above its reconstruction."""

    name = "reconstructions"

    def __init__(self, folder: str | Path, *, every: int, count: int = 16) -> None:
        super().__init__(folder, every=every)
        self.count = count

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> np.ndarray:
        dataset = trainer.datamodule.val_dataset()
        places = np.linspace(0, len(dataset) - 1, min(self.count, len(dataset))).astype(int)
        images = {"image": torch.stack([dataset[(0, int(i))]["image"] for i in places])}
        images = trainer.datamodule.transfer_batch_to_device(images, pl_module.device, 0)["image"]
        module = pl_module.variants()[""].eval()
        noise = SampleNoise(torch.from_numpy(keys(0, places))).to(pl_module.device)  # as eval.reconstruction draws
        with trainer.precision_plugin.forward_context():
            made = module.decode(module.encode(images, noise=noise), noise=noise)
        originals, reconstructions = (to_uint8(part).cpu().numpy() for part in (images, made))
        columns = min(8, len(places))
        rows = []
        for start in range(0, len(places), columns):
            for part in (originals, reconstructions):
                row = part[start : start + columns]
                blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
                rows += [row, blank]
        return grid(np.concatenate(rows), columns)


class Progress(L.Callback):
    """Images a second, time left and the share of time spent waiting for data: a bar on a terminal, else plain lines.

    batch_size: global. every: steps between two lines and two records for the loggers. Validation, pictures and
    saving do not count as training time. operations: an image and step, for the MFU (vtok/acceleration.py), where they
    are drawn as a function of the keys int64 [B] on the host (batch["host_key"]); of this process's own images.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        stop: int,
        every: int = 20,
        bar: bool | None = None,
        operations: float | Callable[[Tensor], float] | None = None,
    ) -> None:
        self.batch_size, self.stop, self.every, self.operations = batch_size, stop, every, operations
        self.wants_bar = bar
        self._bar: Any = None
        self._task: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        quiet()  # here too, for processes that Lightning spawned

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._waited, self._steps, self._pause = time.monotonic(), 0.0, 0, 0.0
        self._ended: float | None = None
        self._peak, self._work = peak_rate(pl_module.device), []
        shows = sys.stderr.isatty() if self.wants_bar is None else self.wants_bar
        if shows and trainer.is_global_zero:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = RichProgress(*columns, transient=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.stop, completed=trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.monotonic()
        self._pause += now - self._validation
        self._ended = now
        shown = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items() if not k.endswith("_raw") and "step_" not in k)
        self._say(trainer, f"step {trainer.global_step}  validation: {text}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # first of the callbacks: from here to the module's `began` come pictures and saving, which do not count
        self._began = time.monotonic()
        if self._ended is not None:
            self._waited += self._began - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = time.monotonic()
        self._pause += pl_module.began - self._began
        if self._peak is not None and self.operations is not None:
            drawn = callable(self.operations)
            self._work.append(self.operations(torch.from_numpy(batch["host_key"])) if drawn else self.operations)
        if not pl_module.between_steps:
            return
        self._steps += 1
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.every and step != self.stop:
            return
        seconds = max(1e-9, self._ended - self._since - self._pause)
        speed = self._steps * self.batch_size / seconds
        waits = self._waited / seconds
        left = (self.stop - step) * self.batch_size / speed
        work = sum(self._work) / len(self._work) if self._work else None
        mfu = utilisation(speed, work, self._peak, trainer.world_size)
        found = {"speed/images_per_second": speed, "speed/data_wait": waits, "speed/memory_gib": _memory()}
        pl_module.record(found if mfu is None else found | {"speed/mfu": mfu})
        loss = pl_module.latest.get("train/loss", float("nan"))
        text = f"loss {loss:.4f}  {speed:.1f} images/s  data wait {waits:.0%}"
        text += "" if mfu is None else f"  MFU {mfu:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._say(trainer, f"step {step}/{self.stop}  {text}  ETA {_clock(left)}")
        if waits > 0.05 and self._steps >= 100 and step == self.stop:
            self._say(trainer, f"note: {waits:.0%} of the time went into waiting for data; raise data.workers")
        self._since, self._waited, self._steps, self._pause, self._work = self._ended, 0.0, 0, 0.0, []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, trainer: L.Trainer, line: str) -> None:
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)


def _memory() -> float:
    """Largest memory of this process so far, GiB: of its GPU where it uses one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
