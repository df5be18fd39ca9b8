"""`python -m eval.fid`: Frechet distance and Inception score of samples against a reference, with the protocol.

    python -m eval.fid samples=samples.npz reference=val data=digits
    python -m eval.fid from=outputs/my_run protocol=adm guidance=1.5
    python -m eval.fid from=zoo:var-d16 protocol=adm           with the settings of the paper, printed
    python -m eval.fid from=outputs/my_run images=10000 guidance=1.5 reference=statistics.npz

The number is called FID only with the 2015 Inception network (Heusel et al. 2017, arXiv 1706.08500); with another
extractor it is FD[its name]. Images go from the generator straight into float64 moments: no files between. A job that
was killed goes on where it was; several processes share it as in scripts/cache_codes.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.blocks import Job
from eval.drawing import results_folder, samples_of
from eval.features import Extractor, make_extractor
from eval.kernel import kernel_distance
from eval.manifold import density_coverage, precision_recall
from eval.measure import Measured
from eval.moments import frechet_distance
from eval.presets import settle
from eval.protocol import Protocol, library_versions, metric_name
from eval.references import DATA_SPLITS, described, find, reference_images, statistics_hash
from eval.sources import Images, npz_names
from vtok.checkpoint import file_hash, weights_hash, write_json
from vtok.cli import check_json, check_numbers, check_place, entry

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class FeatureFile:
    """Features [count, dim] float32 in a memory-mapped file beside the result."""

    def __init__(self, out: Path, part: str, count: int, dim: int) -> None:
        self.path = out.with_suffix(f".{part}.features")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.array = np.memmap(self.path, np.float32, "w+", shape=(count, dim))

    def remove(self) -> None:
        del self.array
        self.path.unlink(missing_ok=True)


def evaluate(
    config: Mapping[str, Any],
    data: Any | None = None,
    *,
    pipeline: Any | None = None,
    real: Images | None = None,
    reference_parts: Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The command: measures, prints, writes JSON to `out`; returns what it wrote.

    None where other tasks of the same job are not done yet: the last one to finish writes. pipeline: of `from`, where
    it is loaded already. real: the images of a `reference` that is a split of `data`, where they are listed already.
    reference_parts: folder of what is measured of the reference's images, which stays: other evaluations against them
    go on from it. notes: more that the JSON keeps.
    """
    from vgen.sampling import resolve_device
    from vtok.data.tasks import task_from_environment

    config = settle(config)
    check_numbers(config)
    out = Path(config["out"] or default_out(config)) if config["samples"] or config["from"] else None
    if out is not None:
        check_json("out", out)
    check_saved(config)
    task = task_from_environment(config.get("task_id"), config.get("num_tasks"), os.environ)
    device = resolve_device(config["device"])
    extractor = make_extractor(config["extractor"], weights_path=config["weights_path"], device=device)
    images, facts = samples_of(config, device, pipeline)
    if config["class_accuracy"] and (images.labels is None or extractor.classes is None):
        raise ValueError("class_accuracy=true needs labels of the samples and extractor=cifar")
    statistics, real = (None, real) if real else find(str(config["reference"]), data, extractor)
    clouds = bool(config["manifold"] or config.get("kid"))
    if real is None and clouds:  # statistics alone have no neighbours
        why = "manifold=true" if config["manifold"] else "kid=true"
        real = reference_images(str(config["reference"]), data, why=why)
    parts = out.with_suffix(".parts")
    if config.get("overwrite"):
        if task[1] > 1:
            raise ValueError(f"overwrite=true would drop the parts of the other tasks; delete {parts} instead")
        shutil.rmtree(parts, ignore_errors=True)
    batch, splits = int(config["batch_size"]), min(int(config["splits"]), images.count)
    splits = splits if getattr(extractor, "has_logits", True) else None  # no classes, no Inception score
    common = dict(batch_size=batch, size=config.get("block"), keep=clouds, task=task)
    versions = library_versions()
    jobs = {
        "made": Job(
            images, extractor, parts / "samples", about=facts | {"device": device.type, "versions": versions},
            splits=splits, permutation=int(config["permutation"]), class_accuracy=bool(config["class_accuracy"]),
            text="samples", **common,
        )
    }  # fmt: skip
    if real is not None:
        about = {"device": device.type, "versions": versions}
        kept = reference_parts or parts / "reference"
        jobs["real"] = Job(real, extractor, kept, about=about, text="reference", **common)
    if clouds:
        counts = " and ".join(f"{job.images.count} x {extractor.dim}" for job in jobs.values())
        size = 2 * sum(4 * job.images.count * extractor.dim for job in jobs.values()) / 2**20
        print(f"manifold=true or kid=true keeps {counts} features beside {out} ({size:.0f} MB) meanwhile")
    need = sum(job.bytes() for job in jobs.values())
    if need > 2**28:
        print(f"parts of the job take up to {need / 2**30:.1f} GB in {parts}; they are removed at the end")
    if not all([job.run() for job in jobs.values()]):
        print(f"task {task[0]} of {task[1]} has done its share; the last one to finish writes {out}")
        return None
    try:
        result = finish(config, jobs, extractor, statistics, facts, splits, versions, out, notes)
    except FileNotFoundError:
        if task[1] > 1 and out.is_file():  # another task was faster, and has removed the parts
            print(f"another task wrote {out}")
            return json.loads(out.read_text())
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return result


