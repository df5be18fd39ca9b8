"""`make demo`: a tokenizer and a generator on the digits, from nothing to a report, by the commands a user would type.

Writes samples.png, reconstructions.png, curves.png, samples.npz, reconstructions.npz and report.json to `out`. How each
figure is defined: eval/neighbours.py, eval/pixels.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402

# (lowest, highest) of each figure; see the README.
WANTED = {
    "tokenizer_psnr": (24.0, None),
    "class_accuracy": (0.90, None),
    "class_accuracy_below_real": (None, 0.08),
    "spread": (0.85, 1.15),
    "nearest": (0.7, 1.35),
    "coverage": (0.85, None),
    "bits_per_image": (None, 160.0),
    "total_seconds": (None, 900.0),
}


@entry("demo", ROOT / "configs")
def main(config) -> None:
    from scripts.stages import Stages, curves, overrides, verdicts
    from vgen.heads import DrawRule
    from vtok.checkpoint import write_json

    out = Path(config.out)
    check_place("out", out, folder=True)
    DrawRule(config.temperature, config.top_k, config.top_p)  # or what is wrong with them, before the trainings
    tokenizer, generator = out / "tokenizer", out / "generator"
    drawing = [f"from={generator}", f"seed={config.seed}", f"guidance={config.guidance}"]
    drawing += [f"temperature={config.temperature}", f"top_k={config.top_k}", f"top_p={config.top_p}"]
    stages = Stages(6)
    stages.run(
        "train the tokenizer", "train.py", "experiment=digits_tokenizer", f"run_dir={tokenizer}", "overwrite=true",
        *overrides(config.tokenizer),
    )  # fmt: skip
    stages.run(
        "train the generator", "train.py", "experiment=digits_llamagen", f"run_dir={generator}",
        f"tokenizer_from={tokenizer}", "overwrite=true", *overrides(config.generator),
    )  # fmt: skip
    stages.run("draw samples", "sample.py", *drawing, f"per_class={config.per_class}", f"out={out / 'samples.npz'}")
    stages.run("draw a grid", "sample.py", *drawing, "per_class=8", f"out={out / 'samples.png'}")
    stages.run(
        "measure the tokenizer", "-m", "eval.reconstruction", f"from={tokenizer}", "data=digits", "extractor=none",
        f"out={out / 'tokenizer.json'}", f"npz={out / 'reconstructions.npz'}", f"grid={out / 'reconstructions.png'}",
    )  # fmt: skip
    stages.run(
        "measure the samples", "-m", "eval.neighbours", f"samples={out / 'samples.npz'}", f"out={out / 'samples.json'}"
    )
    curves(
        out / "curves.png",
        [
            ("tokenizer: loss", tokenizer / "metrics.csv", ["train/loss", "val/loss"]),
            ("tokenizer: PSNR in dB", tokenizer / "metrics.csv", ["val/psnr"]),
            ("generator: nats a token", generator / "metrics.csv", ["train/loss", "val/loss"]),
        ],
    )

    codes = json.loads((out / "tokenizer.json").read_text())["metrics"]
    drawn = json.loads((out / "samples.json").read_text())
    set_up = float(os.environ.get("SET_UP_SECONDS", 0))
    report = {
        "tokenizer_psnr": codes["psnr_mean"],
        "tokenizer_ssim": codes["ssim_gauss11"],
        "codebook_usage": codes["codebook_usage"],
        "codebook_perplexity": codes["codebook_perplexity"],
        "bits_per_image": codes["bits_per_image"],
        **drawn,
        "class_accuracy_below_real": drawn["real_class_accuracy"] - drawn["class_accuracy"],
        "seconds": stages.elapsed,
        "set_up_seconds": set_up,
        "total_seconds": stages.elapsed + set_up,
        "stage_seconds": stages.seconds,
    }
    print(f"\nFigures, held-out digits and {config.per_class} samples a class:")
    missed = verdicts(report, WANTED)
    print(f"  at best, {drawn['real_coverage']:.4f} of held-out digits are covered by as many real training digits")
    write_json(out / "report.json", report | {"missed": missed})
    print("\nPictures to look at:")
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        print(f"  {out / name}")
    print(f"  {out / 'report.json'}")
    print(f"{len(WANTED) - len(missed)} of {len(WANTED)} figures as wanted; missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
