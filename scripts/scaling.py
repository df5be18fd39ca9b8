"""How time and memory grow, one axis at a time, with a small next-token model: tokens, batch, depth.

    python scripts/scaling.py
    python scripts/scaling.py light=true out=outputs/scaling_light

For each axis the others stay at batch 1, 64 tokens and 4 blocks. Sampling is timed a step: the last quarter of them
over the second tells what grows with the position, which should be attention alone (at most 4 x positions x width x
depth multiplications a row). Times are CPU seconds of this process, so that other jobs on the machine do not count.
Memory is the most bytes that the tensors made by a run hold at once, counted one by one (eval/memory.py): the cache and
a step's own for sampling; activations and gradients for training. Weights come on top.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.memory import Memory  # noqa: E402
from eval.protocol import library_versions  # noqa: E402
from eval.throughput import describe  # noqa: E402
from vtok.cli import check_place, entry  # noqa: E402

BASE = {"tokens": 64, "batch": 1, "depth": 4}
AXES = {"tokens": (64, 256, 1024, 4096), "batch": (1, 4, 16, 64, 256), "depth": (2, 4, 8, 16, 32)}
LIGHT = {"tokens": (16, 36), "batch": (1, 4), "depth": (2, 4)}


def model_of(tokens: int, depth: int, width: int = 64) -> Any:
    from vgen.models.llamagen import LlamaGen
    from vtok.layout import SequenceLayout
    from vtok.tokenizer import Part, TokenSpec

    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"tokens={tokens}: choose a square number")
    spec = TokenSpec(SequenceLayout.raster(side, side), (Part(tokens, 256, 8),), 8 * side)
    return LlamaGen(spec, 10, depth=depth, width=width, heads=4, multiple_of=32)


def step_seconds(model: Any, batch: int) -> list[float]:
    """CPU seconds of every decode step with guidance, by this process alone: other jobs do not count."""
    from vgen.conditioning import Cond
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.samplers.ancestral import ancestral
    from vtok.noise import SampleNoise, sample_seeds

    labels = torch.arange(batch) % 10
    marks = [time.process_time()]
    with torch.inference_mode():
        cond = Cond.cat([model.conditioner(labels), model.conditioner.null(batch)])
        noise = SampleNoise(sample_seeds(0, 0, batch))
        watch = lambda *_: marks.append(time.process_time())  # noqa: E731
        ancestral(model.eval(), cond, noise=noise, guide=guidance(2.0), rule=DrawRule(top_k=50), on_step=watch)
    return [b - a for a, b in itertools.pairwise(marks)]


def train_seconds(model: Any, batch: int) -> float:
    from vtok.noise import sample_seeds

    tokens = torch.randint(256, (batch, model.layout.length))
    given = {"tokens": tokens, "label": torch.arange(batch) % 10, "key": sample_seeds(0, 0, batch)}
    spent = []
    for _ in range(3):
        start = time.process_time()
        model.zero_grad(set_to_none=True)
        model.train().loss(given)["loss"].backward()
        spent.append(time.process_time() - start)
    return min(spent)


def train_bytes(model: Any, batch: int) -> int:
    """The most bytes at once of a training step: activations, gradients, temporaries."""
    from vtok.noise import sample_seeds

    tokens = torch.randint(256, (batch, model.layout.length))
    given = {"tokens": tokens, "label": torch.arange(batch) % 10, "key": sample_seeds(0, 0, batch)}
    model.zero_grad(set_to_none=True)
    with Memory() as memory:
        model.train().loss(given)["loss"].backward()
    model.zero_grad(set_to_none=True)
    return memory.peak


def sample_bytes(model: Any, batch: int) -> int:
    """The most bytes at once of sampling: the cache, and what a step makes."""
    with Memory() as memory:
        step_seconds(model, batch)
    return memory.peak


def growth(steps: list[float]) -> float:
    """Median of the last quarter of the steps over that of the second quarter (the first few warm up)."""
    quarter = max(1, len(steps) // 4)
    return statistics.median(steps[-quarter:]) / statistics.median(steps[quarter : 2 * quarter])


def measure(axis: str, value: int) -> dict[str, Any]:
    """One point: a row of the JSON."""
    point = BASE | {axis: value}
    torch.manual_seed(0)
    model = model_of(point["tokens"], point["depth"])
    step_seconds(model, 1) if point["tokens"] <= 64 else None  # the first run of a process is slower
    steps = step_seconds(model, point["batch"])
    cache = model.cache(2 * point["batch"])
    return {
        "axis": axis,
        **point,
        "step_ms": 1000 * statistics.median(steps),
        "sample_seconds": sum(steps),
        "growth": growth(steps),
        "train_seconds": train_seconds(model, point["batch"]),
        "train_bytes": train_bytes(model, point["batch"]),
        "sample_bytes": sample_bytes(model, point["batch"]),
        "cache_bytes": cache.keys.numel() * cache.keys.element_size() * 2,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def plot(path: Path, rows: list[Mapping[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = {
        "CPU ms": (
            ("step_ms", 1.0, "decode step"),
            ("sample_seconds", 1e3, "sampling"),
            ("train_seconds", 1e3, "training step"),
        ),
        "MiB": (
            ("cache_bytes", 2**-20, "cache"),
            ("sample_bytes", 2**-20, "sampling"),
            ("train_bytes", 2**-20, "training step"),
        ),
    }
    figure, panels = plt.subplots(2, 3, figsize=(12, 7), sharey="row")
    for row_of_panels, (unit, drawn) in zip(panels, lines.items()):
        for panel, axis in zip(row_of_panels, AXES):
            members = [row for row in rows if row["axis"] == axis]
            for name, factor, label in drawn:
                panel.plot([r[axis] for r in members], [r[name] * factor for r in members], marker="o", label=label)
            panel.set(xscale="log", yscale="log", xlabel=axis, title=f"over {axis}")
            panel.set_xticks([r[axis] for r in members], [str(r[axis]) for r in members])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        row_of_panels[0].set_ylabel(unit)
        row_of_panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    from vtok.checkpoint import write_json

    check_place("out", config["out"], folder=True)
    torch.set_num_threads(int(config["threads"]))
    rows = []
    for axis, values in (LIGHT if config["light"] else AXES).items():
        for value in values:
            rows.append(measure(axis, value))
            row = rows[-1]
            print(
                f"{axis} {value:5}  decode step {row['step_ms']:8.2f} ms, last / second quarter {row['growth']:.2f}  "
                f"sampling {row['sample_seconds']:.2f} s, {row['sample_bytes'] / 2**20:.1f} MiB  "
                f"training step {1000 * row['train_seconds']:.0f} ms, {row['train_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    facts = {"device": describe(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
    write_json(out / "scaling.json", {"rows": rows, **facts, "versions": library_versions()})
    plot(out / "scaling.png", rows)
    print(f"wrote {out / 'scaling.json'} and scaling.png")
    return rows


@entry("scaling", ROOT / "configs", whole={"threads": 1})
def main(config: Any) -> None:
    run(config)


if __name__ == "__main__":
    main()
