"""`python -m eval.versus`: an original implementation and ours on the same weights, checked equal, then timed in turns.

    python -m eval.versus peer=llamagen dir=../LlamaGen size=GPT-B batch=1
    python -m eval.versus --selftest

First the outputs must agree: teacher-forced logits (or states) within 1e-4 of the largest, equal greedy tokens, of our
plain module and of what is timed. Where that rounds (bfloat16, 8 bits), its logits and images may differ by more
(constants in eval/peers.py), and the share of greedy tokens or ids that differ is only recorded: `differences` says so.
Then the two take turns, the first to go changing every time; the ratio is the original's time over ours: the median
over the turns, with its 10-90 % range. On the CPU the original has a process of its own (apart), since what ours asks
of the C library (keep_memory in vtok/acceleration.py) would serve it too. A shared machine slows both sides of a turn,
so ratios outlive it where times do not; clock=cpu with threads=1 counts the processes' own seconds alone. On CUDA both
sides are warm and waited for, and in bfloat16 the original runs in it too (eval/peers.py); on the CPU bfloat16 is
for our sampling and decoding, and rows of training and encoding say float32. A training step is forward and backward,
without an optimizer.
compiled_original=true: LlamaGen's model through torch.compile, as its own sampling script does, and caches that are new
at every call. The original's code comes from `dir`; without it the command says what to clone. A row holds the paths
that our side took (vtok/counters.py); where one that the settings ask for was not taken, the command fails
(eval/paths.py).
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from eval import paths
from eval.fid import CONFIGS
from eval.peers import PROGRESS, SIZES, Options, Output, draw, exact, pair, replaced
from eval.protocol import library_versions
from eval.throughput import describe, matmul_rate, storage, wait
from eval.tokenizer_peers import BUILDERS as TOKENIZERS
from vtok import counters
from vtok.acceleration import training_operations
from vtok.cli import check_json, check_number, check_whole_number, entry, is_list

PARTS = ("sample", "train", "encode", "decode")
LEAST = 7  # turns, fewer are no measurement
STEPPED = ("llamagen", "xar", "mar")  # peers whose sampling can be cut short
ITSELF = 0.95, 1.05  # the ratio of a module against itself
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def agree(same: list[Output]) -> dict[str, float]:
    """max|ours - original| / max|original|, or the share of unequal ids, by name. ValueError where the two sides differ
    by more than is allowed."""
    found = {}
    for name, theirs, ours, allowed in same:
        if theirs.shape != ours.shape:
            raise ValueError(f"{name}: the original gives {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
        if ours.is_floating_point():
            found[name] = float((theirs.double() - ours.double()).abs().max() / theirs.double().abs().max())
            limit = allowed
        else:
            found[name], limit = float((theirs != ours).double().mean()), 0.0
        if allowed is not None and not found[name] <= limit:
            raise ValueError(f"{name} differ by {found[name]:.2e}, allowed is {limit}: nothing was timed")
    return found


def products(generator: Any, options: Options) -> dict[str, float]:
    """Operations of our training step (vtok/acceleration.py), and a second of large matrix products here and now: what
    a step takes at least. Nothing for a family without a closed form."""
    operations = training_operations(generator, options.keys().cpu())
    if operations is None:
        return {}
    rate = matmul_rate(options.device, options.dtype if options.light else torch.float32)
    return {"operations": options.batch * operations, "matmul_rate": rate}


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation between the ordered values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


Timer = Callable[[int], float]  # runs so often -> seconds a run


def timer(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Of runs in this process, between two waits for the device."""

    def timed(times: int) -> float:
        wait(device)
        start = clock()
        for _ in range(times):
            run()
        wait(device)
        return (clock() - start) / times

    return timed


