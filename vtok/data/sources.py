"""Where images come from before any transform: map-style sources of (image, label), and a decoded copy on disk.

A source has a length, gives (PIL image or uint8 array, label) for an index, and names each image with a string that
does not depend on the machine (the relative path, where there is one).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

THREADS = min(8, os.cpu_count() or 1)  # that open or look at files


class Source(Protocol):
    """native: whether images come as stored, so that a wider crop than the training one can still be taken. Sources of
    files also have `file_size(index)`, the bytes of an image's file; those that skip images that cannot be read have
    `given(index)`, see `name_given`."""

    native: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str: ...


@dataclass
class Sources:
    """What a data module's `prepare` returns. class_names is empty where there are no classes; labels are 0 then."""

    train: Source
    val: Source
    class_names: list[str] = field(default_factory=list)


class Mapped:
    """A memory-mapped .npy that each process opens for itself: pickling it to a worker sends the path, not the data."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._array

    def __getstate__(self) -> dict:
        return {"path": self.path, "_array": None}


class ArraySource:
    """Images uint8 [N, H, W, 3] (an array or a Mapped one) with int labels [N]."""

    def __init__(
        self,
        images: np.ndarray | Mapped,
        labels: np.ndarray,
        names: Sequence[str] | str,
        *,
        native: bool = True,
        files: Source | None = None,
        stand_ins: np.ndarray | None = None,
    ) -> None:
        """names: one name per image, or a prefix to which the index is added. files: what the images were read from.
        stand_ins int [N]: whose image stands at each place, where some could not be read; None: its own."""
        self.images, self.labels, self.names, self.native, self.files = images, labels, names, native, files
        self.stand_ins = stand_ins

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        images = self.images.array if isinstance(self.images, Mapped) else self.images
        return images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.names}/{index}" if isinstance(self.names, str) else self.names[index]

    def given(self, index: int) -> str:
        return self.name(index if self.stand_ins is None else int(self.stand_ins[index]))


class Limited:
    """`count` items of a source, evenly spaced, so that a source sorted by class keeps its classes."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count, self.native = source, min(count, len(source)), source.native

    def __len__(self) -> int:
        return self.count

    def _index(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index * len(self.source) // self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[self._index(index)]

    def name(self, index: int) -> str:
        return self.source.name(self._index(index))

    def given(self, index: int) -> str:
        return name_given(self.source, self._index(index))

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """How many of them lie in each block of the source that holds any; None where it has no blocks."""
        if (blocks := getattr(self.source, "blocks", None)) is None:
            return None
        chosen = np.arange(self.count) * len(self.source) // self.count
        counts = np.bincount(np.searchsorted(np.cumsum(blocks), chosen, side="right"))
        return tuple(counts[counts > 0].tolist())


def name_given(source: Source, index: int) -> str:
    """Name of the image that `source[index]` has just given: a substitute's, where its own could not be read."""
    return source.given(index) if hasattr(source, "given") else source.name(index)


def sizes_hash(source: Source) -> str | None:
    """Hash of the sizes of the files that the images come from, in order; None where the source has no files."""
    rows: Sequence[int] = range(len(source))
    if isinstance(source, Limited):
        source, rows = source.source, [source._index(i) for i in rows]
    files = source.files if isinstance(source, ArraySource) else source
    if not hasattr(files, "file_size"):
        return None
    with ThreadPoolExecutor(THREADS) as pool:  # a file system of a cluster takes a millisecond for each
        sizes = pool.map(files.file_size, rows)
        return hashlib.sha256("\n".join(map(str, sizes)).encode()).hexdigest()
