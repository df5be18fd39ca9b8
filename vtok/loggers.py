"""metrics.csv of a run, continued after a resume, and W&B that never stops a training.

Lightning's CSV logger deletes the file of an earlier start; here the rows up to the resumed step stay. Its W&B logger
raises where the service does not answer; here the run goes on offline, and `wandb sync` sends it later.
"""

from __future__ import annotations

import csv
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from vtok.checkpoint import write_atomic
from vtok.sharing import without_places


class MetricsFile(CSVLogger):
    """Writes <run_dir>/metrics.csv, one row per call, with the optimizer step in column `step`."""

    def __init__(self, *, run_dir: str, flush_every: int = 100) -> None:
        super().__init__(save_dir=run_dir, name="", version="", flush_logs_every_n_steps=flush_every)

    @property
    @rank_zero_experiment
    def experiment(self):
        if self._experiment is None:
            kept = read_rows(Path(self.save_dir) / "metrics.csv")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
                writer = super().experiment
            writer.metrics = kept
            writer.save()
        return self._experiment

    def log_hyperparams(self, params: object) -> None:
        """config.yaml holds them already."""


# what W&B would send of the machine and its user besides what the run logs (the console names its folders)
PRIVATE = {
    "save_code": False,
    "disable_code": True,
    "x_disable_machine_info": True,
    "host": "",
    "username": "",
    "console": "off",
}


class SafeWandbLogger(WandbLogger):
    """W&B without code, host and user name. A service that does not answer makes the run an offline one, said once."""

    def __init__(
        self,
        *,
        project: str,
        name: str,
        save_dir: str,
        id: str | None = None,
        resume: str = "allow",
        offline: bool = False,
        timeout: float = 60,
        finish_timeout: float = 300,
    ) -> None:
        settings = {**PRIVATE, "init_timeout": timeout}
        super().__init__(
            project=project, name=name, save_dir=save_dir, id=id, resume=resume, offline=offline, settings=settings
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's null, of which W&B warns
        self._given_up, self._timeout = False, timeout
        # in an outage W&B's own telemetry would delay the exit, and the end of a run would wait for ever
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(finish_timeout))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            # W&B's service of a parent process may still hold this run's id from an earlier start: have one's own
            os.environ.pop("WANDB_SERVICE", None)
        if self._experiment is None and not self._offline and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb

            try:
                return super().experiment
            except Exception as error:  # of W&B's many kinds none may stop a training
                reason = (str(error) or type(error).__name__).splitlines()[0]
                print(
                    f"note: W&B does not answer ({reason:.100}); the run goes on offline, `wandb sync {self.save_dir}"
                    "/wandb/offline-run-*` sends it later",
                    flush=True,
                )
                # its service still holds the id of the run that could not start, and may wait for the network to end
                end = threading.Thread(target=wandb.teardown, daemon=True)
                end.start()
                end.join(max(self._timeout, 10.0))
                if end.is_alive():
                    raise RuntimeError("its service does not end") from error
                self._offline = True
                self._wandb_init["mode"] = "offline"
        return super().experiment

    def _try(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if self._given_up:
            return
        try:
            call(*arguments, **named)
        except Exception as error:  # of W&B's many kinds none may stop a training
            self._given_up = True
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"note: W&B takes no more records ({reason:.100}); metrics.csv goes on", flush=True)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, without_places(params))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **named: Any) -> None:
        self._try(super().log_image, key, images, step, **named)

    def finalize(self, status: str) -> None:
        """A training that came to its end closes its run: the next one of a sweep in this process has its own."""
        self._try(super().finalize, status)
        if status == "success" and self._experiment is not None:
            self._try(self._experiment.finish)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file without their empty cells; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]


def trim_rows(path: Path, step: int) -> None:
    """Drop rows later than `step`: a resumed run writes them again. A last line that a kill cut short goes too."""
    rows = [row for row in read_rows(path) if row.get("step", "").isdigit() and int(row["step"]) <= step]
    if not path.is_file():
        return
    names = sorted({name for row in rows for name in row})
    lines = [",".join(names)] + [",".join(row.get(name, "") for name in names) for row in rows]
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
