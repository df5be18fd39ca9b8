"""Image files in folders: finding them, reading them safely, and a decoded copy of small ones on disk.

Facts behind it. A Python list of a million paths is copied into every worker page by page (reference counts), so names
are one byte string. Damaged JPEGs raise a dozen kinds of errors in the decoder; all become one that names the file.
torchvision's DataLoader errors carry the worker's traceback; `BadImage` keeps only the sentence that a user needs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from vtok.checkpoint import full_disk, no_space
from vtok.data.sources import THREADS, ArraySource, Mapped
from vtok.data.transforms import center_crop, to_rgb

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger("vtok.data")

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
OnBadImage = Literal["error", "skip"]
# What Pillow's decoders were seen to raise on damaged files; OSError includes UnidentifiedImageError and missing files.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
NAMED = 10  # unreadable images that a message names before it only counts them


class BadImage(ValueError):
    """A file that is no readable image; the message names it and what to change."""

    def __init__(self, message: str) -> None:
        # A loader's worker process re-raises with its whole traceback as the message: keep the last sentence.
        super().__init__(message.rpartition("BadImage: ")[2].strip())


class Names(Sequence[str]):
    """Relative paths in one byte string, shared by worker processes without copies."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.data = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64) if encoded else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())


# --- finding ---------------------------------------------------------------------------------------------------------


def list_images(folder: Path, key: str = "data.folder") -> list[str]:
    """Sorted relative paths (with /) of the image files below `folder`; hidden files and folders are left out.

    Raises ValueError where there is no such folder, naming the configuration's `key`.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist; change {key}")
    found, seen = [], set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(directory)
        if place in seen:  # a link to a folder above: walking on would never end
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        prefix = Path(directory).relative_to(folder).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        found += [prefix + f for f in files if f.lower().endswith(ENDINGS) and not f.startswith(".")]
    return sorted(found)


def read_image(path: str | os.PathLike, upright: bool = False) -> Image.Image:
    """A decoded 8-bit RGB image. Raises BadImage naming the file where it cannot be read whole.

    upright: turned and mirrored as its EXIF orientation says; where that data is damaged it stays as it lies.
    """
    return decode(path, str(path), upright)


def decode(file: str | os.PathLike | IO[bytes], name: str, upright: bool = False) -> Image.Image:
    """As `read_image`, of a path or an open file; `name` is what a message calls it."""
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(_turned(image) if upright else image)
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage(f"cannot read image {name} ({reason:.120}); replace or remove it") from None


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data can raise anything
        return image


def _header_fault(path: Path) -> bool:
    try:
        with Image.open(path):
            return False
    except DAMAGE:
        return True


def _decode_fault(path: Path) -> bool:
    try:
        read_image(path)
    except BadImage:
        return True
    return False


class EncodedImages:
    """Images with labels that are decoded when they are asked for: what files, tars and parquet share.

    on_bad_image=skip: the next readable one in order takes the place of one that cannot be read. Every process counts
    and logs those that it meets, each once; after NAMED of them only the 16th, the 32nd, .. upright: see `read_image`.
    """

    native = True

    def __init__(
        self,
        folder: Path,
        names: Names,
        labels: Sequence[int] | np.ndarray,
        *,
        on_bad_image: OnBadImage = "error",
        upright: bool = False,
    ) -> None:
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"data.on_bad_image={on_bad_image!r}: choose error or skip")
        self.folder, self.names, self.labels = Path(folder), names, np.asarray(labels, np.int64)
        self.on_bad_image, self.upright, self.bad, self.met = on_bad_image, upright, set(), 0

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        """The decoded image. Raises BadImage."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for candidate in self._from(index):
            try:
                return self.read(candidate), int(self.labels[candidate])
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise BadImage(f"{error}, or set data.on_bad_image=skip") from None
                self.bad.add(candidate)
                self.met += 1
                if self.met <= NAMED or self.met.bit_count() == 1:
                    counted = (self.name(candidate), self.folder, len(self.bad))
                    log.warning("skipped unreadable image %s (%s): %d so far", *counted)
        raise ValueError(f"none of the {len(self)} images in {self.folder} can be read; change data.folder")

    def _from(self, index: int) -> Iterator[int]:
        """`index` and those after it, round to the start, without those that are known to be unreadable."""
        return (i % len(self) for i in range(index, index + len(self)) if i % len(self) not in self.bad)

    def stand_in(self, index: int) -> int:
        """Of which image self[index] has just been: its own, or the next readable one's."""
        return next(self._from(index))

    def given(self, index: int) -> str:
        return self.name(self.stand_in(index))


