"""Three questions about the tokenizers of docs/tokenizers.md, answered on CIFAR-10 by runs of their own.

    python scripts/tokenizer_study.py ifsq [ifsq_0 fsq_0 ...]      iFSQ against FSQ, three seeds each
    python scripts/tokenizer_study.py nested [restok retok ...]    prefixes, with and without nested dropout
    python scripts/tokenizer_study.py locality                     what one patch changes in ResTok; needs no training

A finished run is one JSON file in docs/tables/studies and is skipped; remove it to measure again. A run takes --budget
seconds of one core, so several can run side by side: give all runs of `ifsq` the same --steps then. `nested` takes the
runs of scripts/tokenizer_table.py where they are there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.studies import bin_counts, code_use, judged, prefix_lengths  # noqa: E402
from scripts.tables import commit, data_options, photographs, rows  # noqa: E402
from scripts.tokenizer_table import BUDGET, FAMILIES, PAGE, SHARED, STUDIES_AT, held_out, write_page  # noqa: E402
from scripts.tokenizer_table import RUNS as TABLE_RUNS  # noqa: E402

RUNS = Path("outputs/tables/studies")
FIGURE = ROOT / "docs" / "images" / "restok_locality.png"
SEEDS = (0, 1, 2)
HELD_OUT, PREFIXES = 2000, 100  # images that the figures of a study come from

# name of a run: (activation, seed); the network is that of the table's row `ifsq`
SQUASHED = {f"{name}_{seed}": (kind, seed) for seed in SEEDS for name, kind in (("fsq", "tanh"), ("ifsq", "ifsq"))}


@dataclass(frozen=True)
class Flexible:
    """without: options that leave the nested dropout out; None where a family trains without any.
    scales: only whole steps of the layout decode."""

    without: list[str] | None = None
    scales: bool = False


PREFIXED = {
    "restok": Flexible(["tokenizer.nested=all"]),
    # evaluation reads the first N tokens: without dropout, the redundant ones would hold what it cannot see
    "retok": Flexible(["tokenizer.nested=all", "tokenizer.network.redundant=0"]),
    "flextok": Flexible(["tokenizer.nested=all"]),
    "detailflow": Flexible(["tokenizer.degradation=0.0"]),
    "dar": Flexible(),
    "var": Flexible(scales=True),
    "flexvar": Flexible(scales=True),
}
NAMES = {"ifsq": list(SQUASHED), "nested": list(PREFIXED), "locality": ["restok"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(NAMES))
    parser.add_argument("names", nargs="*", metavar="run", help="of the study; none = all that are not there yet")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of training a run (default %(default)g)")
    parser.add_argument("--steps", type=int, help="train so long instead; none = what the budget or finished runs say")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(NAMES[given.study]))
    if unknown:
        parser.error(f"unknown run {', '.join(unknown)} of {given.study}: choose from {', '.join(NAMES[given.study])}")
    if not 0 < given.budget < math.inf or (given.steps is not None and given.steps < 1):
        parser.error(f"--budget {given.budget:g} --steps {given.steps}: give seconds above 0, and at least one step")
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # a run is one core's work
    study = {"ifsq": ifsq, "nested": nested, "locality": locality}[given.study]
    for name in given.names or NAMES[given.study]:
        path = STUDIES_AT / f"{given.study}_{name}.json"
        if path.is_file():
            print(f"{path.relative_to(ROOT)} is there: skipped")
            continue
        try:
            found = study(name, given.budget, given.steps)
        except ValueError as error:
            parser.error(str(error))
        save(path, {"study": given.study, "name": name, **found, "commit": commit()})
    write_page()
    print(f"wrote {PAGE.relative_to(ROOT)}")


def save(path: Path, row: dict[str, Any]) -> None:
    from vtok.checkpoint import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    print(f"wrote {path.relative_to(ROOT)}")


def trained(run: Path, options: Sequence[str], budget: float, steps: int | None) -> int:
    """Steps of `run`, which is trained now unless it is finished: `steps` long, or for `budget` seconds where None."""
    from omegaconf import OmegaConf

    from scripts.stages import Stages, train_for

    if (run / "config.yaml").is_file():
        there = int(OmegaConf.load(run / "config.yaml").steps)
        if (run / "checkpoints" / f"step_{there}.ckpt").is_file():
            print(f"{run} is there: {there} steps")
            return there
    stages = Stages(2 if steps is None else 1)
    if steps is None:
        return train_for(stages, run, options, budget)
    stages.run(
        f"{run.name}: train", "train.py", *options, "overwrite=true", f"run_dir={run}", f"steps={steps}",
        f"val_every={max(1, steps // 4)}", "data.limit_val=500", "save_every=100000", "picture_every=null",
        f"log_every={max(10, steps // 60)}",
    )  # fmt: skip
    return steps


def frozen_run(run: Path) -> Any:
    from vtok.data.codes import frozen

    return frozen(run)


def ifsq(name: str, budget: float, steps: int | None) -> dict[str, Any]:
    """A row: one network with FSQ or iFSQ, and how it uses its codes and their levels."""
    activation, seed = SQUASHED[name]
    folder = photographs("cifar10")
    earlier = [row["steps"] for row in rows(STUDIES_AT) if row["study"] == "ifsq"]
    steps = steps or (earlier[0] if earlier else None)  # all runs train equally long
    options = [*data_options("cifar10", folder), *SHARED, *FAMILIES["ifsq"], f"seed={seed}"]
    options += [f"tokenizer.quantizer.activation={activation}"]
    began = time.perf_counter()
    steps = trained(RUNS / name, options, budget, steps)
    seconds = time.perf_counter() - began
    return {
        "activation": activation,
        "seed": seed,
        "steps": steps,
        **measured_codes(frozen_run(RUNS / name), held_out("cifar10", folder, HELD_OUT)),
        "seconds": seconds,
        "budget": budget,
        "command": f"python scripts/tokenizer_study.py ifsq {name}",
        "options": options,
    }


def measured_codes(tokenizer: Any, images: Any) -> dict[str, Any]:
    """PSNR and use of codes and levels over images (eval.sources.Images) of a tokenizer with FSQ."""
    import math

    import torch

    from eval.pixels import PixelErrors
    from vtok.data.transforms import to_float, to_uint8

    quantizer = tokenizer.quantizer
    errors, counts = PixelErrors(), torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    bins = [torch.zeros(level, dtype=torch.int64) for level in quantizer.levels]
    with torch.inference_mode():
        for batch in images.batches(100):
            ids = tokenizer.encode(to_float(batch, channels_last=True))
            errors.add(batch, to_uint8(tokenizer.decode(ids)))
            counts += torch.bincount(ids.flatten(), minlength=len(counts))
            bins = [a + b for a, b in zip(bins, bin_counts(ids, quantizer.levels))]
    return {
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "levels": list(quantizer.levels),
        "bits": math.log2(quantizer.vocab_size),
        "bits_of_level": sum(map(math.log2, quantizer.levels)) / len(quantizer.levels),
        "images": images.count,
        **errors.result(),
        **code_use(counts, bins),
    }


def nested(family: str, budget: float, steps: int | None) -> dict[str, Any]:
    """A row: PSNR by the number of tokens, of the family's run and of one without nested dropout, equally long."""
    flexible, folder = PREFIXED[family], photographs("cifar10")
    options = [*data_options("cifar10", folder), *SHARED, *FAMILIES[family]]
    run, other = TABLE_RUNS / f"cifar10_{family}", RUNS / f"nested_{family}_without"
    steps = trained(run, options, budget, steps)
    tokenizer, images = frozen_run(run), held_out("cifar10", folder, PREFIXES)
    layout = tokenizer.spec.layout
    ends = list(accumulate(layout.sizes)) if flexible.scales else None
    path, quarter = prefix_lengths(layout.length, ends)
    lengths = sorted({*path, quarter})
    row = {
        "family": family,
        "tokens": layout.length,
        "images": images.count,
        "path": path,
        "quarter": quarter,
        "steps": steps,
        "psnr": prefix_psnr(tokenizer, images, lengths),
        "without": None,
        "seed": 0,
        "budget": budget,
        "command": f"python scripts/tokenizer_study.py nested {family}",
        "options": options,
    }
    if flexible.without is not None:
        options = [*options, *flexible.without]
        row["without"] = {
            "steps": trained(other, options, budget, steps),
            "psnr": prefix_psnr(frozen_run(other), images, lengths),
            "options": options,
        }
    print(f"{family}: {'; '.join(word for word in judged(row) if word)}")
    return row


