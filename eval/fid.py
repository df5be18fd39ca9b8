"""`python -m eval.fid`: Frechet distance and Inception score of samples against a reference, with the protocol.

    python -m eval.fid samples=samples.npz reference=val data=digits
    python -m eval.fid from=outputs/my_run images=10000 guidance=1.5 reference=statistics.npz

The number is called FID only with the 2015 Inception network (Heusel et al. 2017, arXiv 1706.08500); with another
extractor it is FD[its name]. Images go from the generator straight into float64 moments: no files between.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.features import Extractor, make_extractor
from eval.manifold import density_coverage, precision_recall
from eval.moments import InceptionScore, Moments, Statistics, frechet_distance
from eval.progress import progress_bar
from eval.protocol import Protocol, library_versions, metric_name
from eval.sources import Images, from_data, from_run, npz_names, open_images
from vtok.checkpoint import file_hash, write_json
from vtok.cli import entry

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULT_IMAGES = 1000  # drawn from a run when `images` is not given
DATA_SPLITS = ("train", "val")


@dataclass
class Measured:
    """What one pass over images gives. right: share whose label the extractor's classifier names, if it was asked."""

    moments: Moments
    spatial: Moments | None
    score: InceptionScore | None
    right: float | None


def measure(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int,
    splits: int | None = None,
    permutation: int = 2020,
    class_accuracy: bool = False,
    keep: np.ndarray | None = None,
    text: str = "features",
) -> Measured:
    """One pass: moments, with `splits` also the Inception score, with `class_accuracy` also right labels.

    keep: array [count, dim] that gets the features (a memory map, where they do not fit in memory).
    """
    moments = Moments(extractor.dim)
    spatial = Moments(extractor.spatial_dim) if extractor.spatial_dim else None
    score = InceptionScore(images.count, splits=splits, seed=permutation) if splits else None
    right = start = 0
    with progress_bar(text, images.count) as advance:
        for batch in images.batches(batch_size):
            features, logits, places = extractor(batch)
            moments.add(features)
            if spatial is not None:
                spatial.add(places)
            if keep is not None:
                keep[start : start + len(batch)] = features.cpu().numpy()
            index = torch.arange(start, start + len(batch))
            if score is not None:
                score.add(index, logits)
            if class_accuracy:
                right += int((logits.argmax(1).cpu() == images.labels[index]).sum())
            start += len(batch)
            advance(len(batch))
    return Measured(moments, spatial, score, right / images.count if class_accuracy else None)


def reference_statistics(
    reference: str, data: Any | None, extractor: Extractor, *, batch_size: int
) -> tuple[Statistics, str, str]:
    """Statistics of the other side, its description and a hash that identifies it.

    reference: npz of statistics (ours, ADM's, MAR's), npz of images, folder, or train | val of the data config.
    """
    if reference in DATA_SPLITS:
        if data is None:
            raise ValueError(
                f"reference={reference} is a split of a data set: add data=<config>, for example data=digits"
            )
        return _fresh(from_data(data, reference), extractor, batch_size)
    path = Path(reference)
    if path.suffix != ".npz":
        return _fresh(open_images(path), extractor, batch_size)
    names = npz_names(path)
    if not {"mu", "sigma"} <= set(names):
        return _fresh(open_images(path), extractor, batch_size)
    found = Statistics.load(path)
    if len(found.mu) == extractor.dim:
        if found.about.get("hash", extractor.hash) != extractor.hash:
            raise ValueError(
                f"{path} was made with {found.about.get('feature')} {found.about['hash'][:12]}, this is "
                f"{extractor.name} {extractor.hash[:12]}; change reference or extractor"
            )
        return found, str(path), file_hash(path)
    if "arr_0" not in names:
        raise ValueError(
            f"{path} holds statistics of {len(found.mu)} features, {extractor.name} has {extractor.dim}; "
            "change reference or extractor"
        )
    print(f"{path}: its statistics are not of {extractor.name}, so its images are used")
    return _fresh(open_images(path), extractor, batch_size)


