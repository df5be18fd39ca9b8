"""Your own pictures: a folder with one folder per class, or a flat folder without classes.

Held out is `val_folder`, or a fixed share of the files by the hash of their relative path, so that adding files moves
none from one part to the other. ImageNet 256 is this class with the values of configs/data/imagenet256.yaml.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vtok.checkpoint import write_json
from vtok.data.files import FileSource, OnBadImage, cached, list_images
from vtok.data.module import ImageData
from vtok.data.sources import Source, Sources
from vtok.data.transforms import Crop

log = logging.getLogger("vtok.data")
Scan = Literal["auto", "full", "headers", "none"]
_FULL, _HEADERS = 20_000, 200_000  # files up to which `auto` decodes, or opens, every one before training


class ImageFolder(ImageData):
    """folder: class folders, or images without classes. num_classes: auto, 0 (ignore class folders) or the number
    expected. val_fraction: held-out share where there is no val_folder. on_bad_image: error, or skip (the next readable
    file takes its place; skipped ones are counted and named). scan: look for unreadable files at the start: full
    decodes them, headers only opens them; auto takes full up to 20,000 files, headers up to 200,000. upright: turn
    pictures as their EXIF orientation says (the protocols of ImageNet do not). cache: decode once into an array at
    image_size (needs crop=center) that later runs reuse from cache_dir. class_file: lines of `folder name`, tab,
    `class name`, in label order; `imagenet` names the packaged one.
    """

    def __init__(
        self,
        *,
        folder: str,
        val_folder: str | None = None,
        val_fraction: float = 0.05,
        num_classes: int | Literal["auto"] = "auto",
        class_file: str | None = None,
        image_size: int = 256,
        batch_size: int = 64,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        crop: Crop = "center",
        flip: bool = True,
        shift: int = 0,
        window: int | None = None,
        on_bad_image: OnBadImage = "error",
        scan: Scan = "auto",
        upright: bool = False,
        cache: bool = False,
        cache_dir: str = "outputs/cache",
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            accumulate=accumulate,
            workers=workers,
            seed=seed,
            crop=crop,
            flip=flip,
            shift=shift,
            window=window,
            limit_train=limit_train,
            limit_val=limit_val,
        )
        if num_classes != "auto" and (not isinstance(num_classes, int) or num_classes < 0):
            raise ValueError(f"data.num_classes={num_classes!r}: give auto, 0 for no classes, or the number of classes")
        if scan not in ("auto", "full", "headers", "none"):
            raise ValueError(f"data.scan={scan!r}: choose auto, full, headers or none")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"data.on_bad_image={on_bad_image!r}: choose error or skip")
        if cache and crop != "center":
            raise ValueError(
                f"data.cache=true stores centre crops, but data.crop={crop}: set one of the two differently"
            )
        if val_folder is None and not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must lie between 0 and 1, or give data.val_folder")
        self.folder, self.val_folder, self.val_fraction = folder, val_folder, val_fraction
        self.expected, self.class_file = num_classes, class_file
        self.on_bad_image, self.scan, self.upright = on_bad_image, scan, upright
        self.cache, self.cache_dir = cache, Path(cache_dir)

    def prepare(self) -> Sources:
        names, classes = find(self.folder, ignore_classes=self.expected == 0)
        known = read_class_file(self.class_file) if self.class_file else {c: c for c in classes}
        if classes and set(classes) != set(known):
            different = sorted(set(classes) ^ set(known))
            raise ValueError(f"{self.folder} and data.class_file={self.class_file} differ in {different[:3]}")
        classes = list(known) if classes else []
        if self.expected not in ("auto", len(classes)):
            raise ValueError(
                f"{self.folder} holds {len(classes)} class folders, but data.num_classes={self.expected}; "
                "use auto, or 0 to ignore classes"
            )
        if self.val_folder is None:
            train_names, val_names = split_by_hash(names, self.val_fraction)
            val_root = self.folder
        else:
            train_names, val_root = names, self.val_folder
            val_names, val_classes = find(self.val_folder, ignore_classes=not classes)
            if classes and not val_classes:
                raise ValueError(
                    f"data.val_folder={self.val_folder} has no class folders, but data.folder has: sort its images "
                    "into folders of the same names, or set data.num_classes=0"
                )
            if not set(val_classes) <= set(classes):
                extra = sorted(set(val_classes) - set(classes))
                raise ValueError(f"data.val_folder={self.val_folder} has classes that data.folder lacks: {extra[:3]}")
        train = self._source(self.folder, train_names, classes)
        return Sources(train, self._source(val_root, val_names, classes), [known[c] for c in classes])

    def _source(self, folder: str, names: list[str], classes: list[str]) -> Source:
        source = file_source(folder, names, classes, self.on_bad_image, self.upright)
        if self.cache:
            return cached(source, self.image_size, self.cache_dir)
        scan_once(source, self.scan, self.cache_dir)
        return source


def find(folder: str | Path, *, ignore_classes: bool = False) -> tuple[list[str], list[str]]:
    """(relative image paths, sorted class folders); no classes for a flat folder. Raises ValueError for an empty
    folder, or one that mixes images and class folders."""
    folder = Path(folder)
    names = list_images(folder)
    if not names:
        raise ValueError(f"{folder} holds no images (jpg, png, webp, bmp, ...); change data.folder")
    if ignore_classes:
        return names, []
    classes = sorted({n.split("/", 1)[0] for n in names if "/" in n})
    loose = [n for n in names if "/" not in n]
    if classes and loose:
        raise ValueError(
            f"{folder} mixes class folders ({classes[0]}, ...) and loose images ({loose[0]}, ...); "
            "move the images, or set data.num_classes=0"
        )
    if "train" in classes and set(classes) <= {"train", "val", "valid", "test"}:
        other = next((c for c in classes if c != "train"), "val")
        raise ValueError(f"{folder} is split already: set data.folder={folder}/train data.val_folder={folder}/{other}")
    return names, classes


def file_source(
    folder: str | Path, names: Sequence[str], classes: list[str], on_bad_image: OnBadImage, upright: bool = False
) -> FileSource:
    """Labels are places in `classes`; 0 without classes."""
    label = {c: i for i, c in enumerate(classes)}
    labels = [label[n.split("/", 1)[0]] if classes else 0 for n in names]
    return FileSource(Path(folder), names, labels, on_bad_image=on_bad_image, upright=upright)


def split_by_hash(names: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """(training, held-out) names: held out where SHA-256 of the name, read as a number in [0, 1), is below `fraction`.

    Both parts get at least one name (of a folder of two or more). Raises ValueError for a single image.
    """
    if len(names) < 2:
        raise ValueError(f"{len(names)} image cannot be split into training and held-out; add images to data.folder")
    place = {n: int.from_bytes(hashlib.sha256(n.encode("utf8", "replace")).digest()[:8], "big") / 2**64 for n in names}
    held_out = {n for n in names if place[n] < fraction}
    if not held_out:
        held_out = {min(names, key=place.__getitem__)}
    if len(held_out) == len(names):
        held_out.remove(max(names, key=place.__getitem__))
    return [n for n in names if n not in held_out], [n for n in names if n in held_out]


def scan_once(source: FileSource, kind: Scan, cache_dir: Path) -> None:
    """Look for unreadable files unless a note in cache_dir says that these very files were fine."""
    if kind == "auto":
        kind = "full" if len(source) <= _FULL else "headers" if len(source) <= _HEADERS else "none"
        if kind == "none":
            log.warning("%d images are not checked before training; data.scan=headers does", len(source))
    if kind == "none":
        return
    note = cache_dir / f"scan-{kind}-{source.fingerprint()[:24]}.json"
    if not note.is_file() and not source.scan(kind):
        write_json(note, {"folder": str(source.folder), "images": len(source)})


def read_class_file(path: str) -> dict[str, str]:
    """{folder name: class name} in label order."""
    file = Path(__file__).with_name("imagenet_classes.txt") if path == "imagenet" else Path(path)
    if not file.is_file():
        raise ValueError(f"data.class_file={path} does not exist; give a file, imagenet, or null")
    lines = [line for line in file.read_text(encoding="utf8").splitlines() if line.strip() and line[0] != "#"]
    table = dict(re.split(r"\t+", line.strip(), maxsplit=1) if "\t" in line else (line.strip(),) * 2 for line in lines)
    if len(table) != len(lines):
        raise ValueError(f"data.class_file={path} names a folder twice")
    return table
