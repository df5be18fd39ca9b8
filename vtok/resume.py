"""When checkpoints are made, and training that goes on from one bit for bit.

What an exact resume needs: data that are a function of the step (vtok/data/module.py), a checkpoint made between two
optimizer steps, and the random number generators put back when the first batch starts, not earlier, since loops and
loaders built in between may draw. The files are those of vtok/ckpt_files.py.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import distributed as dist

from vtok import rng
from vtok.ckpt_files import generations, link, remove
from vtok.noise import key

EXIT_PREEMPTED = 85


class Preempted(SystemExit):
    """The process was asked to stop (SIGTERM, SIGUSR1) and has saved: exit code 85 means `start me again`."""


class ResumeState(L.Callback):
    """Random number generators of every process: seeded per rank at a fresh start, put back after a resume."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self._saved: list[dict[str, Any]] | None = None
        self._pending = False

    def state_dict(self) -> dict[str, Any]:
        own = rng.get_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"rng": [own]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
        return {"rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["rng"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pending = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._pending:
            return
        self._pending = False
        rank, saved = trainer.global_rank, self._saved
        if saved is not None and rank < len(saved):
            rng.set_state(saved[rank])
        else:
            rng.seed_all(key(self.seed, rank, trainer.global_step))
        self._saved = None


class Checkpoints(L.Callback):
    """Saves step_N.ckpt every so many steps or minutes, before a requested stop, and at the end.

    last.ckpt is the newest of them, best.ckpt the one with the best `monitor` (hard links, so they cost nothing); two
    generations are kept. Everything happens when a batch starts that opens an optimizer step: validation of the step
    before is over then, and the loops' counters are consistent.

    SIGTERM, SIGUSR1 and, in a job of submitit, SIGUSR2 only set a flag; at the next such moment all ranks agree, save
    once and exit with code 85.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 1000,
        minutes: float | None = 15,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        keep: int = 2,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"monitor_mode={mode!r}: choose min or max")
        self.folder, self.every, self.minutes = Path(folder), every, minutes
        self.monitor, self.mode, self.keep = monitor, mode, keep
        self.best: float | None = None
        self._best_waits = False
        self._saved = 0
        self._clock = time.monotonic()
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # the best value of another metric says nothing; checkpoints of before have no name of theirs
        same = (state_dict.get("monitor", self.monitor), state_dict.get("mode", self.mode)) == (self.monitor, self.mode)
        self.best = state_dict["best"] if same else None

    # --- signals

    def _note(self, number: int, frame: Any) -> None:
        self._signal = number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved, self._clock = trainer.global_step, time.monotonic()
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():
            # after Lightning's own handlers, which would stop without an exact checkpoint
            submitit = (signal.SIGUSR2,) if callable(signal.getsignal(signal.SIGUSR2)) else ()
            numbers = (signal.SIGTERM, signal.SIGUSR1, *submitit)
            self._handlers = {s: signal.signal(s, self._note) for s in numbers}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # --- when

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"monitor={self.monitor} is not among the validation metrics: {known}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and value == value:
            self.best, self._best_waits = value, True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.between_steps:
            return
        step = trainer.global_step
        late = self.minutes is not None and time.monotonic() - self._clock > 60 * self.minutes
        wanted = late or self._signal is not None
        if trainer.world_size > 1:  # the clock and the signal of one rank count for all
            wanted = trainer.strategy.reduce_boolean_decision(wanted, all=False)
        if self._best_waits or (step > self._saved and (wanted or step % self.every == 0)):
            self.save(trainer, pl_module)
        if wanted and trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            if trainer.is_global_zero:
                print(f"stopped on request after step {step}; go on with resume=auto", flush=True)
            if self._signal == signal.SIGUSR2:  # submitit's own handler queues the job again, and leaves
                self._handlers[signal.SIGUSR2](signal.SIGUSR2, None)
            # Lightning's launcher kills rank 0 when a child of its own fails, so there only rank 0 says 85
            own_child = type(trainer.strategy.launcher).__name__ == "_SubprocessScriptLauncher" and trainer.global_rank
            raise Preempted(0 if own_child else EXIT_PREEMPTED)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved or self._best_waits:
            self.save(trainer, pl_module)

    # --- what

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the state of now, move last.ckpt (and best.ckpt where it is due), and drop old generations."""
        step = trainer.global_step
        pl_module.check_finite()
        path = self.folder / f"step_{step}.ckpt"
        for logger in trainer.loggers:
            logger.save()
        best, self._best_waits = self._best_waits, False
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            link(path, self.folder / "last.ckpt")
            if best:
                link(path, self.folder / "best.ckpt")
            for old in generations(self.folder)[self.keep :]:
                remove(old)
        self._saved, self._clock = step, time.monotonic()
