"""`python -m eval.sweep`: eval.fid over every combination of drawing settings, with a plot of FD against IS.

    python -m eval.sweep from=outputs/my_run reference=val data=cifar10 images=5000 sweep.guidance=[1,1.5,2,3]
    python -m eval.sweep from=outputs/my_run protocol=adm sweep.guidance=[1.5,2] sweep.top_k=[0,900]

One JSON file a setting, one line a setting in sweep.jsonl, a plot, and the best setting. The images of the reference
are measured once. A setting that is there is not drawn again, and one that was killed goes on where it was. Several
processes (task_id and num_tasks, torchrun, a SLURM array) take every n-th setting.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.drawing import results_folder, weights_hash
from eval.fid import CONFIGS, evaluate
from eval.presets import settle
from eval.references import DATA_SPLITS
from eval.sources import Images, from_data, same_images
from vgen.sampling import SPEED, load_pipeline, resolve_device, rule_and_guidance
from vgen.sampling import settings as drawn_by
from vtok.checkpoint import write_atomic
from vtok.cli import check_numbers, check_place, entry
from vtok.config import defaults, differences

# other keys of eval.fid by which results of one folder must agree, beside the images of `data`
SAME = (
    "protocol", "reference", "images", "labels", "class_accuracy", "kid", "manifold", "tokenizer_from",
    "schedule_options", "solver", "sample_size", "chunk", "dtype", "extractor", "weights_path", "splits", "permutation",
    "quant", "packed", "compile", "decoder_dtype", "decode_chunk",
)  # fmt: skip
# keys of a data section that change no picture of a reference, which is read in order and as it is
NOT_PICTURES = (
    "batch_size", "accumulate", "workers", "seed", "flip", "shift", "scan", "cache", "cache_dir", "download",
)  # fmt: skip
AXES = ("guidance", "schedule", "temperature", "top_k", "top_p", "steps", "solver_steps", "seed", "weights")


def settings(axes: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the lists in `axes`; an axis that is null keeps the value of `config`."""
    if not isinstance(axes, Mapping):
        raise ValueError(f"sweep={axes}: give lists, sweep.<key>=[..], of {', '.join(AXES)}")
    unknown = set(axes) - set(AXES)
    if unknown:
        raise ValueError(f"sweep.{sorted(unknown)[0]}: choose of {', '.join(AXES)}")
    values = {}
    for axis in AXES:
        given = axes.get(axis)
        listed = [config.get(axis)] if given is None else given if isinstance(given, (list, tuple)) else [given]
        if not listed:
            raise ValueError(f"sweep.{axis}=[] has no value; leave it null to keep {axis}={config.get(axis)}")
        values[axis] = listed
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def name_of(setting: Mapping[str, Any]) -> str:
    """A file name that says the setting."""
    return "_".join(f"{k}-{v}" for k, v in setting.items() if v is not None).replace("/", "-")


def run(config: Mapping[str, Any], data: Any | None, axes: Mapping[str, Any], task: tuple[int, int]) -> list[dict]:
    """Measure this task's settings that are not there; returns the records of all that are."""
    if not config["from"]:
        raise ValueError("give from=<run or exported folder>: a sweep draws its samples")
    folder = Path(config["out"] or results_folder(str(config["from"])) / "sweep")
    chosen = settings(axes, config)
    settle(config)  # or what is wrong with the protocol
    for setting in chosen:  # all of them before the first is measured
        one = {**config, **setting}
        check_numbers(one)
        rule_and_guidance(drawn_by(one, say=lambda *_: None))
        if setting["weights"] not in ("ema", "raw", None) and not str(config["from"]).startswith("zoo:"):
            raise ValueError(f"weights={setting['weights']}: choose ema or raw")
    check_place("out", folder, folder=True)
    reference = folder / "reference.parts"  # what one setting measures of the images there, the others take
    if config.get("overwrite") and task[1] == 1:
        shutil.rmtree(reference, ignore_errors=True)
    device, pipeline, loaded = resolve_device(config["device"]), None, None
    split = str(config["reference"])
    real = from_data(data, split) if data is not None and split in DATA_SPLITS else None  # a look at every file
    ours = asked(config, real)
    for number, setting in enumerate(chosen):
        path = folder / f"{name_of(setting)}.json"
        if number % task[1] != task[0]:
            continue
        print(f"[{number + 1}/{len(chosen)}] {name_of(setting)}", flush=True)
        one = {**config, **setting, "out": str(path), "task_id": 0, "num_tasks": 1}
        if path.is_file():
            check(path, one, ours, None if data is None else defaults(type(data)))
            print("  done earlier")
            continue
        if loaded != (setting["weights"], setting["steps"]):  # steps change the loaded generator
            pipeline, loaded = load_pipeline(one, device), (setting["weights"], setting["steps"])
        evaluate(one, data, pipeline=pipeline, real=real, reference_parts=reference, notes={"asked": ours})
    found = records(folder, chosen)
    if len(found) == len(chosen):
        shutil.rmtree(reference, ignore_errors=True)
    return found


def asked(config: Mapping[str, Any], real: Images | None) -> dict[str, Any]:
    """What besides the setting itself decides the numbers, as JSON keeps it. Of `data` it is which images are the
    reference, `real`, not where they lie or how they are read; None where they are not."""
    given = {k: config.get(k, SPEED.get(k)) for k in SAME}
    return json.loads(json.dumps(given | {"data": real.identity if real else None}, default=str))