def _fresh(images: Images, extractor: Extractor, batch_size: int) -> tuple[Statistics, str, str]:
    measured = measure(images, extractor, batch_size=batch_size, text="reference")
    statistics = measured.moments.statistics(
        feature=extractor.name,
        hash=extractor.hash,
        resize=extractor.resize,
        source=images.name,
        file_format=images.file_format,
    )
    statistics.spatial = measured.spatial.statistics() if measured.spatial else None
    digest = statistics_hash(statistics)
    return statistics, images.name, digest


def reference_images(reference: str, data: Any | None) -> Images:
    """The images behind `reference`, for what needs more than statistics. ValueError where it has none."""
    if reference in DATA_SPLITS:
        return from_data(data, reference)
    path = Path(reference)
    if path.suffix == ".npz" and "arr_0" not in npz_names(path):
        raise ValueError(f"manifold=true needs the images of reference={reference}, which holds statistics only")
    return open_images(path)


class FeatureFile:
    """Features [count, dim] float32 in a memory-mapped file beside the result; its size is printed first."""

    def __init__(self, config: Mapping[str, Any], part: str, count: int, dim: int) -> None:
        self.path = Path(config["out"] or default_out(config)).with_suffix(f".{part}.features")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        print(
            f"manifold=true keeps {count} x {dim} features in {self.path} ({count * dim * 4 / 2**20:.0f} MB) meanwhile"
        )
        self.array = np.memmap(self.path, np.float32, "w+", shape=(count, dim))

    def remove(self) -> None:
        del self.array
        self.path.unlink()


def statistics_hash(statistics: Statistics) -> str:
    """SHA-256 of mean and covariance: names a reference whose images were read here."""
    from vtok.checkpoint import weights_hash

    return weights_hash({"mu": statistics.mu, "sigma": statistics.sigma})


def samples_of(config: Mapping[str, Any], device: torch.device) -> tuple[Images, dict[str, Any]]:
    """The images to judge, and the protocol's fields that say how they came about."""
    given = [key for key in ("samples", "from") if config[key]]
    if len(given) != 1:
        raise ValueError("give exactly one of samples=<npz or folder> and from=<run or exported folder>")
    if config["samples"]:
        images = open_images(config["samples"]).first(config["images"])
        facts = {
            "seed": None,
            "guidance": None,
            "rule": None,
            "weights": None,
            "labels": "given",
            "rounding": "as stored",
        }
        return images, {**facts, "source": images.name}
    from vgen.guidance import guidance
    from vgen.heads import DrawRule
    from vgen.pipeline import Pipeline
    from vgen.sampling import checkpoint_hash, resolve_dtype

    pipeline = Pipeline.load(
        config["from"],
        weights=config["weights"],
        tokenizer=config["tokenizer_from"],
        device=device,
        dtype=resolve_dtype(config["dtype"]),
        chunk=int(config["chunk"]),
    )
    rule = DrawRule(float(config["temperature"]), int(config["top_k"]), float(config["top_p"]))
    scale, schedule, options = float(config["guidance"]), config["schedule"], dict(config["schedule_options"])
    images = from_run(
        pipeline,
        name=str(config["from"]),
        count=int(config["images"] or DEFAULT_IMAGES),
        plan=config["labels"],
        seed=int(config["seed"]),
        guidance=guidance(scale, schedule, **options),
        rule=rule,
    )
    extra = "".join(f", {k} {v}" for k, v in options.items())
    facts = {
        "seed": int(config["seed"]),
        "guidance": f"{schedule} {scale:g}{extra}",
        "rule": f"temperature {rule.temperature:g}, top_k {rule.top_k}, top_p {rule.top_p:g}, chunk {config['chunk']}, "
        f"{config['dtype']}",
        "weights": config["weights"],
        "labels": config["labels"] if pipeline.generator.num_classes else "none",
        "rounding": "nearest",
        "source": f"{config['from']} (checkpoint sha256 {checkpoint_hash(config['from'])})",
    }
    return images, facts


