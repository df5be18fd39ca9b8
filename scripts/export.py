"""Write the weights of a run as one safetensors folder for sharing: no optimizer state, no paths, no pickle.

    python scripts/export.py from=outputs/imagenet_var out=exported/var
    hf upload <owner>/<name> exported/var

A generator's folder holds its tokenizer too, and a model card, README.md. `scripts/convert.py from=<run>` does the
same, beside published files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402


@entry("export", ROOT / "configs")
def main(config: Any) -> None:
    free(Path(config.out), config.overwrite, Path(config["from"]))
    export(Path(config["from"]), Path(config.out), weights=config.weights, trust=config.trust)
    print(f"wrote {config.out}")


def free(out: Path, overwrite: bool, source: Path) -> None:
    """Raise ValueError where `out` cannot be written, or holds a model that is not to be replaced: even with
    `overwrite`, `source` is not, the file or folder that is read."""
    check_place("out", out, folder=True)
    files = [out / name for name in ("config.json", "model.safetensors")]
    if any(file.exists() for file in files) and not overwrite:
        raise ValueError(f"{out} holds a model already; pass overwrite=true or another out=")
    if source.resolve() in [out.resolve(), *(file.resolve() for file in files)]:
        raise ValueError(f"out={out} would replace from={source}; pass another out=")


def export(run: Path, out: Path, *, weights: str = "ema", trust: Sequence[str] = ()) -> None:
    """Write one set of weights (ema or raw) of a run or .ckpt to the folder `out`, a generator's with its tokenizer."""
    from vgen.models import FAMILIES
    from vtok.checkpoint import find_checkpoint, is_folder, load_module, read_checkpoint, save_folder
    from vtok.config import Families

    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}: choose ema or raw")
    if is_folder(run):
        raise ValueError(f"{run} is an exported folder already; copy it")
    file, known = find_checkpoint(run), Families(FAMILIES, trust)
    checkpoint = read_checkpoint(file)
    described = checkpoint["module"]
    module = load_module(file, known, weights)
    extra = {"kind": described.get("kind"), "weights": weights}
    if described.get("class_names"):
        extra["class_names"] = list(described["class_names"])
    if extra["kind"] == "generator":
        tokenizer = load_module(file.parent.parent / "tokenizer", known)
        save_folder(tokenizer, out / "tokenizer", kind="tokenizer")
    save_folder(module, out, **extra)
    if extra["kind"] == "generator":
        from vgen.hub import model_card

        card = model_card(module, tokenizer, facts(file.parent.parent, int(checkpoint["global_step"]), weights))
        (out / "README.md").write_text(card)


def facts(run: Path, step: int, weights: str) -> dict[str, str]:
    """What a model card tells, by title: how a run was trained up to `step`, what the held-out set gave for these
    weights, and by which versions; no places of files. Nothing of a checkpoint that lies outside of its run."""
    from omegaconf import OmegaConf

    from vtok.loggers import read_rows

    if not (run / "config.yaml").is_file():
        return {}
    config = OmegaConf.load(run / "config.yaml")
    found = {
        "data": str(config.data.get("_target_", "")).rpartition(".")[2],
        "training": f"{step:,} of {config.steps:,} steps of {config.batch_size} images, learning rate "
        f"{config.optimizer.lr:g}, {config.precision}, seed {config.seed}; {weights} weights, ema {config.ema}",
    }
    name = "val/loss" if weights == "ema" else "val/loss_raw"
    if seen := [row for row in read_rows(run / "metrics.csv") if name in row and int(row["step"]) <= step]:
        found["held-out loss"] = f"{float(seen[-1][name]):.4g} at step {seen[-1]['step']}"
    if (run / "versions.json").is_file():
        by = json.loads((run / "versions.json").read_text())
        found["versions"] = ", ".join(f"{n} {by[n]}" for n in ("vtok-vgen", "torch", "git_commit") if by.get(n))
    return found


if __name__ == "__main__":
    main()
