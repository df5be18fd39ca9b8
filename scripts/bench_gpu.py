"""`make bench-gpu`: speed on one GPU, most wanted rows first, one JSON a row, resumable.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py seconds=170 only=[llamagen_l_sample_1]
    python scripts/bench_gpu.py peers=..

A row is one call of eval.throughput in a process of its own, on the fast paths unless its name says plain; where one
was not taken, the row fails. A call of this script starts no row after `seconds` and ends `row_seconds` later at most,
so that three calls end within 25 minutes: a row has at least `row_seconds`, more where it starts early (compiling both
sides of a comparison takes minutes), and `most_seconds` at most. What these calls do not measure, the least wanted
rows, is left for more. Rows whose file holds a measurement are done. A row that failed or was killed leaves
`<row>.failed` and comes first in the next call, last once it failed twice or had `most_seconds`. MAR is measured at 16
iterations and xAR at 10 solver steps, as in eval.versus; the rows say so.

peers: a folder with clones of the originals, named as their repositories are (LlamaGen, VAR, ..). Rows of eval.versus
(`versus_..`) for those that are there then come behind the most wanted ones. scripts/benchmarks.py writes
docs/benchmarks.md from the files.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.peers import SOURCES  # noqa: E402
from vtok.cli import check_place, entry  # noqa: E402

LLAMAGEN, VAR, KL = "tokenizer=llamagen_vq16", "tokenizer=var_vqvae", "tokenizer=kl16"
GRAPHS, COMPILE, IN_TURN = "cuda_graphs=true", "compile=true", "encode_ahead=false"
ROWS: dict[str, tuple[str, ...]] = {
    "llamagen_l_sample_1": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_l_sample_1_compiled": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[1]", GRAPHS, COMPILE),
    "var_d16_sample_1": (VAR, "model=var_d16", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_l_train": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[64]", COMPILE),
    "var_d16_train": (VAR, "model=var_d16", "parts=[train]", "batches=[64]", COMPILE),
    "llamagen_l_sample_64": (LLAMAGEN, "model=llamagen_l", "parts=[sample]", "batches=[64]", GRAPHS),
    "var_d16_sample_64": (VAR, "model=var_d16", "parts=[sample]", "batches=[64]", GRAPHS),
    "llamagen_3b_sample_1": (LLAMAGEN, "model=llamagen_3b", "parts=[sample]", "batches=[1]", GRAPHS),
    "llamagen_3b_sample_1_compiled": (LLAMAGEN, "model=llamagen_3b", "parts=[sample]", "batches=[1]", GRAPHS, COMPILE),
    "llamagen_b_sample_8": (LLAMAGEN, "model=llamagen_b", "parts=[sample]", "batches=[8]", GRAPHS),
    "var_d16_sample_1_compiled": (VAR, "model=var_d16", "parts=[sample]", "batches=[1]", GRAPHS, COMPILE),
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
    "var_d16_train_prefixes": (VAR, "model=var_d16", "parts=[train]", "batches=[64]", COMPILE, "prefixes=true"),
    # training counts at its best batch
    "llamagen_l_train_128": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[128]", COMPILE),
    "var_d16_train_128": (VAR, "model=var_d16", "parts=[train]", "batches=[128]", COMPILE),
    "llamagen_l_train_32": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[32]", COMPILE),
    "var_d16_train_32": (VAR, "model=var_d16", "parts=[train]", "batches=[32]", COMPILE),
    "llamagen_b_online": (LLAMAGEN, "model=llamagen_b", "parts=[online]", "batches=[64]", COMPILE),
    "llamagen_b_online_plain": (LLAMAGEN, "model=llamagen_b", "parts=[online]", "batches=[64]", COMPILE, IN_TURN),
    "llamagen_l_train_plain": (LLAMAGEN, "model=llamagen_l", "parts=[train]", "batches=[64]"),
}


SPENT = "the most that a row has, given up"  # told of a row that more time would not help
FIRST = list(ROWS).index("llamagen_3b_sample_1_compiled") + 1  # rows that come before those of VERSUS
VERSUS: dict[str, tuple[str, str, str, int, float]] = {  # peer, size, part, batch, the ratio that is wanted
    "versus_llamagen_l_sample_1": ("llamagen", "GPT-L", "sample", 1, 3.0),
    "versus_var_d16_sample_1": ("var", "d16", "sample", 1, 2.0),
    "versus_llamagen_b_sample_1": ("llamagen", "GPT-B", "sample", 1, 3.0),
    "versus_xar_b_sample_1": ("xar", "xar_base", "sample", 1, 2.0),
    "versus_rar_b_sample_1": ("rar", "rar_b", "sample", 1, 2.0),
    "versus_mar_b_sample_1": ("mar", "mar_base", "sample", 1, 2.0),
    "versus_llamagen_l_train_32": ("llamagen", "GPT-L", "train", 32, 1.3),
    "versus_var_d16_train_32": ("var", "d16", "train", 32, 1.3),
    "versus_llamagen_l_sample_8": ("llamagen", "GPT-L", "sample", 8, 3.0),
    "versus_var_d16_sample_8": ("var", "d16", "sample", 8, 2.0),
    "versus_llamagen_b_sample_8": ("llamagen", "GPT-B", "sample", 8, 3.0),
    "versus_llamagen_vq16_encode_8": ("llamagen_vq", "VQ-16", "encode", 8, 1.5),
    "versus_llamagen_vq16_decode_8": ("llamagen_vq", "VQ-16", "decode", 8, 1.5),
    "versus_var_vqvae_encode_8": ("var_vqvae", "vae_ch160v4096z32", "encode", 8, 1.5),
    "versus_var_vqvae_decode_8": ("var_vqvae", "vae_ch160v4096z32", "decode", 8, 1.5),
    "versus_titok_l32_encode_8": ("titok", "titok_l32", "encode", 8, 1.5),
    "versus_titok_l32_decode_8": ("titok", "titok_l32", "decode", 8, 1.5),
    "versus_llamagen_l_sample_2": ("llamagen", "GPT-L", "sample", 2, 3.0),
    "versus_llamagen_b_sample_2": ("llamagen", "GPT-B", "sample", 2, 3.0),
    "versus_llamagen_b_train_32": ("llamagen", "GPT-B", "train", 32, 1.3),
    "versus_xar_b_train_32": ("xar", "xar_base", "train", 32, 1.3),
    "versus_rar_b_train_32": ("rar", "rar_b", "train", 32, 1.3),
    "versus_mar_b_train_32": ("mar", "mar_base", "train", 32, 1.3),
}


def compiled(peer: str, part: str) -> bool:
    """Whether the original is wanted as its own script compiles it."""
    return (peer, part) == ("llamagen", "sample")


def measured(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, with its date and versions, if every one of them has numbers, else none."""
    try:
        kept = json.loads(file.read_text()) if file.is_file() else {"rows": []}
        kept["rows"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is no measurement ({error!r}): remove it, and its row is measured again") from None
    facts = {name: kept[name] for name in ("date", "versions") if name in kept}
    complete = all(row.get("ratio") or (row.get("images_per_second") and row.get("fraction")) for row in kept["rows"])
    return [facts | row for row in kept["rows"]] if complete else []


def clone(peer: str, peers: str) -> Path:
    return Path(peers).resolve() / Path(SOURCES[peer]).name


def wanted(peers: str | None) -> list[str]:
    """All rows, most wanted first; comparisons with the originals of which there is a clone in the folder `peers`.
    ValueError where there is none at all."""
    compared = [name for name, (peer, *_) in VERSUS.items() if peers is not None and clone(peer, peers).is_dir()]
    if peers is not None and not compared:
        named = sorted({Path(source).name for source in SOURCES.values()})
        raise ValueError(f"peers={peers}: no clone in it is named {', '.join(named)}; leave peers=null, or clone them")
    return [*list(ROWS)[:FIRST], *compared, *list(ROWS)[FIRST:]]


def left(folder: Path, only: list[str] | None, peers: str | None = None) -> list[str]:
    """Rows without a measurement: those that failed once, then the others, then those that failed again or had all the
    time that a row may have, each in the order in which they are wanted. ValueError for an unknown name."""
    rows = wanted(peers)
    unknown = set(only or ()) - set(rows)
    if unknown:
        more = " (versus_..: pass peers=<folder of the originals' clones>)" if unknown & set(VERSUS) else ""
        raise ValueError(f"only={sorted(unknown)}: choose of {', '.join(rows)}{more}")
    names = [name for name in rows if (not only or name in only) and not measured(folder / f"{name}.json")]
    files = {name: folder / f"{name}.failed" for name in names}
    told = {name: file.read_text().splitlines() if file.is_file() else [] for name, file in files.items()}

    def turn(name: str) -> int:
        if len(told[name]) > 1 or any(SPENT in line for line in told[name]):
            return 2
        return 0 if told[name] else 1

    return sorted(names, key=turn)


def command(name: str, out: Path, repeats: int, peers: str | None = None) -> list[str]:
    module, options = "eval.throughput", [*ROWS.get(name, ()), f"repeats={repeats}"]
    if name in VERSUS:
        assert peers is not None, name
        peer, size, part, batch, _ = VERSUS[name]
        module, options = "eval.versus", [f"peer={peer}", f"dir={clone(peer, peers)}", f"size={size}"]
        # the original's side may last ten times as long
        options += [f"parts=[{part}]", f"batch={batch}", "least_seconds=0.2"]
        options += [f"cuda_graphs={part == 'sample'}", f"compile={part == 'train' or compiled(peer, part)}"]
        options += [f"compiled_original={compiled(peer, part)}"]
    return [sys.executable, "-m", module, *options, "device=cuda", "dtype=bfloat16", f"out={out}"]


def check_times(config: Mapping[str, Any]) -> None:
    """ValueError where a row may not last as long as every row does at least."""
    most, least = config["most_seconds"], config["row_seconds"]
    if most < least:
        raise ValueError(f"most_seconds={most} is below row_seconds={least}, which every row has: raise the first")


def run(config: Mapping[str, Any], *, start=subprocess.run, clock=time.monotonic) -> list[str]:
    """Measure what is left and fits into the time; returns the names of the rows measured now."""
    folder, began, done = Path(config["out"]), clock(), []
    end = began + config["seconds"] + config["row_seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    only, peers = config["only"], config["peers"]
    todo = left(folder, only, peers)
    for name in todo:
        room = end - clock()
        if room < config["row_seconds"]:
            print(f"time is up; {len(left(folder, only, peers))} rows are left: call again", flush=True)
            break
        part, failed = folder / f"{name}.part", folder / f"{name}.failed"  # a killed row has no file of its own name
        part.unlink(missing_ok=True)
        limit = min(room, config["most_seconds"])
        try:
            ended = start(command(name, part, config["repeats"], peers), cwd=ROOT, timeout=limit)
            why = "" if ended.returncode == 0 and measured(part) else f"failed, exit code {ended.returncode}"
        except subprocess.TimeoutExpired:
            why = f"over {limit:.0f} s, {SPENT if limit == config['most_seconds'] else 'given up'}"
        if why:
            with open(failed, "a") as file:
                file.write(f"{why}\n")
            print(f"{name}: {why}", flush=True)
            continue
        part.rename(folder / f"{name}.json")
        failed.unlink(missing_ok=True)
        done.append(name)
    print(f"{len(done)} rows measured, {len(left(folder, only, peers))} left, in {folder}")
    return done


@entry(
    "bench_gpu",
    ROOT / "configs",
    whole={"repeats": 1},
    numbers={"seconds": (0, math.inf), "row_seconds": (1, math.inf), "most_seconds": (1, math.inf)},
    lists=("only",),
)
def main(config: Any) -> None:
    import torch

    check_times(config)
    config["only"] = [config["only"]] if isinstance(config["only"], str) else config["only"]
    check_place("out", config["out"], folder=True)
    left(Path(config["out"]), config["only"], config["peers"])  # or what is wrong with them
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is at hand: nothing was measured; docs/benchmarks.md says so")
    run(config)


if __name__ == "__main__":
    main()
