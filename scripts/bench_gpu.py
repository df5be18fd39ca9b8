"""`make bench-gpu`: speed on one GPU, most wanted rows first, one JSON a row, resumable.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py seconds=540 only=[llamagen_l_sample_1]

A row is one call of eval.throughput in a process of its own, on the fast paths unless its name says plain; where one
was not taken, the row fails. A call of this script starts no row after `seconds`, and kills one that runs over
`row_seconds`; rows whose file holds a measurement are done, so three calls of nine minutes do what one of 25 would. A
row that failed or was killed leaves `<row>.failed` and comes first in the next call. MAR is measured at 16 iterations
and xAR at 10 solver steps, as in eval.versus; the rows say so. scripts/benchmarks.py writes docs/benchmarks.md from the
files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import entry  # noqa: E402

LLAMAGEN, VAR, KL = "tokenizer=llamagen_vq16", "tokenizer=var_vqvae", "tokenizer=kl16"
GRAPHS, COMPILE, IN_TURN = "cuda_graphs=true", "compile=true", "encode_ahead=false"
ROWS: dict[str, tuple[str, ...]] = {
    "llamagen_l_sample_1": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[1]", GRAPHS),
    "var_d16_sample_1": (VAR, "model=var_d16", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_l_train": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[64]", COMPILE),
    "var_d16_train": (VAR, "model=var_d16", "parts=[train]", "batches=[64]", COMPILE),
    "llamagen_l_sample_64": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[64]", GRAPHS),
    "var_d16_sample_64": (VAR, "model=var_d16", "parts=[sample]", "batches=[64]", GRAPHS),
    "llamagen_3b_sample_1": (LLAMAGEN, "model=llamagen_3b", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_l_sample_1_plain": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[1]"),
    "llamagen_vq16": (LLAMAGEN, "parts=[encode,decode]", "batches=[1,64]"),
    "var_vqvae": (VAR, "parts=[encode,decode]", "batches=[1,64]"),
    "titok_l32": ("tokenizer=titok_l32", "parts=[encode,decode]", "batches=[1,64]"),
    "rar_b_sample_1": ("tokenizer=maskgit_vqgan", "model=rar_b", "parts=[sample]", "batches=[1]", GRAPHS),
    "xar_b_sample_1": (KL, "model=xar_b", "model.solver_steps=10", "parts=[sample]", "batches=[1]", GRAPHS),
    "mar_b_sample_1": (KL, "model=mar_b", "model.steps=16", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_b_sample_256": (LLAMAGEN, "model=llamagen_b", "parts=[sample]", "batches=[256]", GRAPHS),
    "llamagen_l_sample_1_int8": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[1]", GRAPHS, "quant=int8"),
    "llamagen_l_sample_1_float8": (
        LLAMAGEN,
        "model=llamagen_l",
        "parts=[sample]",
        "batches=[1]",
        GRAPHS,
        "quant=float8",
    ),
    "llamagen_b_online": (LLAMAGEN, "model=llamagen_b", "parts=[online]", "batches=[64]", COMPILE),
    "llamagen_b_online_plain": (LLAMAGEN, "model=llamagen_b", "parts=[online]", "batches=[64]", COMPILE, IN_TURN),
    "llamagen_l_train_plain": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[64]"),
}


def measured(file: Path) -> list[dict[str, Any]]:
    """The rows of a file if every one of them has numbers, else none."""
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return rows if all(row.get("images_per_second") and row.get("fraction") for row in rows) else []


def left(folder: Path, only: list[str] | None) -> list[str]:
    """Rows without a measurement: those that failed before, then the others, each in the order in which they are
    wanted. ValueError for an unknown name."""
    unknown = set(only or ()) - set(ROWS)
    if unknown:
        raise ValueError(f"only={sorted(unknown)}: choose of {', '.join(ROWS)}")
    names = [name for name in ROWS if (not only or name in only) and not measured(folder / f"{name}.json")]
    return sorted(names, key=lambda name: not (folder / f"{name}.failed").is_file())


def command(name: str, out: Path, repeats: int) -> list[str]:
    options = (*ROWS[name], "device=cuda", "dtype=bfloat16", f"repeats={repeats}", f"out={out}")
    return [sys.executable, "-m", "eval.throughput", *options]


def run(config: Mapping[str, Any], *, start=subprocess.run, clock=time.monotonic) -> list[str]:
    """Measure what is left and fits into the time; returns the names of the rows measured now."""
    folder, began, done = Path(config["out"]), clock(), []
    folder.mkdir(parents=True, exist_ok=True)
    todo = left(folder, config["only"])
    for name in todo:
        if clock() - began > config["seconds"]:
            print(f"time is up; {len(left(folder, config['only']))} rows are left: call again", flush=True)
            break
        part, failed = folder / f"{name}.part", folder / f"{name}.failed"  # a killed row has no file of its own name
        part.unlink(missing_ok=True)
        try:
            ended = start(command(name, part, config["repeats"]), cwd=ROOT, timeout=config["row_seconds"])
            why = "" if ended.returncode == 0 and measured(part) else f"failed, exit code {ended.returncode}"
        except subprocess.TimeoutExpired:
            why = f"over {config['row_seconds']} s, given up"
        if why:
            failed.write_text(f"{why}\n")
            print(f"{name}: {why}", flush=True)
            continue
        part.rename(folder / f"{name}.json")
        failed.unlink(missing_ok=True)
        done.append(name)
    print(f"{len(done)} rows measured, {len(left(folder, config['only']))} left, in {folder}")
    return done


@entry("bench_gpu", ROOT / "configs")
def main(config: Any) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is at hand: nothing was measured; docs/benchmarks.md says so")
    run(config)


if __name__ == "__main__":
    main()