def check(
    path: Path, config: Mapping[str, Any], ours: Mapping[str, Any], usual: Mapping[str, Any] | None = None
) -> None:
    """ValueError where the result in `path` is of another checkpoint or was measured otherwise. usual: what the class
    of `data` takes where its section is silent, for results of versions that knew fewer of its keys."""
    result = json.loads(path.read_text())
    protocol, theirs = result["protocol"], result.get("asked")
    for name, there, here in asked_otherwise(theirs, ours, config, usual or {}) if theirs is not None else ():
        raise ValueError(f"{path} has {name}={there}, now {here}; pass another out=<folder>")
    if weights_hash(config) not in protocol["source"]:
        raise ValueError(f"{path} was measured on another checkpoint; delete it or pass another out=<folder>")
    if config["images"] and protocol["images"] != int(config["images"]):
        raise ValueError(f"{path} has {protocol['images']} images, now images={config['images']}; pass another out=")


def asked_otherwise(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], config: Mapping[str, Any], usual: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of the differences between two notes of `asked`; `theirs` may be of an earlier version, which
    kept the whole section of `data`."""
    theirs = {name: theirs.get(name, SPEED.get(name)) for name in ours}
    if ours["data"] is None and isinstance(theirs["data"], Mapping):  # its images are not the reference
        theirs["data"] = None
    elif isinstance(theirs["data"], Mapping):
        section = json.loads(json.dumps(config.get("data") or {}, default=str))
        both = ({**usual, **part} for part in (theirs["data"], section))
        theirs["data"], now = ({k: v for k, v in part.items() if k not in NOT_PICTURES} for part in both)
        ours = {**ours, "data": now}
    elif same_images(theirs["data"], ours["data"]):
        theirs["data"] = ours["data"]
    return differences(theirs, ours)


def records(folder: Path, chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"setting", "metrics", "protocol", "command"} of every setting that has a result, in the order of the sweep."""
    found = []
    for setting in chosen:
        path = folder / f"{name_of(setting)}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            found.append({"setting": setting, **{k: result[k] for k in ("metrics", "protocol", "command")}})
    return found


def distance_name(metrics: Mapping[str, Any]) -> str:
    """The key of the Frechet distance: FID or FD[...]."""
    return next(k for k in metrics if k == "FID" or k.startswith("FD["))


def score_name(metrics: Mapping[str, Any]) -> str | None:
    """The key of the Inception score: IS or IS[...]; None where the extractor classifies nothing (dinov2)."""
    return next((k for k in metrics if k == "IS" or k.startswith("IS[")), None)


def varying(found: list[dict[str, Any]]) -> list[str]:
    """The axes along which the settings differ."""
    return [axis for axis in found[0]["setting"] if len({str(r["setting"][axis]) for r in found}) > 1]


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """A table of the settings that differ, and the best of them by Frechet distance."""
    names, distance, score = varying(found), *(f(found[0]["metrics"]) for f in (distance_name, score_name))
    best = min(found, key=lambda record: record["metrics"][distance])
    yield "  ".join([*(f"{n:>12}" for n in names), f"{distance:>12}", *([f"{score:>12}"] if score else [])])
    for record in found:
        row = [f"{record['setting'][n]!s:>12}" for n in names]
        row += [f"{record['metrics'][distance]:12.4f}"]
        row += [f"{record['metrics'][score]['mean']:12.4f}"] if score else []
        yield "  ".join(row) + ("  best" if record is best else "")
    shown = " ".join(f"{k}={v}" for k, v in best["setting"].items() if v is not None)
    yield f"best {distance} {best['metrics'][distance]:.4f} with {shown}"
    if len(found) > 1:
        yield "chosen on these samples: report a number of other seeds (seed=)"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """FD against IS, one line along the axis that varies most for every combination of the others; without an IS, FD
    against that axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, distance, score = varying(found), *(f(found[0]["metrics"]) for f in (distance_name, score_name))
    axis = max(names, key=lambda n: len({str(r["setting"][n]) for r in found})) if names else "guidance"
    groups: dict[str, list[dict]] = {}
    for record in found:
        key = ", ".join(f"{n} {record['setting'][n]}" for n in names if n != axis)
        groups.setdefault(key, []).append(record)
    figure, axes = pyplot.subplots(figsize=(6, 4.2), dpi=120, layout="constrained")
    for key, part in groups.items():
        y = [r["metrics"][distance] for r in part]
        x = [r["metrics"][score]["mean"] if score else str(r["setting"][axis]) for r in part]
        axes.plot(x, y, "o-", label=key or None, linewidth=1, markersize=4)
        for record, a, b in zip(part, x, y):
            axes.annotate(f"{record['setting'][axis]}", (a, b), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(f"{score} (higher is better)" if score else axis)
    axes.set_ylabel(f"{distance} (lower is better)")
    axes.set_title(f"{found[0]['protocol']['images']} images a point; numbers: {axis}", fontsize=9)
    if len(groups) > 1:
        axes.legend(fontsize=7)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))
    pyplot.close(figure)


@entry("eval_sweep", CONFIGS)
def main(config: Any) -> None:
    from omegaconf import OmegaConf

    from vtok.config import instantiate
    from vtok.data.tasks import task_from_environment

    plain = OmegaConf.to_container(config, resolve=True)
    data = instantiate(config.data) if str(config.reference) in DATA_SPLITS and config.data else None
    task = task_from_environment(config.task_id, config.num_tasks, os.environ)
    found = run(plain, data, plain["sweep"], task)
    if not found:
        return
    folder = Path(config.out or results_folder(str(config["from"])) / "sweep")
    text = "".join(json.dumps(record, default=str) + "\n" for record in found)
    write_atomic(folder / "sweep.jsonl", lambda file: file.write(text.encode()))
    plot(found, folder / "sweep.png")
    print("\n".join(lines(found)))
    print(f"wrote {folder / 'sweep.jsonl'} and {folder / 'sweep.png'}")


if __name__ == "__main__":
    main()