def prefix_psnr(tokenizer: Any, images: Any, lengths: Sequence[int]) -> dict[str, float]:
    """Mean PSNR {k: dB} of images decoded from their first k tokens. A family that decodes prefixes at a smaller side
    (`side_of`) is decoded at the full one as well, and the better of the two counts."""
    import torch

    from eval.pixels import PixelErrors
    from vtok.data.transforms import to_float, to_uint8
    from vtok.noise import SampleNoise, sample_seeds

    found = {}
    for k in lengths:
        own, full = (PixelErrors(similarity=False) for _ in range(2))
        with torch.inference_mode():
            for batch in images.batches(100):
                ids = tokenizer.encode(to_float(batch, channels_last=True))
                noise = SampleNoise(sample_seeds(0, own.count, own.count + len(batch)))
                own.add(batch, to_uint8(tokenizer.decode(ids, keep=k, noise=noise)))
                if hasattr(tokenizer, "side_of"):
                    full.add(batch, to_uint8(tokenizer.pixels(tokenizer.embed(ids[:, :k]))))
        found[str(k)] = max(error.result()["psnr_mean"] for error in (own, full) if error.count)
    return found


def locality(name: str, budget: float, steps: int | None) -> dict[str, Any]:
    """The row of ResTok at random weights, and its figure."""
    from scripts.locality import figure, measure

    found, maps = measure(SEEDS)
    figure(FIGURE, maps, found["levels"])
    print(f"wrote {FIGURE.relative_to(ROOT)}")
    return {**found, "command": "python scripts/tokenizer_study.py locality"}


if __name__ == "__main__":
    main()
