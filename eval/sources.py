"""Where images to be evaluated come from: an npz, a folder, or a data set, all as batches of uint8 [B, H, W, 3].

Nothing holds a whole set in memory: a compressed npz is read as a stream, so 50,000 images cost one batch. Headers are
checked against the size of the file before anything is allocated, and pickled arrays are refused.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILES = " files:"  # what follows in an identity is the hash of the files' sizes, which earlier versions left out
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Images:
    """count images; read(batch) yields uint8 [B, H, W, 3] in a fixed order; labels int64 [count] or None.

    file_format: npz, png, jpg ..., or "direct" for images that were never stored. span(batch, start, stop) yields those
    images only, without the work of the earlier ones; None where there is no way but through them. identity: what
    changes when other images would come (hashes of files, seeds, guidance); unit: a span starts at a multiple of it.
    """

    name: str
    count: int
    read: Callable[[int], Iterator[Tensor]]
    labels: Tensor | None
    file_format: str
    span: Callable[[int, int, int], Iterator[Tensor]] | None = None
    identity: str = ""
    unit: int = 1

    def part(self, size: int, start: int, stop: int) -> Iterator[Tensor]:
        """Batches of up to `size` of the images start..stop-1. Raises ValueError where another number arrives."""
        seen = 0
        for batch in self.span(size, start, stop) if self.span else self._skipped(size, start, stop):
            seen += len(batch)
            yield batch
        if seen != stop - start:
            raise ValueError(f"{self.name} gave {seen} images for {start}..{stop - 1}, expected {stop - start}")

    def _skipped(self, size: int, start: int, stop: int) -> Iterator[Tensor]:
        place = 0
        for batch in self.read(size):
            yield from (b for b in batch[max(0, start - place) : max(0, stop - place)].split(size) if len(b))
            place += len(batch)
            if place >= stop:
                return

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches of up to `size` images. Raises ValueError where another number arrives than was promised."""
        seen = 0
        for batch in self.read(size):
            seen += len(batch)
            yield batch
        if seen != self.count:
            raise ValueError(f"{self.name} gave {seen} images, expected {self.count}")

    def first(self, count: int | None) -> Images:
        """The first `count` images. Raises ValueError where there are fewer."""
        if count is None or count == self.count:
            return self
        if count > self.count:
            raise ValueError(f"{self.name} holds {self.count} images, fewer than images={count}")

        def read(size: int) -> Iterator[Tensor]:
            left = count
            for batch in self.read(size):
                yield batch[:left]
                left -= min(left, len(batch))
                if not left:
                    return

        labels = None if self.labels is None else self.labels[:count]
        return Images(self.name, count, read, labels, self.file_format, self.span, self.identity, self.unit)


# --- npz ------------------------------------------------------------------------------------------------------------


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in an npz. ValueError where the file is missing or no npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no npz file, or a truncated one ({error})") from None


def from_npz(path: str | Path, images: str = "arr_0", labels: str = "arr_1") -> Images:
    """Array `images` uint8 [N, H, W, 3] and, where present, `labels` [N], as sample.py and ADM write them."""
    names = npz_names(path)
    if images not in names:
        raise ValueError(f"{path} holds {', '.join(names)}, but no {images} with images")
    with zipfile.ZipFile(path) as archive, archive.open(f"{images}.npy") as file:
        shape, dtype = _header(file, path, archive.getinfo(f"{images}.npy").file_size)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{path}: {images} is {dtype} {shape}, expected uint8 [N, H, W, 3]")
    answers = None
    if labels in names:
        with np.load(path, allow_pickle=False) as arrays:
            answers = torch.from_numpy(np.asarray(arrays[labels], dtype=np.int64).reshape(-1))
        if len(answers) != shape[0]:
            raise ValueError(f"{path}: {shape[0]} images, but {len(answers)} labels in {labels}")

    def span(size: int, first: int, last: int) -> Iterator[Tensor]:
        pixels = shape[1] * shape[2] * shape[3]
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{images}.npy") as file:
                _header(file, path, archive.getinfo(f"{images}.npy").file_size)
                file.seek(file.tell() + first * pixels)
                for start in range(first, last, size):
                    count = min(size, last - start)
                    data = bytearray(file.read(count * pixels))
                    if len(data) < count * pixels:
                        raise ValueError(f"{path} is truncated: {images} ends in image {start + len(data) // pixels}")
                    yield torch.frombuffer(data, dtype=torch.uint8).view(count, *shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error})") from None

    stat = Path(path).stat()
    identity = f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return Images(str(path), shape[0], lambda size: span(size, 0, shape[0]), answers, "npz", span, identity)