def alternate(first: Timer, second: Timer, turns: int, device: torch.device, *, least: float = 0.0) -> dict[str, Any]:
    """Seconds a run of both in turns after one run each to warm up (on CUDA three: kernels are chosen, graphs recorded,
    the clock raised), and the ratios first / second of every turn.

    least: seconds that the second's side of a turn lasts at least: both then run as often, so that what else the
    machine does for a moment weighs little. How often is told by a second run to warm up.
    """
    both: tuple[Timer, Timer] = (first, second)
    runs: tuple[list[float], list[float]] = [], []
    for _ in range(0 if device.type == "cpu" else 2):
        first(1)
        second(1)
    first(1)
    second(1)  # may compile
    spent = second(1)
    times = max(1, math.ceil(least / max(spent, 1e-6)))
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            runs[side].append(both[side](times))
    ratios = [a / b for a, b in zip(*runs, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": quantile(ratios, 0.1),
        "ratio_high": quantile(ratios, 0.9),
        "original_seconds": statistics.median(runs[0]),
        "our_seconds": statistics.median(runs[1]),
        "turns": turns,
        "runs_a_turn": times,
    }


class Apart:
    """The original's runs in a process of their own, which is started here and ended by `close`."""

    def __init__(self, peer: str | None, folder: str | None, options: Options, threads: int, clock: str) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        given = (other, peer, folder, options, threads, clock)
        self.process = context.Process(target=_apart, args=given, daemon=True)
        # the new process imports this module by its name, which must not be one in the original's folder
        ours = [place for place in sys.path if folder is None or Path(place).resolve() != Path(folder).resolve()]
        with replaced(sys, "path", ours):
            self.process.start()
        other.close()

    def timer(self, part: str) -> Timer:
        def timed(times: int) -> float:
            try:
                self.pipe.send((part, times))
                return self.pipe.recv()
            except (EOFError, ConnectionError):
                raise RuntimeError("the original's process ended; what it says is above") from None

        return timed

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _apart(pipe: Any, peer: str | None, folder: str | None, options: Options, threads: int, clock: str) -> None:
    """What the process of `Apart` does: parts and times in, seconds out, until the pipe closes."""
    torch.set_num_threads(threads)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    parts = {"sample": (itself(options), None)} if peer is None else pair(peer, folder, options).parts
    while True:
        try:
            part, times = pipe.recv()
        except EOFError:
            return
        pipe.send(timer(parts[part][0], options.device, CLOCKS[clock])(times))


def itself(options: Options) -> Callable[[], Any]:
    """A small LlamaGen's sampling, for timing it against itself."""
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.models.llamagen import LlamaGen
    from vtok.layout import SequenceLayout
    from vtok.tokenizer import Part, TokenSpec

    spec = TokenSpec(SequenceLayout.raster(8, 8), (Part(64, 512, 8),), 64)
    model = LlamaGen(spec, 10, depth=4, width=128, heads=4, multiple_of=64).eval().to(options.device)
    labels = options.labels() % 10
    return lambda: draw(model, labels, guidance(2.0), DrawRule(top_k=100), stop=options.steps)


def asked(config: Mapping[str, Any], generator: Any | None, part: str, options: Options) -> paths.Asked:
    """The paths that our side has to take; of the self-test's model, at least cached and guided steps."""
    if generator is None:
        return paths.Asked({"step.cached", "rows.guided"}, {"step.recomputed"})
    if part == "encode":
        return paths.encoding(generator, dtype=options.dtype_of(part))
    if part == "decode":
        return paths.decoding(generator, dtype=options.dtype)
    if part == "train":
        dtype = options.dtype_of(part)
        given = {"device": options.device, "dtype": dtype, "compiled": options.compile}
        return paths.training(generator, key=options.keys(), progress=PROGRESS, **given)
    given = {"dtype": options.dtype, "cuda_graphs": options.cuda_graphs, "compiled": options.compile, **storage(config)}
    return paths.sampling(generator, guided=True, **given)


def ran(part: str, options: Options) -> dict[str, Any]:
    """What this part really runs with, of the options that are for some parts alone."""
    sampled = part == "sample"
    return {
        "dtype": str(options.dtype_of(part)).removeprefix("torch."),
        "quant": options.quant if sampled else None,
        "compile": part in ("sample", "train") and options.compile,
        "cuda_graphs": sampled and options.cuda_graphs,
        "compiled_original": sampled and options.compiled_original,
    }


def held(run: Callable[[], Any], part: str, options: Options) -> Callable[[], Any]:
    """Our run, in which attention may not fall to the unfused kernel (eval/paths.py)."""

    def call() -> Any:
        with paths.fused(options.device, options.dtype_of(part)):
            return run()

    return call


def without_effect(config: Mapping[str, Any]) -> list[str]:
    """Keys that are set although nothing of this peer reads them."""
    found = []
    if config["steps"] is not None and config["peer"] not in (*STEPPED, None):
        found.append(f"steps={config['steps']}")
    if config["peer"] in TOKENIZERS:
        found += [f"{name}={config[name]}" for name in ("packed", "quant") if config[name] is not None]
        found += [f"{name}=true" for name in ("compile", "cuda_graphs") if config[name]]
    return found


def evaluate(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The command: checks, times, prints, adds to `out`; returns the rows of this call."""
    from vgen.sampling import resolve_device, resolve_dtype
    from vtok.checkpoint import write_json

    for name in ("turns", "batch", "steps"):
        if config[name] is not None:
            check_whole_number(name, config[name])
    check_number("least_seconds", config["least_seconds"])
    parts = config["parts"]
    if not is_list(parts) or not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts={parts}: give a list, of {', '.join(PARTS)}")
    if config["selftest"] and config["peer"] is not None:
        raise ValueError(f"selftest=true times a small model of ours against itself: leave peer={config['peer']} away")
    check_json("out", config["out"], "rows")
    if config["turns"] < LEAST:
        raise ValueError(f"turns={config['turns']}: a ratio is the median over at least {LEAST}")
    if config["clock"] not in CLOCKS:
        raise ValueError(
            f"clock={config['clock']}: choose wall, or cpu (seconds of this process's own, for one thread)"
        )
    if config["clock"] == "cpu" and config["threads"] != 1:
        raise ValueError(f"clock=cpu adds up the seconds of all threads: pass threads=1, not {config['threads']}")
    if not 0 <= config["least_seconds"] < math.inf:
        raise ValueError(f"least_seconds={config['least_seconds']}: seconds that a side of a turn lasts, 0 or more")
    if config["compiled_original"] and (config["selftest"] or config["peer"] != "llamagen"):
        raise ValueError(
            "compiled_original=true is for peer=llamagen, whose sampling script compiles its model; leave it false"
        )
    if config["batch"] < 1:
        raise ValueError(f"batch={config['batch']}: at least one image is made at once")
    if not config["selftest"] and (idle := without_effect(config)):
        raise ValueError(f"{', '.join(idle)}: of no effect for peer={config['peer']}; leave them out")
    device, dtype, steps, both = resolve_device(config["device"]), resolve_dtype(config["dtype"]), config["steps"], None
    if config["clock"] == "cpu" and device.type != "cpu":
        raise ValueError(f"clock=cpu does not see what device={device} does: pass clock=wall")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where an original's bare .cuda() goes
    size = config["size"] or SIZES.get(config["peer"], "tiny")
    switches = {name: bool(config[name]) for name in ("compile", "cuda_graphs", "compiled_original")}
    options = Options(size, int(config["batch"]), steps, dtype, device=device, **storage(config), **switches)
    name, setting, differences = config["peer"], "", {}
    if config["selftest"]:
        run = itself(options)
        timed, name = {"sample": (run, run)}, "itself"
    elif name is None:
        raise ValueError("pass peer=<family> and dir=<checkout of the original>, or selftest=true")
    else:
        both = pair(name, config["dir"], options)
        if not set(parts) & set(both.parts):
            raise ValueError(f"parts={list(parts)}: choose of {', '.join(both.parts)}")
        with exact():
            checked = both.same() + (both.taught() if "train" in parts else [])
            differences, setting = agree(checked), both.setting
        told = ", ".join(f"{k} {v:.1e}" for k, v in differences.items())
        print(f"{name}: same weights, same outputs ({told})", flush=True)
        timed = {k: v for k, v in both.parts.items() if k in parts}
    rows, clock, apart = [], CLOCKS[config["clock"]], config["apart"]
    if apart is None:
        apart = device.type == "cpu"
    peer = None if config["selftest"] else name
    given = (peer, config["dir"], options, torch.get_num_threads(), config["clock"])
    with closing(Apart(*given)) if apart else nullcontext() as other:
        for part, (theirs, ours) in timed.items():
            begun = paths.begin(device)  # only our side counts
            first = timer(theirs, device, clock) if other is None else other.timer(part)
            second = timer(held(ours, part, options), device, clock)
            row = alternate(first, second, int(config["turns"]), device, least=config["least_seconds"])
            row["paths"] = counters.read()
            module = None if both is None else both.learning if part == "train" else both.ours
            (begun | asked(config, module, part, options)).check(row["paths"], f"{name} {part}")
            facts = {"peer": name, "size": size, "part": part, "batch": options.batch}
            facts |= {"threads": torch.get_num_threads(), "device": describe(device), "clock": config["clock"]}
            facts |= {"on": device.type, "original_dtype": config["dtype"] if options.light else "float32"}
            facts |= {"apart": bool(apart)}
            packed = device.type == "cpu" and bool({"linear.packed", "linear.half"} & row["paths"].keys())
            facts |= ran(part, options) | {"packed": packed}
            if part == "train":
                facts |= products(both.learning, options)
            what = "forward and backward" if part == "train" else setting
            more = {"setting": what, "differences": differences, "date": time.strftime("%Y-%m-%d")}
            rows.append(facts | row | more | {"note": config["note"], "versions": library_versions()})
            print(
                f"{name} {part} batch {config['batch']}: the original's time is {row['ratio']:.2f} x ours "
                f"(10-90 % {row['ratio_low']:.2f} to {row['ratio_high']:.2f}, {row['turns']} turns; "
                f"{row['original_seconds']:.3f} s and {row['our_seconds']:.3f} s)\n"
                f"  our paths: {', '.join(f'{path} {times}' for path, times in row['paths'].items())}",
                flush=True,
            )
    out, key = Path(config["out"]), ("peer", "size", "part", "batch", "dtype", "threads", "device", "setting", "clock")
    key += ("packed", "quant", "compile", "cuda_graphs", "compiled_original")
    earlier = check_json("out", out, "rows").get("rows", [])
    done = {tuple(row.get(k) or None for k in key) for row in rows}  # rows of before have no storage: a plain one
    kept = [row for row in earlier if tuple(row.get(k) or None for k in key) not in done]
    write_json(out, {"rows": kept + rows})
    print(f"wrote {out}")
    ratio, (low, high) = rows[-1]["ratio"], ITSELF
    if config["selftest"] and not low <= ratio <= high:
        raise ValueError(
            f"selftest: a module against itself gives {ratio:.3f}, not {low} to {high}, so no ratio of this machine "
            "counts now: end what else runs on it, or raise turns and least_seconds"
        )
    return rows


@entry("eval_versus", CONFIGS, whole={"batch": 1, "turns": 1}, numbers={"least_seconds": (0, math.inf)})
def main(config: Any) -> None:
    evaluate(config)


if __name__ == "__main__":
    sys.argv = ["selftest=true" if word == "--selftest" else word for word in sys.argv]
    main()
