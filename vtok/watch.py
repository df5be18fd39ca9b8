"""Bad days of a training: which images were in a batch, data that do not come, and processes that are gone.

A loader that hangs (a network file system, a dead worker's lock) shows nowhere: the job stands still until its time is
over. The alarm below says so after a tenth of `data_timeout`, and stops the run at its end, so that a restart goes on.
A process that ends takes the others with it, and what starts them again must not leave them the ended one's address.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch import distributed as dist

SHOWN = 8


class Stalled(ValueError):
    """No batch came in `data_timeout` seconds."""


class Lost(SystemExit):
    """Another process of the job has ended. The code is 1, so that torchrun or SLURM see a failure and start again."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"error: another process of this job has ended, so this one stops after step {step}; what is above, or the "
            "report of torchrun or SLURM, says which one and why\n  a restart with resume=auto (torchrun: "
            "--max-restarts) goes on from the newest checkpoint"
        )


# what gloo and NCCL say where the other end of a connection that stood is gone
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")
CONNECTING = "connectFullMesh"  # gloo's words where a connection never stood


def process_gone(error: BaseException) -> bool:
    """Whether a collective call failed because another process no longer answers. A failed start is none."""
    text = str(error)
    return isinstance(error, RuntimeError) and CONNECTING not in text and any(gone in text for gone in GONE)


def check_restarts(environment: Mapping[str, str]) -> None:
    """Refuse a restart of torchrun in which processes would look for those of the attempt before, and fail or hang.

    torchrun gives all attempts one store, in which the ended processes' addresses stay (pytorch/pytorch#135712).
    Raises ValueError naming the variable that gives every attempt a store of its own.
    """
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(environment["WORLD_SIZE"]) > 1 and int(environment["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        raise ValueError(
            "torchrun --max-restarts would start the processes again with the addresses of the ended ones, and they "
            "would fail or hang\nstart it as TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts=..., on one "
            "machine with --standalone, on several with --rdzv-backend=c10d"
        )


class PeerWatch(L.Callback):
    """Ends this process with Lost where another one has ended. The last of the callbacks, since it raises.

    It leaves before Lightning's own clearing up, whose signal handler would answer torchrun's SIGTERM with a collective
    call on the broken connection.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and dist.is_initialized() and process_gone(exception):
            for logger in trainer.loggers:
                logger.finalize("failed")
            raise Lost(trainer.global_step) from None


class DataWatch(L.Callback):
    """Reports a loader that gives no batch, and raises Stalled after `timeout` seconds (None: only reports).

    It stands before the callbacks that draw and measure, whose time is no waiting. It needs no thread: an alarm signal
    interrupts the wait itself. Off outside of the main thread and where there are no such signals (Windows).
    """

    def __init__(self, *, timeout: float | None = 1800, every: float | None = None) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"data_timeout={timeout} must be a positive number of seconds, or null")
        self.timeout = timeout
        self.every = every or (60.0 if timeout is None else min(60.0, timeout / 10))
        self._since: float | None = None
        self._step, self._handler = 0, None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGALRM, self._alarm)
            self._wait(trainer)

    def _wait(self, trainer: L.Trainer) -> None:
        if self._handler is not None:
            self._since, self._step = time.monotonic(), trainer.global_step
            signal.setitimer(signal.ITIMER_REAL, self.every)

    def _got(self) -> None:
        if self._handler is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _alarm(self, number: int, frame: Any) -> None:
        waited = time.monotonic() - self._since
        advice = "look at the file system and at data.workers"
        if self.timeout is not None and waited >= self.timeout:
            raise Stalled(f"no batch for {waited:.0f} s after step {self._step}, data_timeout={self.timeout}: {advice}")
        print(f"note: waiting for a batch for {waited:.0f} s after step {self._step}; {advice}", flush=True)
        left = self.every if self.timeout is None else max(0.01, min(self.every, self.timeout - waited))
        signal.setitimer(signal.ITIMER_REAL, left)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._got()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._wait(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wait(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._got()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._wait(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._got()  # what other callbacks measure now takes its time and waits for no loader

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wait(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._got()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._handler is not None:
            self._got()
            signal.signal(signal.SIGALRM, self._handler)
            self._handler = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._got()


def shown_images(data: Any, batches: Iterable[Tensor]) -> str:
    """The images of this process's part of a batch, for a message: their indices, and names where there are any."""
    rows = [int(i) for batch in batches for i in batch.flatten()]
    if not rows:
        return ""
    source = getattr(getattr(getattr(data, "data", data), "sources", None), "train", None)
    names = [f"{i} {source.name(i)}" if source is not None else str(i) for i in rows[:SHOWN]]
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"\nthe images of that batch (index and name): {', '.join(names)}{more}"