def _header(file: Any, path: str | Path, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the .npy stream `file`, which must be `size` bytes long and in C order."""
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except ValueError as error:
        raise ValueError(f"{path} holds an array that cannot be read ({error})") from None
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError(f"{path} holds pickled objects or an array in Fortran order; write it with numpy.savez")
    if size < int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(f"{path} is truncated: {size} bytes cannot hold {shape} {dtype}")
    return shape, dtype


# --- folder ---------------------------------------------------------------------------------------------------------


def from_folder(folder: str | Path) -> Images:
    """All images below `folder`, sorted by path, all of one size. Labels where every image lies in a class folder.

    Pixels as they are stored, as in the published protocols; data=imagefolder turns pictures by their EXIF orientation.
    """
    from vtok.data.files import read_image

    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    parents = [p.relative_to(folder).parts[:-1] for p in paths]
    labels = None
    if all(len(parts) == 1 for parts in parents):
        classes = {name: i for i, name in enumerate(sorted({parts[0] for parts in parents}))}
        labels = torch.tensor([classes[parts[0]] for parts in parents])
    formats = sorted({p.suffix.lower().lstrip(".").replace("jpeg", "jpg") for p in paths})

    def span(size: int, first: int, last: int) -> Iterator[Tensor]:
        shape = None
        for start in range(first, last, size):
            arrays = []
            for path in paths[start : min(start + size, last)]:
                arrays.append(np.asarray(read_image(path)))
                shape = shape or arrays[-1].shape
                if arrays[-1].shape != shape:
                    raise ValueError(
                        f"{path} is {arrays[-1].shape[1]} x {arrays[-1].shape[0]}, others {shape[1]} x {shape[0]}; "
                        "crop them to one size, or read them through a data config (reference=train or val, data=...)"
                    )
            yield torch.from_numpy(np.stack(arrays))

    listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p in paths)
    identity = hashlib.sha256(listing.encode()).hexdigest()
    return Images(
        str(folder), len(paths), lambda size: span(size, 0, len(paths)), labels, "+".join(formats), span, identity
    )


# --- data sets ------------------------------------------------------------------------------------------------------


def from_data(data: Any, split: str, count: int | None = None) -> Images:
    """The unaugmented images of an ImageData module; split: train | val.

    count: only so many, evenly spaced over the set, which is often sorted by class; null or more than there are = all.
    """
    from vtok.data.module import KeyedImages
    from vtok.data.sources import Limited, sizes_hash

    if split not in ("train", "val"):
        raise ValueError(f"split {split!r}: choose train or val")
    source = data.sources.train if split == "train" else data.sources.val
    if count is not None and count < len(source):
        source = Limited(source, count)
    items = KeyedImages(source, data.transform, seed=data.seed, augment=False)

    def span(size: int, first: int, last: int) -> Iterator[Tensor]:
        for start in range(first, last, size):
            yield torch.stack([items[0, i]["image"] for i in range(start, min(start + size, last))])

    name = f"{type(data).__name__} {split}"
    names = hashlib.sha256("\n".join(source.name(i) for i in range(len(source))).encode()).hexdigest()
    how = " var" * (data.transform.crop == "var") + " upright" * bool(getattr(data, "upright", False))
    identity = f"{name} {data.image_size}{how} {names}"
    if (sizes := sizes_hash(source)) is not None:
        identity += FILES + sizes
    return Images(name, len(items), lambda size: span(size, 0, len(items)), _labels(source), "direct", span, identity)


def same_images(found: Any, now: str | None) -> bool:
    """Whether an identity that was stored, perhaps by an earlier version, is that of these images."""
    return found == now or (now is not None and found == now.partition(FILES)[0])


def _labels(source: Any) -> Tensor | None:
    """Labels int64 [N] of a source, where they can be had without decoding its images."""
    from vtok.data.sources import Limited

    if isinstance(source, Limited):
        labels = _labels(source.source)
        return None if labels is None else labels[[source._index(i) for i in range(len(source))]]
    labels = getattr(source, "labels", None)
    return None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64))


def open_images(path: str | Path) -> Images:
    """Images of an npz file or a folder."""
    if Path(path).is_dir():
        return from_folder(path)
    return from_npz(path)


# --- a generator ----------------------------------------------------------------------------------------------------


def from_run(
    pipeline: Any,
    *,
    name: str,
    count: int,
    plan: str,
    seed: int,
    guidance: Any,
    rule: Any,
    size: int | None = None,
    identity: str = "",
) -> Images:
    """Images that a vgen Pipeline draws while they are read; nothing is stored.

    plan: see `label_plan`. size: side that they are brought to, None as drawn. Image i has the same seed and label
    whatever `count` is, and the same chunk where the pipeline was given one.
    """
    from vtok.noise import sample_seeds

    labels = label_plan(plan, count, pipeline.generator.num_classes, seed)
    seeds, chunk = sample_seeds(seed, 0, count), pipeline.chunk_of(count)
    how = {"guidance": guidance, "rule": rule, "chunk": chunk} | ({} if size is None else {"size": size})

    def span(size: int, first: int, last: int) -> Iterator[Tensor]:
        assert first % chunk == 0, "an image belongs to one chunk, wherever the drawing starts"
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            yield from pipeline(labels[part], seeds[part], **how).split(size)

    known = labels if pipeline.generator.num_classes else None
    return Images(name, count, lambda size: span(size, 0, count), known, "direct", span, identity, unit=chunk)


def label_plan(plan: str, count: int, classes: int, seed: int) -> Tensor:
    """Labels int64 [count]: "balanced" gives image i class i mod classes, "random" draws each uniformly.

    Both are prefix-stable: the first n labels do not depend on `count`. classes 0: all zeros.
    """
    if plan not in ("balanced", "random"):
        raise ValueError(f"labels={plan}: choose balanced or random")
    if classes == 0:
        return torch.zeros(count, dtype=torch.int64)
    if plan == "balanced":
        return torch.arange(count) % classes
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, count))