def check_saved(config: Mapping[str, Any]) -> None:
    """Raise ValueError where `save_reference` cannot be written, or would replace anything but other statistics."""
    check_place("save_reference", path := config.get("save_reference"))
    if path is None or not Path(path).exists():
        return
    read = [Path(config[name]).resolve() for name in ("reference", "samples") if config.get(name)]
    try:
        held = {"mu", "sigma"} <= set(npz_names(path))
    except ValueError:
        held = False
    if not held or Path(path).resolve() in read:
        raise ValueError(f"save_reference={path} is there and would be lost: give another save_reference=")


def finish(
    config: Mapping[str, Any],
    jobs: Mapping[str, Job],
    extractor: Extractor,
    statistics: Any,
    facts: Mapping[str, Any],
    splits: int | None,
    versions: dict[str, str],
    out: Path,
    notes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """From complete jobs to the result: metrics, protocol, JSON."""
    from vgen.sampling import published_evaluation

    files = {}
    if config["manifold"] or config.get("kid"):
        files = {name: FeatureFile(out, name, job.images.count, extractor.dim) for name, job in jobs.items()}
    try:
        measured = {name: job.merge(files[name].array if files else None) for name, job in jobs.items()}
        if statistics is None:
            real = jobs["real"].images
            statistics = described(measured["real"], real, extractor)
            reference, digest = real.name, statistics_hash(statistics)
        else:
            reference = str(config["reference"])
            digest = file_hash(reference)
        if config["save_reference"]:
            statistics.save(config["save_reference"])
        images = jobs["made"].images
        protocol = Protocol(
            name=config["protocol"],
            images=images.count,
            resize=extractor.resize,
            file_format=images.file_format,
            reference=reference,
            reference_images=statistics.n,
            reference_hash=digest,
            splits=splits or 0,
            permutation=int(config["permutation"]),
            extractor=extractor.name,
            extractor_hash=extractor.hash,
            batch_size=int(config["batch_size"]),
            device=jobs["made"].about["device"],
            versions=versions,
            score_order=config["order"],
            **facts,
        )
        metrics = figures(config, measured["made"], statistics, extractor)
        if files:
            metrics |= neighbourhoods(config, measured["real"], measured["made"], extractor)
    finally:
        for file in files.values():
            file.remove()
    reasons = protocol.adm_reasons()
    result = {
        "metrics": metrics,
        "protocol": protocol.to_json(),
        "adm_comparable": not reasons,
        "not_comparable_because": reasons,
        "moments_sha256": moments_hash(measured["made"]),
        "command": "python -m eval.fid " + " ".join(sys.argv[1:]),
        **(notes or {}),
    }
    show(metrics, protocol, reasons)
    published = published_evaluation(str(config["from"]))
    if published:  # what the zoo says, beside what was measured
        result["published"] = published
        score = f", IS {published['inception_score']}" if published["inception_score"] else ""
        print(f"reported: FID {published['fid']}{score} ({published['evaluator']}; {published['source']})")
    write_json(out, result)
    print(f"wrote {out}")
    if config.get("wandb"):
        log_wandb(config["wandb"], result)
    return result


def figures(config: Mapping[str, Any], made: Measured, statistics: Any, extractor: Extractor) -> dict[str, Any]:
    """Distances, Inception score, class accuracy."""
    name = extractor.name
    metrics: dict[str, Any] = {
        metric_name("FID", name): frechet_distance(made.moments.statistics(), statistics),
    }
    if made.score is not None:
        metrics[metric_name("IS", name)] = inception_scores(made, config["order"])
    if made.spatial is not None and statistics.spatial is not None:
        metrics[metric_name("sFID", name)] = frechet_distance(made.spatial.statistics(), statistics.spatial)
    if made.right is not None:
        metrics[f"class_accuracy[{name}]"] = made.right
    return metrics


def moments_hash(made: Measured) -> str:
    """SHA-256 over the bits of all sums: two passes with the same one saw the same features of as many images."""
    arrays = {k: torch.from_numpy(np.atleast_1d(v)) for k, v in made.arrays().items() if k != "features"}
    return weights_hash(arrays)


def inception_scores(made: Measured, order: str) -> dict[str, float]:
    """mean and std in the protocol's order, the value as one split, and the mean and std in the other order."""
    permuted, file = made.score.result(), made.file_order.result()
    main, other, name = (permuted, file, "file_order") if order == "permuted" else (file, permuted, "permuted")
    return {**main, name: other["mean"], f"{name}_std": other["std"]}


def neighbourhoods(config: Mapping[str, Any], real: Measured, made: Measured, extractor: Extractor) -> dict[str, Any]:
    """What needs the features of both sides."""
    device = getattr(extractor, "device", torch.device("cpu"))
    a, b = (torch.from_numpy(side.features).to(device) for side in (real, made))
    found: dict[str, Any] = {}
    if config["manifold"]:
        found |= precision_recall(a, b) | density_coverage(a, b)
    if config.get("kid"):
        found |= kernel_distance(a, b)
    found = {f"{key}[{extractor.name}]": value for key, value in found.items()}
    return found | {"manifold_images": {"real": len(a), "generated": len(b)}}


def show(metrics: Mapping[str, Any], protocol: Protocol, reasons: list[str]) -> None:
    for name, value in metrics.items():
        if name == "manifold_images":
            print(f"  (precision and the like: {value['generated']} generated against {value['real']} real images)")
        elif isinstance(value, dict):
            other = next(k for k in ("file_order", "permuted") if k in value)
            print(
                f"{name} {value['mean']:.4f} +- {value['std']:.4f} ({protocol.splits} splits, {protocol.score_order}), "
                f"{value[other]:.4f} {other.replace('_', ' ')}, {value['one_split']:.4f} as one split"
            )
        else:
            print(f"{name} {value:.4f}")
    print(f"protocol {protocol.name}")
    print("\n".join(protocol.lines()[1:]))
    if reasons:
        print("not comparable with the FID-50k of ImageNet papers: " + "; ".join(reasons))


def log_wandb(project: str, result: Mapping[str, Any]) -> None:
    """Metrics and protocol as a run of its own at W&B (WANDB_MODE=offline works)."""
    import wandb

    protocol = dict(result["protocol"])
    flat = {k: v["mean"] if isinstance(v, dict) and "mean" in v else v for k, v in result["metrics"].items()}
    run = wandb.init(project=project, job_type="eval", config={"protocol": protocol, "command": result["command"]})
    run.log({f"eval/{k}": v for k, v in flat.items() if isinstance(v, (int, float))})
    run.finish()


def default_out(config: Mapping[str, Any]) -> Path:
    """<run>/eval/fid.json for a run, <samples>.fid.json beside files."""
    if config["samples"]:
        path = Path(config["samples"])
        return path.with_name(path.name.removesuffix(".npz") + ".fid.json")
    return results_folder(str(config["from"])) / "fid.json"


@entry("eval_fid", CONFIGS)
def main(config: Any) -> None:
    from vtok.config import instantiate

    evaluate(config, instantiate(config.data) if str(config.reference) in DATA_SPLITS and config.data else None)


if __name__ == "__main__":
    main()
