"""What the walks and tables share: stages run as the commands a user would type, timed training, curves, verdicts."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE_STEPS = 30
CHECKED = 500  # held-out images, of all classes, that training looks at
CHECKING = 0.1  # share of the time that may go into looking at them, but for two checks
FULL_BUDGET = 600  # seconds; below it some figures are measured on fewer images


class Stages:
    """Runs the commands of one walk one after the other, numbered, and keeps their seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def run(self, title: str, *command: str) -> float:
        """Run `python <command>` in the clone, its output passed through; SystemExit with its code if it fails."""
        self.done += 1
        spent = time.perf_counter() - self.began
        print(f"\n[{self.done}/{self.total}] {title}   ({spent:.0f} s so far)", flush=True)
        print(f"$ python {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            print(f"error: stage {title!r} failed with exit code {code}", file=sys.stderr)
            raise SystemExit(code)
        self.seconds[title] = time.perf_counter() - start
        return self.seconds[title]

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began


def train_for(stages: Stages, run: Path, options: Sequence[str], budget: float, *, checked: int = CHECKED) -> int:
    """Train for about `budget` seconds, checks and pictures included; returns the steps.

    run: the run directory; options: of train.py. A short run of the same command is timed first, and the number of
    steps, to which the learning-rate schedule is tied, follows from its speed. checked: held-out images looked at.
    """
    probe = run.with_name(f"{run.name}_probe")
    command = ["train.py", *options, "overwrite=true"]
    # Everything but optimizer steps is switched off, so what is left of the time is the cost of starting.
    quiet = ["picture_every=null", "save=false", "val_every=1000000", "log_every=10", f"stop_after={PROBE_STEPS}"]
    spent = stages.run(f"{run.name}: time {PROBE_STEPS} steps", *command, f"run_dir={probe}", *quiet)
    _, speeds = column(probe / "metrics.csv", "speed/images_per_second")
    batch = batch_size(probe)
    later = speeds[1:] or speeds  # the first ten steps warm up
    step = batch * len(later) / sum(later)
    start = max(0.0, spent - PROBE_STEPS * step)
    # two forward passes an image, of raw and averaged weights
    validation = 2 / 3 * larger_held_out(probe) * checked / batch * step
    checks = max(2, min(4 if budget < FULL_BUDGET else 10, int(CHECKING * budget / validation)))
    # A tenth is left for pictures, checkpoints and other processes; the probe is part of the budget.
    steps = max(PROBE_STEPS, int((0.9 * budget - spent - start - checks * validation) / step))
    print(f"{step * 1000:.0f} ms a step, {start:.0f} s to start: {steps} steps in {budget:g} s", flush=True)
    stages.run(
        f"{run.name}: train", *command, f"run_dir={run}", f"steps={steps}", f"val_every={max(1, steps // checks)}",
        "val_batches=null", f"data.limit_val={checked}", f"picture_every={max(1, steps // 2)}",
        f"save_every={max(1, steps // 2)}", f"log_every={max(10, steps // 60)}",
    )  # fmt: skip
    return steps


def batch_size(run: Path) -> int:
    """The global batch size that a run used."""
    from omegaconf import OmegaConf

    return int(OmegaConf.load(run / "config.yaml").batch_size)


def larger_held_out(run: Path) -> float:
    """Pixels of a held-out image over those of a training one: above 1 where a run trains on windows."""
    from omegaconf import OmegaConf

    data = OmegaConf.load(run / "config.yaml").data
    return (data.image_size / data.window) ** 2 if data.get("window") else 1.0


def overrides(section: Mapping[str, object]) -> list[str]:
    """Hydra overrides `key=value` of a flat section; None is null."""
    return [f"{key}={'null' if value is None else value}" for key, value in section.items()]


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a metrics.csv; empty where the run did not log it."""
    with open(path, newline="") as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [step for step, _ in rows], [value for _, value in rows]


def curves(path: Path, panels: Sequence[tuple[str, Path, Sequence[str]]]) -> None:
    """A PNG with one panel per (title, metrics.csv, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (title, source, names) in zip(axes[0], panels):
        for name in names:
            steps, values = column(source, name)
            axis.plot(steps, values, label=name, marker="" if len(steps) > 30 else ".")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def verdicts(figures: Mapping[str, float], wanted: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    """Print every wanted figure beside its range (low, high; None = open); return the names that miss it."""
    missed = []
    width = max(len(name) for name in wanted)
    for name, (low, high) in wanted.items():
        value = figures[name]
        fine = (low is None or value >= low) and (high is None or value <= high)
        span = f">= {low:g}" if high is None else f"<= {high:g}" if low is None else f"{low:g} .. {high:g}"
        print(f"  {name:{width}}  {value:10.4f}   wanted {span:14}  {'ok' if fine else 'MISSED'}")
        if not fine:
            missed.append(name)
    return missed
