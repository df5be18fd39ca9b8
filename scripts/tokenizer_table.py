"""Every tokenizer family, small, trained on the same photographs for the same time: the rows of docs/tokenizers.md.

    python scripts/tokenizer_table.py                 all rows that are not there yet
    python scripts/tokenizer_table.py titok var       these families only
    python scripts/tokenizer_table.py --overfit var   16 photographs at 128 px, 1,500 steps at most

A finished row is one JSON file in docs/tables/tokenizers and is skipped; remove it to measure again. All figures are on
images that were not trained on (but for --overfit). Rows: 32 px CIFAR-10, and 128 px of the ImageNet sample (the first
900 pictures by sorted name train, the last 100 test).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.studies import sections  # noqa: E402
from scripts.tables import OVERFIT, TESTED, TRAINED, Column, commit, data_options, markdown, photographs, rows  # noqa: E402
from vtok.acceleration import cpu_has_bf16  # noqa: E402

ROWS_AT = ROOT / "docs" / "tables" / "tokenizers"
STUDIES_AT = ROOT / "docs" / "tables" / "studies"  # of scripts/tokenizer_study.py
PAGE = ROOT / "docs" / "tokenizers.md"
RUNS = Path("outputs/tables/tokenizers")
BUDGET = 600.0  # seconds on one core: 10 CPU-minutes

# options of train.py that all rows share, and those of a family; a later one wins
SHARED = ["batch_size=64", "optimizer={lr: 1e-3, betas: [0.9, 0.95], weight_decay: 0.0, eps: 1e-8}", "ema=0.995"]
# transformers: more steps, of cheaper products where the core has them
VIT = ["batch_size=32", f"precision={'bf16-mixed' if cpu_has_bf16() else '32-true'}", "optimizer.lr=2e-3"]
MILLION = ["tokenizer.multipliers=[1,2,6]", "optimizer.lr=2e-3"]  # to have at least 1 M parameters
FAMILIES: dict[str, list[str]] = {
    "cnn_vq": ["tokenizer=cnn_vq_small", *MILLION],
    "fsq": ["tokenizer=cnn_fsq_small", *MILLION],
    "ifsq": ["tokenizer=ifsq_small", "optimizer.lr=2e-3"],
    "lfq": ["tokenizer=lfq_small"],
    "bsq": ["tokenizer=bsq_small"],
    "ibq": ["tokenizer=ibq_small", "batch_size=16"],
    "kl": ["tokenizer=kl_small"],
    "var": ["tokenizer=var_small", *MILLION],
    "flexvar": ["tokenizer=flexvar_small"],
    "titok": ["tokenizer=titok_small", *VIT],
    "hita": ["tokenizer=hita_small"],
    "gigatok": ["tokenizer=gigatok_small", *VIT],
    "restok": ["tokenizer=restok_small", *VIT, "batch_size=8", "optimizer.lr=1e-3", "schedule.warmup=0.2"],
    "retok": ["tokenizer=retok_small", *VIT, "batch_size=16"],
    # a flow of few registers learns from its one-step estimate; few images a step, since every step is dear
    "flextok": ["tokenizer=flextok_small", *VIT, "batch_size=8", "optimizer.lr=1e-3", "objective.pixel_weight=4"],
    "detailflow": [
        "tokenizer=detailflow_small",
        *VIT,
        "batch_size=8",
        "tokenizer.depth=3",
        "tokenizer.decoder_depth=3",
    ],
    "dar": ["tokenizer=dar_small", *VIT, "batch_size=8", "optimizer.lr=1e-3", "objective.pixel_weight=16"],
}
# What 128 px need beside the options above: small batches, and few channels where there are many pixels. Convolutions
# keep their stride of 4, so 32 x 32 tokens. Those that take any size train on windows: more pictures in the time.
FOUR = ["tokenizer.channels=16", "tokenizer.multipliers=[1,2,6]", "batch_size=2"]
WINDOWS = [*FOUR, "batch_size=8", "data.window=32"]
# MAGVIT-v2's decoder is normed by statistics of all tokens, which those of a small window are unlike
WIDER = [*FOUR, "batch_size=4", "data.window=64", "optimizer.lr=2e-3", "objective.pixel_weight=10"]
SIXTEEN = ["channels=8", "multipliers=[1,2,4,8,16]", "groups=4"]  # 8 x 8 cells
WIDE = ["tokenizer.encoder=[192,4,6]", "tokenizer.decoder=[192,4,6]"]
LARGE: dict[str, list[str]] = {
    **dict.fromkeys(("cnn_vq", "fsq", "ifsq", "kl"), WINDOWS),
    # these weigh the losses of their codes so that pixels come late, and colours not at all
    **dict.fromkeys(("lfq", "bsq"), WIDER),
    "ibq": [*WINDOWS, "optimizer.lr=2e-3", "objective.pixel_weight=60"],
    "hita": FOUR,
    "var": [*FOUR, "tokenizer.quantizer.sides=[1,2,4,8,16,32]", "objective.pixel_weight=10"],
    "flexvar": [
        *WINDOWS, "tokenizer.quantizer.sides=[1,2,4,8,16,32]", VIT[1], "optimizer.lr=4e-3", "objective.pixel_weight=4",
    ],
    "titok": [
        *WIDE, "tokenizer.tokens=128", "tokenizer.head.dim=192", "tokenizer.head.patch=16",
        "tokenizer.quantizer.vocab_size=4096", "batch_size=8",
    ],
    "gigatok": [*(f"tokenizer.{option}" for option in SIXTEEN), "batch_size=4"],
    "restok": [*(f"tokenizer.{option}" for option in SIXTEEN), "tokenizer.width=64", "batch_size=4"],
    "retok": [*(f"tokenizer.network.{option}" for option in SIXTEEN), "batch_size=4"],
    # a flow's width must not be below the 192 numbers of its patches: it has their noise to say
    "flextok": ["tokenizer.patch=8", "tokenizer.decoder_dim=256", "tokenizer.decoder_depth=3", "batch_size=4"],
    "detailflow": ["tokenizer.patch=16", "tokenizer.tokens=32", "tokenizer.group=4", "batch_size=8"],
    "dar": [
        "tokenizer.patch=16", "tokenizer.flow_patch=8", "tokenizer.flow_dim=256", "tokenizer.flow_depth=3",
        "tokenizer.flow_heads=8", "batch_size=4",
    ],
}  # fmt: skip
SECOND = ("cnn_vq", "fsq", "ifsq", "lfq", "bsq", "ibq", "kl", "flexvar")  # of the table at 128 px
# Of --overfit, beside those: few steps must do, so that each has many pictures, products as cheap as the core has them,
# and more bits a token; pixels weigh more, since colours come last.
PHOTOS = [
    *WINDOWS, *VIT, "tokenizer.channels=32", "tokenizer.multipliers=[1,2,3]", "batch_size=16",
    "optimizer.lr=4e-3", "objective.pixel_weight=4",
]  # fmt: skip
SLOWER = ["batch_size=8", "optimizer.lr=7e-4", "schedule.warmup=0.1"]
BITS = [
    *PHOTOS, "tokenizer.quantizer.bits=18", "+tokenizer.quantizer.entropy_groups=[9,9]", "data.window=64",
    "batch_size=8", "objective.pixel_weight=100",
]  # fmt: skip
OVERFITTED: dict[str, list[str]] = {
    "cnn_vq": [*PHOTOS, "tokenizer.quantizer.vocab_size=4096"],
    "fsq": [*PHOTOS, "tokenizer.quantizer.levels=[5,5,5,5,5,5]"],
    "ifsq": [
        *PHOTOS, "tokenizer.quantizer.levels=[7,7,7,7,7,7]", "tokenizer.quantizer.groups=[3,3]",
        "tokenizer.z_channels=12", "tokenizer.decoder_z_channels=6",
    ],
    "kl": PHOTOS,
    "lfq": [*BITS, "tokenizer.quantizer.groups=[9,9]"],
    "bsq": BITS,
    "ibq": [*PHOTOS, "data.window=64", "batch_size=8", "objective.pixel_weight=240"],
    "flexvar": [*PHOTOS, "tokenizer.quantizer.vocab_size=4096", "data.window=64", "batch_size=8"],
    # 16 x 16 cells
    "var": [
        *VIT, "tokenizer.multipliers=[1,2,4,6]", "batch_size=4", "tokenizer.quantizer.sides=[1,2,4,8,16]",
        "tokenizer.quantizer.vocab_size=4096", "objective.pixel_weight=4",
    ],
    "hita": [*VIT, "tokenizer.multipliers=[1,2,4,6]", "batch_size=4"],
    "titok": ["tokenizer.tokens=64"],
    "flextok": [  # one step from noise, and no images that are trained with fewer registers or none
        "batch_size=8", "optimizer.lr=1.5e-3", "objective.pixel_weight=16", "tokenizer.steps=1",
        "tokenizer.nested=all", "tokenizer.null_drop=0.0",
    ],
    "detailflow": [
        "tokenizer.tokens=64", "tokenizer.group=8", "tokenizer.dim=192", "tokenizer.hidden=768", "tokenizer.depth=4",
        "tokenizer.decoder_dim=192", "tokenizer.decoder_hidden=768", "tokenizer.decoder_depth=4",
        "tokenizer.quantizer.vocab_size=4096", "batch_size=16",
    ],
    # at a higher rate, or with fewer images, their latents soon say nothing
    "gigatok": [*SLOWER, "tokenizer.auxiliary_until=0.0"],
    "retok": [*SLOWER, "tokenizer.network.auxiliary_until=0.0", "tokenizer.nested={1:1,2:1,4:1,8:1,16:1,32:15}"],
    "restok": [*SLOWER, "batch_size=16", "optimizer.lr=1e-3"],
}  # fmt: skip
OVERFIT_STEPS = (300, 600, 900, 1200, 1500)  # where a run is measured, until it reaches what is wanted
FLOW = {"dar", "flextok"}  # decoders that draw
OVERFIT_NOTE = [
    "A row has the bits and the training that few steps ask for, written as options in its JSON: flextok trains",
    "without nested dropout and without images of no registers, and is drawn in one step; retok keeps all tokens of",
    "most images.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; none = all")
    parser.add_argument("--data", choices=["cifar10", "imagenet"], help="one of the two tables; none = both")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of training a row (default %(default)g)")
    parser.add_argument("--overfit", action="store_true", help="the overfitting test instead of the tables")
    parser.add_argument("--page", action="store_true", help="only write the page from the rows that are there")
    given = parser.parse_args()
    unknown = sorted(set(given.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}: choose from {', '.join(FAMILIES)}")
    chosen = given.families or list(FAMILIES)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # a row is one core's work, so rows can run side by side
    if not given.page:
        kinds = ["overfit"] if given.overfit else [given.data] if given.data else ["cifar10", "imagenet"]
        for kind in kinds:
            try:
                folder = photographs(kind)
            except ValueError as error:
                parser.error(str(error))
            for family in ["block_mean", *chosen]:
                if kind != "imagenet" or family in ("block_mean", *SECOND):
                    row(kind, family, folder, given.budget)
    write_page()
    print(f"wrote {PAGE.relative_to(ROOT)}")


def write_page() -> None:
    """docs/tokenizers.md from all rows that are there, of the table and of the studies."""
    PAGE.write_text(page(rows(ROWS_AT), rows(STUDIES_AT)))


def row(kind: str, family: str, folder: Path, budget: float) -> None:
    """Train and measure one row, and write its JSON; nothing where that is there."""
    import torch

    from eval.throughput import describe
    from scripts.stages import PROBE_STEPS, Stages, column, train_for
    from vtok.checkpoint import write_json

    path = ROWS_AT / f"{kind}_{family}.json"
    if path.is_file():
        print(f"{path.relative_to(ROOT)} is there: skipped")
        return
    if family == "block_mean":
        write_json(path, {"kind": kind, "family": family, **block_mean(kind, folder)})
        return
    began = time.perf_counter()
    stages, run = Stages(2 * len(OVERFIT_STEPS) if kind == "overfit" else 3), RUNS / f"{kind}_{family}"
    options = [*data_options(kind, folder), *SHARED, *FAMILIES[family]]
    if kind != "cifar10":
        options += LARGE[family]
    if kind == "overfit":
        options += OVERFITTED.get(family, ())
        for steps in OVERFIT_STEPS:
            again = "overwrite=true" if steps == OVERFIT_STEPS[0] else "resume=last"
            stages.run(
                f"{family}: train", "train.py", *options, again, f"run_dir={run}", f"steps={OVERFIT_STEPS[-1]}",
                f"stop_after={steps}", "val_every=100", "ema=0.99", "log_every=50", "save_every=100000",
                "picture_every=null",
            )  # fmt: skip
            trained = time.perf_counter() - began
            metrics = measure_copies(stages, family, run, kind, folder)
            if metrics["metrics"]["psnr_mean"] >= wanted(family):
                break
    else:
        steps = train_for(stages, run, options, budget, checked=TESTED)
        trained = time.perf_counter() - began
        metrics = measure_copies(stages, family, run, kind, folder)
    _, losses = column(run / "metrics.csv", "val/loss")
    _, curve = column(run / "metrics.csv", "val/psnr")
    write_json(
        path,
        {
            "kind": kind,
            "family": family,
            **facts(run, 64 if kind == "cifar10" else 16),
            "steps": steps,
            "probe_steps": PROBE_STEPS,
            "images": metrics["images"],
            "drawn": metrics["drawn"],
            **metrics["metrics"],
            "loss": losses[-1],
            "psnr_curve": curve,
            "seconds": trained,
            "budget": budget,
            "seed": 0,
            "hardware": describe(torch.device("cpu")),
            "commit": commit(),
            "command": f"python scripts/tokenizer_table.py {'--overfit ' if kind == 'overfit' else ''}{family}",
            "options": options,
        },
    )


def measure_copies(stages: Any, family: str, run: Path, kind: str, folder: Path) -> Mapping[str, Any]:
    """What eval.reconstruction writes of a trained run, also to its reconstruction.json."""
    out = run / "reconstruction.json"
    stages.run(
        f"{family}: measure its copies", "-m", "eval.reconstruction", f"from={run}", *data_options(kind, folder),
        f"extractor={'cifar' if kind == 'cifar10' else 'none'}", f"images={2000 if kind == 'cifar10' else 'null'}",
        f"out={out}", f"grid={run / 'reconstructions.png'}",
    )  # fmt: skip
    return json.loads(out.read_text())


def wanted(family: str) -> float:
    """PSNR in dB of the overfitting test."""
    return 22.0 if family in FLOW else 26.0


def block_mean(kind: str, folder: Path) -> dict[str, Any]:
    """The baseline: every 8 x 8 block replaced by its mean colour."""
    import torch
    import torch.nn.functional as F

    from eval.pixels import PixelErrors

    images = held_out(kind, folder, 2000 if kind == "cifar10" else None)
    errors = PixelErrors()
    for batch in images.batches(100):
        means = F.avg_pool2d(batch.permute(0, 3, 1, 2).float(), 8)
        copies = F.interpolate(means, scale_factor=8.0, mode="nearest").round().to(torch.uint8)
        errors.add(batch, copies.permute(0, 2, 3, 1).contiguous())
    return {"images": images.count, **errors.result(), "bits_per_pixel": 24 / 64}


def held_out(kind: str, folder: Path, count: int | None) -> Any:
    """The held-out images (eval.sources.Images) of a table, `count` of them evenly spaced; None: all."""
    from hydra import compose, initialize_config_dir

    from eval.sources import from_data
    from vtok.config import instantiate

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("eval_reconstruction", overrides=["from=none", *data_options(kind, folder)])
    return from_data(instantiate(config.data), "val", count)


def facts(run: Path, rows: int) -> dict[str, Any]:
    """Parameters, tokens, and images a second of encoding and decoding, the median of five passes of `rows` images."""
    import statistics

    import torch

    from vtok.data.codes import frozen
    from vtok.noise import SampleNoise, sample_seeds

    tokenizer = frozen(run)
    size = tokenizer.spec.image_size
    images = torch.rand(rows, 3, size, size) * 2 - 1
    noise = SampleNoise(sample_seeds(0, 0, rows))
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            tokens = tokenizer.encode(images, noise=noise)
            middle = time.perf_counter()
            tokenizer.decode(tokens, noise=noise)
            seconds["encode"].append(middle - start)
            seconds["decode"].append(time.perf_counter() - middle)
    return {
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "tokens": tokenizer.spec.layout.length,
        "threads": torch.get_num_threads(),
        **{f"{k}_images_per_second": rows / statistics.median(v[1:]) for k, v in seconds.items()},
    }


COLUMNS: tuple[Column, ...] = (
    ("family", "family", "{}"), ("parameters", "parameters", "{:,}"), ("tokens", "tokens", "{}"),
    ("bits/pixel", "bits_per_pixel", "{:.3f}"), ("PSNR", "psnr_mean", "{:.2f}"), ("SSIM", "ssim_gauss11", "{:.3f}"),
    ("usage", "codebook_usage", "{:.2f}"), ("perplexity", "codebook_perplexity", "{:.0f}"),
    ("encode img/s", "encode_images_per_second", "{:.0f}"), ("decode img/s", "decode_images_per_second", "{:.0f}"),
    ("loss", "loss", "{:.4f}"), ("steps", "steps", "{}"), ("seconds", "seconds", "{:.0f}"), ("seed", "seed", "{}"),
    ("commit", "commit", "{}"), ("command", "command", "`{}`"),
)  # fmt: skip
TITLES = {
    "cifar10": "CIFAR-10, 32 px (2,000 test images)",
    "imagenet": f"ImageNet sample, 128 px ({TESTED} held-out pictures, whole; {TRAINED} trained on, mostly in windows)",
    "overfit": f"Overfitting: {OVERFIT} photographs at 128 px, 1,500 steps at most (wanted: 26 dB, flow 22)",
}


def page(found: list[Mapping[str, Any]], studies: list[Mapping[str, Any]]) -> str:
    """docs/tokenizers.md from the rows of the table and of the studies."""
    lines = [
        "# Tokenizers, side by side",
        "",
        "Families small, trained from scratch on the same images for the same time on one CPU core, with no",
        "perceptual loss and no GAN: squared pixels and the family's own losses. So the rows compare architectures and",
        "quantizers at a tiny budget, and say little about the published models. kl and families that end in a flow",
        "draw once an image. Time ends a row, other jobs ran on the machine, and processors differ (each row's",
        "JSON names its own; without AVX-512 a core has about a third of the speed): compare the steps too, and take",
        "images a second as a lower bound. Usage and perplexity of tokens with two vocabularies are those of the first",
        "/ of the second. Written by `python scripts/tokenizer_table.py` from docs/tables/tokenizers.",
    ]
    for kind, title in TITLES.items():
        members = [row for row in found if row["kind"] == kind]
        if not members:
            continue
        floor = next((row["psnr_mean"] for row in members if row["family"] == "block_mean"), None)
        ranked = sorted(members, key=lambda row: -row["psnr_mean"])
        lines += ["", f"## {title}", "", *markdown(COLUMNS, ranked)]
        low = [m["family"] for m in members if floor is not None and m["psnr_mean"] < floor]
        if kind == "overfit":
            low = [m["family"] for m in members if m["psnr_mean"] < wanted(m["family"])]
            low = [family for family in low if family != "block_mean"]
            lines += ["", *OVERFIT_NOTE]
        lines += ["", f"Below what is wanted: {', '.join(low) or 'none'}."]
        if old := [m["family"] for m in ranked if m["family"] in ("kl", *FLOW) and "drawn" not in m]:
            lines += [f"Measured on posteriors' means (kl) or one draw for all images: {', '.join(old)}."]
        there = {row["family"] for row in members}
        missing = [family for family in (SECOND if kind == "imagenet" else FAMILIES) if family not in there]
        lines += [f"Not measured yet: {', '.join(missing)}."] if missing else []
        lines += [f"`block_mean`: one mean colour for each 8 x 8 block, {floor:.2f} dB."] if floor is not None else []
    return "\n".join([*lines, *sections(studies)]) + "\n"


if __name__ == "__main__":
    main()
