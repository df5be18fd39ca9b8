"""Every generator family, small, on tokens of CIFAR-10, trained for the same time: the rows of docs/generators.md.

    python scripts/generator_table.py               all rows that are not there yet
    python scripts/generator_table.py llamagen var  these families only

A finished row is one JSON file in docs/tables/generators and is skipped; remove it to measure again. The tokenizer of a
row is one of scripts/tokenizer_table.py, trained for itself with TOKENIZER_OPTIONS; it is trained, and its codes are
cached, once for all rows. A row learns if its held-out loss is 0.1 nats below the histogram of the codes of each step
(continuous tokens: the loss of the best Gaussian for each position) and the judge gives 0.2 of 1,000 samples their
class.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.tables import TESTED, Column, commit, data_options, markdown, photographs, rows  # noqa: E402

ROWS_AT = ROOT / "docs" / "tables" / "generators"
GRIDS_AT = ROOT / "docs" / "images" / "generators"
PAGE = ROOT / "docs" / "generators.md"
RUNS = Path("outputs/tables/generators")
BUDGET = 600.0  # seconds on one core: 10 CPU-minutes
TOKENIZER_TIMES = 2  # a tokenizer, which several rows share, has so many times the seconds of a row
SAMPLES = 1000
SHARED = ["batch_size=8", "optimizer.lr=1e-3", "ema=0.998"]  # options of train.py that all rows share: many small steps
MARGIN, ACCURACY = 0.1, 0.2  # what a row must reach: nats below the baseline, class accuracy


@dataclass(frozen=True)
class Family:
    """tokenizer: a row of the tokenizers' table; train: options of train.py; draw: options of sample.py; status:
    published, or unofficial where no output of the authors could be compared with. teacher: (model of timm, pixels)
    that training looks at, with random weights; images are encoded anew then. note: what a reader must know."""

    tokenizer: str
    train: list[str]
    draw: list[str] = field(default_factory=lambda: ["guidance=6.0"])
    status: str = "published"
    teacher: tuple[str, int] | None = None
    note: str | None = None


UNOFFICIAL = "unofficial"
# Options of the tokenizers beside those of scripts/tokenizer_table.py. The judge sees no more in a generator's samples
# than in the copies of its tokenizer, so convolutions get few channels and many steps of few images.
SLIM = [*SHARED, "tokenizer.channels=16", "tokenizer.multipliers=[1,2,4]"]
TOKENIZER_OPTIONS: dict[str, list[str]] = {
    **dict.fromkeys(("cnn_vq", "var", "flexvar", "ifsq"), SLIM),
    "kl": [*SLIM, "tokenizer.quantizer.channels=4"],  # fewer numbers a token, which a small head learns sooner
    "lfq": [*SLIM, "objective.pixel_weight=10"],
    "hita": SHARED,
    # with fewer pictures a step, or without the auxiliary decoder, its latents soon say nothing
    "gigatok": [
        *SHARED, "tokenizer.channels=8", "tokenizer.multipliers=[1,2,4]", "tokenizer.groups=4", "batch_size=16",
        "schedule.warmup=0.1", "objective.pixel_weight=4",
    ],
    "restok": ["tokenizer.nested=all", "objective.pixel_weight=8"],  # no reader here asks for a prefix of its tokens
}  # fmt: skip
# What 10 CPU-minutes can teach: of C floating-point operations a model has most when it passes about 20 tokens for each
# parameter (Hoffmann et al., arXiv 2203.15556), and C is 2e13 to 1e14 here.
WIDTH = ["model.width=128", "model.heads=4"]
NARROW = ["model.depth=4", *WIDTH]
SLIM_HEAD = ["model.head_width=128"]
ONCE = [*SLIM_HEAD, "model.repeats=1"]  # a token passes the head once: more images in the time
DRY = ["model.token_dropout=0", "model.dropout=0"]  # a small budget sees every image once or twice
FAMILIES: dict[str, Family] = {
    "llamagen": Family("cnn_vq", ["model=llamagen_small", *NARROW, *DRY]),
    "llamagen_factorised": Family("lfq", ["model=llamagen_factorised_small", *NARROW, *DRY]),
    "elm": Family("lfq", ["model=elm_small", *NARROW, *DRY], status=UNOFFICIAL),
    "llamagen_repa": Family(
        "cnn_vq",
        ["model=llamagen_repa_small", *NARROW, *DRY],
        teacher=("test_vit", 128),
        note="aligned with a vision transformer of RANDOM weights, since a clone has no pretrained ones: the row shows "
        "that the model trains with the alignment, not what alignment with DINOv2 buys",
    ),
    "ifsq": Family("ifsq", ["model=ifsq_small", *NARROW]),
    "rar": Family("cnn_vq", ["model=rar_small", *NARROW, "model.hidden=512"]),
    "gigatok": Family("gigatok", ["model=gigatok_small", *NARROW]),
    "dar": Family("dar", ["model=dar_small", *NARROW]),
    "hita": Family("hita", ["model=hita_small", *NARROW]),
    "nbp": Family("cnn_vq", ["model=nbp_small", *NARROW], status=UNOFFICIAL),
    "par": Family("cnn_vq", ["model=par_small", *NARROW], status=UNOFFICIAL),
    "har": Family("restok", ["model=har_small", *NARROW]),
    "detailflow": Family("detailflow", ["model=detailflow_small", *NARROW]),
    "var": Family("var", ["model=var_small", *NARROW]),
    "flexvar": Family("flexvar", ["model=flexvar_small", *NARROW]),
    "maskgit": Family(
        "titok", ["model=maskgit_small", *NARROW, "model.hidden=512"], ["guidance=6.0", "temperature=4.0", "steps=8"]
    ),
    # latents; iterative heads walk fewer steps than published (MAR 64 x 100, xAR 40, FlowAR 25)
    "mar": Family("kl", ["model=mar_small", *WIDTH, *SLIM_HEAD], ["guidance=4.0", "steps=16", "solver_steps=25"]),
    "orthus": Family(
        "kl",
        ["model=orthus_small", *NARROW, *ONCE],
        ["guidance=4.0", "solver_steps=25"],
        UNOFFICIAL,
    ),
    "xar": Family("kl", ["model=xar_small", *WIDTH], ["guidance=4.0", "solver_steps=12"]),
    "flowar": Family("kl", ["model=flowar_small", *WIDTH, *SLIM_HEAD], ["guidance=4.0", "solver_steps=12"], UNOFFICIAL),
    "ecar": Family("kl", ["model=ecar_small", *WIDTH, *SLIM_HEAD], ["guidance=4.0", "solver_steps=8"], UNOFFICIAL),
    "dtm": Family("kl", ["model=dtm_small", *NARROW, *ONCE], ["guidance=4.0", "solver_steps=4"], UNOFFICIAL),
    "artm": Family("kl", ["model=artm_small", *NARROW, *ONCE], ["guidance=4.0", "solver_steps=4"], UNOFFICIAL),
    "fhtm": Family("kl", ["model=fhtm_small", *NARROW, *ONCE], ["guidance=4.0", "solver_steps=4"], UNOFFICIAL),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; none = all")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of training a row (default %(default)g)")
    parser.add_argument("--page", action="store_true", help="only write the page from the rows that are there")
    given = parser.parse_args()
    unknown = sorted(set(given.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}: choose from {', '.join(FAMILIES)}")
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # a row is one core's work, so rows can run side by side
    if not given.page:
        try:
            folder = photographs("cifar10")
        except ValueError as error:
            parser.error(str(error))
        for name in given.families or FAMILIES:
            row(name, folder, given.budget)
    PAGE.write_text(page(rows(ROWS_AT)))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def tokens_of(stages: Any, family: str, folder: Path, budget: float) -> tuple[Path, Path]:
    """(run of the tokenizer, folder of its codes), made where they are not there; budget: seconds of training."""
    from scripts.stages import train_for
    from scripts.tokenizer_table import measure_copies

    run, codes = RUNS / "tokenizers" / family, RUNS / "codes" / family
    data = data_options("cifar10", folder)
    if not (run / "checkpoints" / "last.ckpt").is_file():
        train_for(stages, run, [*data, *tokenizer_options(family)], budget, checked=TESTED)
    if not (codes / "val" / "manifest.json").is_file():
        stages.run(
            f"{family}: cache its codes", "scripts/cache_codes.py", f"from={run}", *data, f"out={codes}",
            "batch_size=128",
        )  # fmt: skip
    found = run / "reconstruction.json"
    if not found.is_file() or "drawn" not in json.loads(found.read_text()):
        measure_copies(stages, family, run, "cifar10", folder)
    return run, codes


def tokenizer_options(family: str) -> list[str]:
    """Options of train.py for the tokenizer of a row, but for its data."""
    from scripts.tokenizer_table import FAMILIES as TOKENIZERS
    from scripts.tokenizer_table import SHARED as TOKENIZER_SHARED

    return [*TOKENIZER_SHARED, *TOKENIZERS[family], *TOKENIZER_OPTIONS.get(family, [])]


def random_teacher(model: str, size: int) -> list[str]:
    """Options of train.py for a frozen vision transformer with weights drawn from seed 0."""
    import timm
    import torch
    from safetensors.torch import save_file

    path = RUNS / f"random_{model}.safetensors"
    torch.manual_seed(0)
    RUNS.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model(model, num_classes=0).state_dict(), path)
    return [f"teacher={{model: {model}, size: {size}, weights_path: {path}}}"]


def row(name: str, folder: Path, budget: float) -> None:
    """Train, draw and measure one row, and write its JSON and grid; nothing where that is there."""
    import torch

    from eval.throughput import describe
    from scripts.stages import Stages, column, train_for
    from vtok.checkpoint import load_module, write_json

    path, family = ROWS_AT / f"{name}.json", FAMILIES[name]
    if path.is_file():
        print(f"{path.relative_to(ROOT)} is there: skipped")
        return
    from vgen.models import FAMILIES as CLASSES

    stages, run = Stages(10), RUNS / name
    tokenizer, codes = tokens_of(stages, family.tokenizer, folder, TOKENIZER_TIMES * budget)
    source = ["data=codes", f"data.folder={codes}"]
    if family.teacher:
        source = [*data_options("cifar10", folder), *random_teacher(*family.teacher)]
    options = [*source, f"tokenizer_from={tokenizer}", *SHARED, *family.train]
    began = time.perf_counter()
    steps = train_for(stages, run, options, budget)
    trained = time.perf_counter() - began
    samples, statistics = run / "samples.npz", RUNS / "train_statistics.npz"
    GRIDS_AT.mkdir(parents=True, exist_ok=True)
    draw = ["sample.py", f"from={run}", *family.draw]
    drawn = stages.run(f"{name}: draw", *draw, f"num_images={SAMPLES}", f"out={samples}")
    stages.run(f"{name}: draw a grid", *draw, "per_class=8", f"out={run / 'grid.png'}")
    (GRIDS_AT / f"{name}.png").write_bytes((run / "grid.png").read_bytes())
    stages.run(
        f"{name}: measure the held-out loss", "-m", "eval.likelihood", f"from={run}", *data_options("cifar10", folder),
        "train_images=10000", f"out={run / 'likelihood.json'}",
    )  # fmt: skip
    reference = [f"reference={statistics}"]
    if not statistics.is_file():
        reference = ["reference=train", *data_options("cifar10", folder), f"save_reference={statistics}"]
    stages.run(
        f"{name}: measure the samples", "-m", "eval.fid", f"samples={samples}", *reference, "extractor=cifar",
        "class_accuracy=true", f"out={run / 'fid.json'}",
    )  # fmt: skip
    likelihood = json.loads((run / "likelihood.json").read_text())
    loss = likelihood.get("bound", likelihood)
    metrics = json.loads((run / "fid.json").read_text())["metrics"]
    copied = json.loads((tokenizer / "reconstruction.json").read_text())
    copies = copied["metrics"]
    _, speeds = column(run / "metrics.csv", "speed/images_per_second")
    module = load_module(run, CLASSES, "ema")
    write_json(
        path,
        {
            "family": name,
            "status": family.status,
            "note": family.note,
            "tokenizer": family.tokenizer,
            "tokenizer_psnr": copies["psnr_mean"],
            "tokenizer_rFD": copies["rFD[cifar]"],
            "copies_drawn": copied["drawn"],
            "parameters": sum(p.numel() for p in module.parameters()),
            "tokens": module.layout.length,
            "layout_steps": module.layout.steps,
            "steps": steps,
            "train_images_per_second": sorted(speeds)[len(speeds) // 2],
            "sample_images_per_second": SAMPLES / drawn,
            "held_out_loss": loss["held_out"],
            "baseline_loss": loss["histogram"],
            "below_baseline": loss["below_histogram"],
            "tokens_drawn": True,
            "label_p_value": likelihood.get("labels", {}).get("p_value"),
            "class_accuracy": metrics["class_accuracy[cifar]"],
            "FD": metrics["FD[cifar]"],
            "samples": SAMPLES,
            "seconds": trained,
            "budget": budget,
            "seed": 0,
            "hardware": describe(torch.device("cpu")),
            "commit": commit(),
            "command": f"python scripts/generator_table.py {name}",
            "draw": " ".join(family.draw),
            "options": options,
        },
    )


COLUMNS: tuple[Column, ...] = (
    ("family", "family", "[{0}](images/generators/{0}.png)"), ("status", "status", "{}"),
    ("tokenizer", "tokenizer", "{}"), ("its PSNR", "tokenizer_psnr", "{:.1f}"), ("its rFD", "tokenizer_rFD", "{:.2f}"),
    ("parameters", "parameters", "{:,}"), ("tokens", "tokens", "{}"),
    ("steps a sample", "layout_steps", "{}"), ("train steps", "steps", "{}"),
    ("train img/s", "train_images_per_second", "{:.0f}"), ("sample img/s", "sample_images_per_second", "{:.1f}"),
    ("held-out loss", "held_out_loss", "{:.3f}"), ("below baseline", "below_baseline", "{:.3f}"),
    ("class accuracy", "class_accuracy", "{:.3f}"), ("FD[cifar]", "FD", "{:.2f}"),
    ("drawn with", "draw", "{}"), ("seed", "seed", "{}"), ("commit", "commit", "{}"), ("command", "command", "`{}`"),
)  # fmt: skip


def learns(row: Mapping[str, Any]) -> bool:
    """Whether a row is what a generator must be: better than its baseline and recognisable."""
    return row["below_baseline"] >= MARGIN and row["class_accuracy"] >= ACCURACY


def page(found: list[Mapping[str, Any]]) -> str:
    """docs/generators.md from the rows."""
    from scripts.tokenizer_table import FLOW

    ranked = sorted(found, key=lambda row: row["FD"])
    lines = [
        "# Generators, side by side",
        "",
        "Every family small, on tokens of CIFAR-10 (32 px) by the tokenizer named in its row, trained for the same",
        f"time on one CPU core; {SAMPLES} samples. So the rows show that every family works, and what a tiny budget",
        "buys; they say little about the published models. Loss: nats a token, or the family's squared error for",
        "continuous tokens (mar, orthus: the variational bound, in nats a token drawn); its baseline knows how often",
        "each code occurs at each step (continuous: a Gaussian for each position, by the same measure). FD[cifar] and",
        "class accuracy: the judge of docs/evaluation.md. A tokenizer has",
        f"{TOKENIZER_TIMES} times that time, on the machine of its generators, so its figures are not those of",
        "docs/tokenizers.md; its rFD, of 2,000 held-out images, is about what a perfect generator would reach.",
        "`unofficial`: no output of the authors to compare with ([what was chosen by us](unofficial.md)). Written by",
        "`python scripts/generator_table.py` from docs/tables/generators.",
        "",
        *markdown(COLUMNS, [row for row in ranked if learns(row)]),
    ]
    slow = [row for row in ranked if not learns(row)]
    if slow:
        lines += ["", "## Does not learn yet", "", *markdown(COLUMNS, slow)]
        lines += ["", f"Wanted: {MARGIN} below the baseline and a class accuracy of {ACCURACY}."]
    if means := [row["family"] for row in ranked if row["tokenizer"] == "kl" and not row.get("tokens_drawn")]:
        lines += [
            "",
            f"Losses of {', '.join(means)} are of before `eval.likelihood` drew latents as training does: of",
            "the means of the tokenizer's posteriors, whose baseline is another too. They are to be measured again.",
        ]
    if old := [row["family"] for row in ranked if row["tokenizer"] in ("kl", *FLOW) and "copies_drawn" not in row]:
        lines += [
            "",
            f"PSNR and rFD of the tokenizers of {', '.join(old)} are of before `eval.reconstruction` drew",
            "once an image: of posteriors' means (kl), or of one noise for all. They are to be measured again.",
        ]
    if left := [name for name in FAMILIES if name not in {row["family"] for row in found}]:
        lines += ["", f"Not measured yet: {', '.join(left)}."]
    for row in ranked:
        lines += ["", f"`{row['family']}`: {row['note']}."] if row.get("note") else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