class FileSource(EncodedImages):
    """Image files below a folder; names: their paths in it."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int],
        *,
        on_bad_image: OnBadImage = "error",
        upright: bool = False,
    ) -> None:
        super().__init__(folder, Names(names), labels, on_bad_image=on_bad_image, upright=upright)

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def file_size(self, index: int) -> int:
        """-1 where there is no file: a dangling link."""
        try:
            return self.path(index).stat().st_size
        except OSError:
            return -1

    def read(self, index: int) -> Image.Image:
        return read_image(self.path(index), self.upright)

    def scan(self, kind: Literal["full", "headers"]) -> list[str]:
        """Open every file (and decode it, if full). Raises BadImage for the first damaged one, or under
        on_bad_image=skip logs and returns their names."""
        fault = _decode_fault if kind == "full" else _header_fault
        with ThreadPoolExecutor(THREADS) as pool:
            found = [i for i, bad in enumerate(pool.map(fault, map(self.path, range(len(self))))) if bad]
        if found and self.on_bad_image == "error":
            self[found[0]]  # its own message
            raise BadImage(f"cannot read image {self.path(found[0])}; it changed while it was read")
        self.bad.update(found)
        names = [self.names[i] for i in found]
        if names:
            shown = ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
            log.warning("skipping %d of %d unreadable images in %s: %s", len(names), len(self), self.folder, shown)
        return names

    def fingerprint(self) -> str:
        """Hash of names, sizes and times of change: equal when nothing in the list changed."""
        how = self.on_bad_image + ("|upright" if self.upright else "")  # off: the names of older caches
        digest = hashlib.sha256(how.encode())
        for i in range(len(self)):
            stat = self.path(i).stat()
            digest.update(
                f"{self.names[i]}|{stat.st_size}|{stat.st_mtime_ns}|{self.labels[i]}\n".encode("utf8", "replace")
            )
        return digest.hexdigest()


# --- decoded once ----------------------------------------------------------------------------------------------------


def cached(source: FileSource, size: int, cache_dir: Path) -> ArraySource:
    """The source decoded, centre-cropped and kept as one uint8 array on disk, memory-mapped.

    The file's name is a hash of the list of files and the size, so a changed folder is decoded anew.
    """
    stem = f"images-{size}-{source.fingerprint()[:24]}"
    images, labels = cache_dir / f"{stem}.npy", cache_dir / f"{stem}-labels.npy"
    skips = source.on_bad_image == "skip"

    def there() -> bool:
        return _complete(images, (len(source), size, size, 3)) and _complete(labels, (2 + skips, len(source)))

    if not there():
        with one_at_a_time(cache_dir / f"{stem}.lock"):
            if not there():  # another process of this machine has made it meanwhile
                hour = time.time() - 3600
                for part in cache_dir.glob(f"{stem}*.tmp.*"):
                    if part.stat().st_mtime < hour:  # left by a killed run; a live one writes all the time
                        part.unlink(missing_ok=True)
                _decode(source, size, images, labels)
    table = np.load(labels, allow_pickle=False)
    options = {"native": bool(table[1].all()), "files": source, "stand_ins": table[2] if skips else None}
    return ArraySource(Mapped(images), table[0], source.names, **options)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine is in here with the same path, a file that is left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also of a killed process
        yield


def _reserve(path: Path) -> None:
    """Take the disk for all of a file that is written through memory, where a full disk would be a bus error."""
    size = path.stat().st_size
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if (number := full_disk(error)) is None:
                return  # a file system that cannot reserve
            raise no_space(number, path, size, shutil.disk_usage(path.parent).free) from None


def _decode(source: FileSource, size: int, images: Path, labels: Path) -> None:
    """Labels are written too (a skipped image takes its substitute's), with a row that tells untouched images, and
    under on_bad_image=skip one with the indices of the images that were taken."""
    parts = [path.with_name(f"{path.name}.tmp.{os.getpid()}") for path in (images, labels)]
    skips = source.on_bad_image == "skip"
    table = np.zeros((2 + skips, len(source)), np.int64)
    try:
        array = np.lib.format.open_memmap(parts[0], mode="w+", dtype=np.uint8, shape=(len(source), size, size, 3))
        _reserve(parts[0])

        def keep(index: int) -> None:
            image, label = source[index]
            table[:2, index] = label, image.size == (size, size)
            if skips:
                table[2, index] = source.stand_in(index)
            array[index] = np.asarray(center_crop(image, size))

        with ThreadPoolExecutor(THREADS) as pool:
            blocks = [range(a, min(len(source), a + 1024)) for a in range(0, len(source), 1024)]
            for block in track(blocks, f"decoding {source.folder} once", console=Console(stderr=True), transient=True):
                list(pool.map(keep, block))  # block by block: an error stops it soon
        array.flush()
        with open(parts[1], "wb") as file:
            np.save(file, table)
        os.replace(parts[1], labels)
        os.replace(parts[0], images)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether an .npy of that shape is there in full."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except Exception:  # numpy reads a header as Python: damage can raise anything
        return False