def evaluate(config: Mapping[str, Any], data: Any | None = None) -> dict[str, Any]:
    """The command: measures, prints, writes JSON to `out`; returns what it wrote."""
    from vgen.sampling import resolve_device

    device = resolve_device(config["device"])
    extractor = make_extractor(config["extractor"], weights_path=config["weights_path"], device=device)
    images, facts = samples_of(config, device)
    if config["class_accuracy"] and (images.labels is None or extractor.classes is None):
        raise ValueError("class_accuracy=true needs labels of the samples and extractor=cifar")
    batch = int(config["batch_size"])
    statistics, reference, digest = reference_statistics(str(config["reference"]), data, extractor, batch_size=batch)
    if config["save_reference"]:
        statistics.save(config["save_reference"])
    splits, permutation = min(int(config["splits"]), images.count), int(config["permutation"])
    kept = None
    if config["manifold"]:  # the reference's images: statistics alone have no neighbours
        real = reference_images(str(config["reference"]), data)
        kept = [
            FeatureFile(config, part, n, extractor.dim) for part, n in (("real", real.count), ("made", images.count))
        ]
    measured = measure(
        images,
        extractor,
        batch_size=batch,
        splits=splits,
        permutation=permutation,
        class_accuracy=bool(config["class_accuracy"]),
        keep=kept[1].array if kept else None,
        text="samples",
    )
    protocol = Protocol(
        name="custom",
        images=images.count,
        resize=extractor.resize,
        file_format=images.file_format,
        reference=reference,
        reference_images=statistics.n,
        reference_hash=digest,
        splits=splits,
        permutation=permutation,
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        batch_size=batch,
        device=device.type,
        versions=library_versions(),
        **facts,
    )
    distance = frechet_distance(measured.moments.statistics(), statistics)
    metrics: dict[str, Any] = {
        metric_name("FID", extractor.name): distance,
        metric_name("IS", extractor.name): measured.score.result(),
    }
    if measured.spatial is not None and statistics.spatial is not None:
        metrics[metric_name("sFID", extractor.name)] = frechet_distance(
            measured.spatial.statistics(), statistics.spatial
        )
    if kept:
        measure(real, extractor, batch_size=batch, keep=kept[0].array, text="neighbours of the reference")
        clouds = [torch.from_numpy(part.array).to(device) for part in kept]
        figures = precision_recall(*clouds) | density_coverage(*clouds)
        metrics |= {f"{key}[{extractor.name}]": value for key, value in figures.items()}
        metrics["manifold_images"] = {"real": real.count, "generated": images.count}
        for part in kept:
            part.remove()
    if measured.right is not None:
        metrics[f"class_accuracy[{extractor.name}]"] = measured.right
    reasons = protocol.adm_reasons()
    result = {
        "metrics": metrics,
        "protocol": protocol.to_json(),
        "adm_comparable": not reasons,
        "not_comparable_because": reasons,
        "command": "python -m eval.fid " + " ".join(sys.argv[1:]),
    }
    show(metrics, protocol, reasons)
    out = Path(config["out"] or default_out(config))
    write_json(out, result)
    print(f"wrote {out}")
    return result


def show(metrics: Mapping[str, Any], protocol: Protocol, reasons: list[str]) -> None:
    for name, value in metrics.items():
        if name == "manifold_images":
            print(f"  (precision and the like: {value['generated']} generated against {value['real']} real images)")
        elif isinstance(value, dict):
            print(
                f"{name} {value['mean']:.4f} +- {value['std']:.4f} ({protocol.splits} splits), "
                f"{value['one_split']:.4f} as one split"
            )
        else:
            print(f"{name} {value:.4f}")
    print(f"protocol {protocol.name}")
    print("\n".join(protocol.lines()[1:]))
    if reasons:
        print("not comparable with the FID-50k of ImageNet papers: " + "; ".join(reasons))


def default_out(config: Mapping[str, Any]) -> Path:
    """<run>/eval/fid.json for a run, <samples>.fid.json beside files."""
    if config["samples"]:
        path = Path(config["samples"])
        return path.with_name(path.name.removesuffix(".npz") + ".fid.json")
    path = Path(config["from"])
    return (path if path.is_dir() else path.parent) / "eval" / "fid.json"


@entry("eval_fid", CONFIGS)
def main(config: Any) -> None:
    from vtok.config import instantiate

    evaluate(config, instantiate(config.data) if str(config.reference) in DATA_SPLITS and config.data else None)


if __name__ == "__main__":
    main()
