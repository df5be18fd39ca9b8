"""`make photos`: both kinds of tokens on photographs (CIFAR-10), from the archive to a report, within a budget of time.

Per kind (next-token: 64 tokens; next-scale: 85): train a tokenizer, train a generator on its tokens, draw 1,000 images,
measure. Each training stage gets `budget` seconds: a short run of the same command is timed first, and the number of
steps, to which the learning-rate schedule is tied, follows from its speed. Held-out figures are on test/ only.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_number, check_place, entry  # noqa: E402

ARCHIVE = "cifar10-jpg.tar.xz"
PLACES = (".", "data", "../shared/data")  # where the archive is looked for, from the clone
STAGES = 9  # commands that `walk` runs

# (lowest, highest) of each figure of a kind; see the README.
WANTED = {
    "tokenizer_psnr": (20.0, None),
    "codebook_usage": (0.80, None),
    "loss_below_histogram": (0.2, None),
    "label_p_value": (None, 0.01),
    "class_accuracy": (0.30, None),
}


@dataclass(frozen=True)
class Kind:
    """One kind of layout: the names of its experiments and how its samples are drawn."""

    name: str
    tokenizer: str
    generator: str


KINDS = (
    Kind("next_token", "cifar10_tokenizer", "cifar10_llamagen"),
    Kind("next_scale", "cifar10_var_tokenizer", "cifar10_var"),
)


@entry("photos", ROOT / "configs", whole={"samples": 1}, numbers={"budget": (1, math.inf)}, lists=("kinds",))
def main(config: Any) -> None:
    from scripts.stages import Stages, curves, verdicts
    from vtok.checkpoint import write_json
    from vtok.data.cifar import Cifar10

    out = Path(config.out)
    check_place("out", out, folder=True)
    chosen = [config.kinds] if isinstance(config.kinds, str) else list(config.kinds)
    kinds = [kind for kind in KINDS if kind.name in chosen]
    if not kinds or len(kinds) < len(set(chosen)):
        raise ValueError(f"kinds={chosen}: choose from {', '.join(k.name for k in KINDS)}")
    for kind in kinds:
        if not isinstance(config.draw.get(kind.name), Mapping):
            raise ValueError(f"draw.{kind.name}={config.draw.get(kind.name)}: give {{guidance: .., top_k: ..}}")
        for name, value in config.draw[kind.name].items():
            check_number(f"draw.{kind.name}.{name}", value)
    stages = Stages(STAGES * len(kinds))
    folder = photographs(config.folder, config.archive, out / "data")
    print("decoding the photographs into outputs/cache (once)", flush=True)
    Cifar10(folder=str(folder), batch_size=1).setup()
    report: dict[str, Any] = {"budget": config.budget, "samples": config.samples}
    for kind in kinds:
        report[kind.name] = walk(kind, stages, config, out, folder, first=kind == kinds[0])
    panels = []
    for kind in kinds:
        panels.append((f"{kind.name}: PSNR in dB", out / kind.tokenizer / "metrics.csv", ["val/psnr"]))
        panels.append((f"{kind.name}: nats a token", out / kind.generator / "metrics.csv", ["train/loss", "val/loss"]))
    curves(out / "curves.png", panels)

    missed = []
    for kind in kinds:
        print(f"\n{kind.name}: figures on held-out photographs, and of {config.samples} samples")
        missed += [f"{kind.name}.{name}" for name in verdicts(report[kind.name], WANTED)]
        print(f"  FD[cifar] {report[kind.name]['FD[cifar]']:.3f}")
    report |= {"missed": missed, "seconds": stages.elapsed, "stage_seconds": stages.seconds}
    write_json(out / "report.json", report)
    print("\nPictures to look at:")
    for name in [f"{part}_{k.name}.png" for k in kinds for part in ("samples", "reconstructions")] + ["curves.png"]:
        print(f"  {out / name}")
    print(f"  {out / 'report.json'}")
    total = len(WANTED) * len(kinds)
    print(f"{total - len(missed)} of {total} figures as wanted; missed: {', '.join(missed) or 'none'}")


def walk(kind: Kind, stages: Any, config: Any, out: Path, folder: Path, *, first: bool) -> dict[str, Any]:
    """Train, draw and measure one kind; returns its part of the report. first: also measure the reference."""
    from scripts.stages import FULL_BUDGET, train_for

    images, name = [f"data.folder={folder}"], kind.name
    tokenizer, generator = out / kind.tokenizer, out / kind.generator
    more = [*images, f"tokenizer_from={tokenizer}"]
    steps = {
        "tokenizer": train_for(stages, tokenizer, [f"experiment={kind.tokenizer}", *images], config.budget),
        "generator": train_for(stages, generator, [f"experiment={kind.generator}", *more], config.budget),
    }
    samples, grid = out / f"samples_{name}.npz", out / f"samples_{name}.png"
    drawing = [f"from={generator}", f"seed={config.seed}", *(f"{k}={v}" for k, v in config.draw[name].items())]
    stages.run(f"{name}: draw", "sample.py", *drawing, f"num_images={config.samples}", f"out={samples}")
    stages.run(f"{name}: draw a grid", "sample.py", *drawing, "per_class=8", f"out={grid}")
    small = config.budget < FULL_BUDGET
    stages.run(
        f"{name}: measure the tokenizer", "-m", "eval.reconstruction", f"from={tokenizer}", "data=cifar10",
        *images, "extractor=cifar", f"images={2000 if small else 'null'}", f"out={tokenizer / 'reconstruction.json'}",
        f"grid={out / f'reconstructions_{name}.png'}",
    )  # fmt: skip
    stages.run(
        f"{name}: measure the likelihood", "-m", "eval.likelihood", f"from={generator}", "data=cifar10", *images,
        f"train_images={10000 if small else 'null'}", f"out={generator / 'likelihood.json'}",
    )  # fmt: skip
    statistics = out / "train_statistics.npz"
    reference = [f"reference={statistics}"]
    if first:  # statistics of an earlier call may be of other photographs
        reference = ["reference=train", "data=cifar10", *images, f"save_reference={statistics}"]
    stages.run(
        f"{name}: measure the samples", "-m", "eval.fid", f"samples={samples}", *reference, "extractor=cifar",
        "class_accuracy=true", f"out={generator / 'fid.json'}",
    )  # fmt: skip
    return figures(tokenizer, generator) | {"steps": steps}


def photographs(folder: str | None, archive: str | None, target: Path) -> Path:
    """The folder with train/ and test/: the given one, or the unpacked archive (unpacked once)."""
    from vtok.data.archive import unpack

    if folder:
        if not (Path(folder) / "train").is_dir():
            raise ValueError(f"folder={folder} holds no train/: pass DATA=<folder with train/ and test/> to make")
        return Path(folder).resolve()
    found = [Path(archive)] if archive else [ROOT / place / ARCHIVE for place in PLACES]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"no {archive or ARCHIVE}: pass DATA=<folder with train/ and test/> to make, or archive=<file>"
        )
    done = target / ".unpacked"
    if not done.is_file():
        print(f"unpacking {path} to {target}", flush=True)
        print(f"{unpack(path, target)} files", flush=True)
        done.write_text(f"{path.name}\n")
    return target.resolve()


def figures(tokenizer: Path, generator: Path) -> dict[str, Any]:
    """The report of one kind, from the JSON files of its evaluations."""
    codes = json.loads((tokenizer / "reconstruction.json").read_text())
    likelihood = json.loads((generator / "likelihood.json").read_text())
    drawn = json.loads((generator / "fid.json").read_text())["metrics"]
    metrics = codes["metrics"]
    return {
        "tokenizer_psnr": metrics["psnr_mean"],
        "tokenizer_ssim": metrics["ssim_gauss11"],
        "codebook_usage": metrics["codebook_usage"],
        "codebook_perplexity": metrics["codebook_perplexity"],
        "bits_per_image": metrics["bits_per_image"],
        "rFD[cifar]": metrics["rFD[cifar]"],
        "held_out_images": codes["images"],
        "held_out_loss": likelihood["held_out"],
        "histogram_entropy": likelihood["histogram"],
        "loss_below_histogram": likelihood["below_histogram"],
        "shuffled_label_loss": likelihood["shuffled"],
        "label_p_value": likelihood["labels"]["p_value"],
        "label_sign_p_value": likelihood["labels"]["sign_p_value"],
        "class_accuracy": drawn["class_accuracy[cifar]"],
        "FD[cifar]": drawn["FD[cifar]"],
        "IS[cifar]": drawn["IS[cifar]"],
    }


if __name__ == "__main__":
    main()
