"""What the two tables share: the photographs, one JSON file a row, and rows as Markdown."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("outputs/tables/data")
PLACES = (".", "data", "../shared/data")  # where archives are looked for, from the clone
CIFAR, IMAGENET = "cifar10-jpg.tar.xz", "imagenet-1k-sample.tar"
TRAINED, TESTED = 900, 100  # pictures of the ImageNet sample
OVERFIT = 16

# (title, key of the row, format)
Column = tuple[str, str, str]


def photographs(kind: str) -> Path:
    """The folder with train/ and val/ (or test/) of that table, unpacked once. ValueError where the archive is not."""
    from vtok.data.archive import unpack

    name = CIFAR if kind == "cifar10" else IMAGENET
    found = next((ROOT / place / name for place in PLACES if (ROOT / place / name).is_file()), None)
    target = DATA / name.partition(".")[0]
    if not (target / ".unpacked").is_file():
        if found is None:
            raise ValueError(f"no {name}: put it into the folder of the clone, or into data/")
        unpack(found, target)
        (target / ".unpacked").write_text("")
    if kind == "cifar10":
        return target
    split = DATA / ("overfit" if kind == "overfit" else "imagenet")
    if not (split / ".ready").is_file():
        pictures = sorted(target.rglob("*.JPEG"), key=lambda path: path.name)
        parts = {"train": pictures[:TRAINED], "val": pictures[-TESTED:]}
        if kind == "overfit":
            parts = {"train": pictures[:OVERFIT], "val": pictures[:OVERFIT]}
        for part, members in parts.items():
            (split / part).mkdir(parents=True, exist_ok=True)
            for path in members:
                shutil.copyfile(path, split / part / path.name)
        (split / ".ready").write_text("")
    return split


def data_options(kind: str, folder: Path) -> list[str]:
    """data=... of train.py and of the evaluation."""
    if kind == "cifar10":
        return ["data=cifar10", f"data.folder={folder}"]
    options = ["data=imagefolder", f"data.folder={folder / 'train'}", f"data.val_folder={folder / 'val'}"]
    options += ["data.num_classes=0", "data.image_size=128", "data.cache=true", "data.workers=0"]
    return [*options, "data.flip=false"] if kind == "overfit" else options


def commit() -> str:
    """The commit of the clone, short."""
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() or "unknown"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The finished rows of a table."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def cell(member: Mapping[str, Any], key: str, shape: str) -> str:
    """A row's value; the values of all parts of the tokens, <key>_part0 and so on, where it has these; else empty."""
    names = [key] if key in member else sorted(name for name in member if name.startswith(f"{key}_part"))
    return " / ".join(shape.format(member[name]) for name in names if member[name] is not None)


def markdown(columns: Sequence[Column], members: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of a table; a cell whose key a row lacks is empty."""
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    for member in members:
        cells = [cell(member, key, shape) for _, key, shape in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
