"""metrics.csv of a run: Lightning's CSV logger, kept in the run directory itself and continued after a resume.

Lightning's own deletes the file of an earlier start; here the rows up to the resumed step stay.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from vtok.checkpoint import write_atomic


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
