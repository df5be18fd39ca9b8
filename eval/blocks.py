"""A pass over many images as blocks of indices, each in a file of its own: what makes long evaluations restartable.

Block b holds the images b * size .. (b + 1) * size - 1 and what one pass over them leaves (float64 sums, see
eval/measure.py), written beside its place and renamed. Task t of n takes every n-th block, skips those that are there,
and never talks to the others, so a killed job repeats at most one block, and 1, 2 or 4 processes, started by hand, by
torchrun or as a SLURM array, do the same sums in the same order: the merged moments are the same bit for bit. Merging
checks that every index is there exactly once.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.features import Extractor
from eval.measure import Measured, empty, measure
from eval.progress import progress_bar
from eval.sources import Images, same_images
from vtok.checkpoint import write_atomic, write_json

SMALLEST = 1024  # images in a block, unless the set is smaller
MOST = 32  # blocks, unless a size is given: each holds matrices of dim x dim


def block_size(count: int, unit: int, size: int | None = None) -> int:
    """Images in a block: `size`, or so many that a job has 32 blocks at most; always a multiple of `unit`."""
    if size is not None and size < 1:
        raise ValueError(f"block={size}: a block holds at least one image")
    wanted = size or max(SMALLEST, math.ceil(count / MOST))
    return math.ceil(wanted / unit) * unit


class Job:
    """One pass over `images`, cut into blocks that lie in `folder`.

    about: everything that must be equal for two parts of a job to be added (weights, seeds, batch size, library
    versions); a folder that holds a job with other values is refused, naming the first difference. keep: also keep the
    features. tasks: (this one, of how many).
    """

    def __init__(
        self,
        images: Images,
        extractor: Extractor,
        folder: str | Path,
        *,
        about: Mapping[str, Any],
        size: int | None = None,
        batch_size: int = 64,
        splits: int | None = None,
        permutation: int = 2020,
        class_accuracy: bool = False,
        keep: bool = False,
        task: tuple[int, int] = (0, 1),
        text: str = "samples",
        say: Callable[[str], None] = print,
    ) -> None:
        self.images, self.extractor, self.folder = images, extractor, Path(folder)
        self.size = block_size(images.count, images.unit, size)
        self.batch_size, self.keep, self.task, self.text, self.say = batch_size, keep, task, text, say
        self.options = {"splits": splits, "permutation": permutation, "class_accuracy": class_accuracy}
        self.about = {
            **about, **self.options, "images": images.count, "source": images.identity or images.name,
            "extractor": extractor.hash, "block": self.size, "batch_size": batch_size, "keep": keep,
        }  # fmt: skip
        self.spans = [(a, min(a + self.size, images.count)) for a in range(0, images.count, self.size)]

    def path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.npz"

    @property
    def complete(self) -> bool:
        return all(self.path(b).is_file() for b in range(len(self.spans)))

    def bytes(self) -> int:
        """About how much the blocks of the whole job take on disk."""
        dims = (self.extractor.dim, self.extractor.spatial_dim)
        return len(self.spans) * sum(8 * d * d for d in dims) + 4 * self.images.count * dims[0] * self.keep

    def run(self) -> bool:
        """Do this task's blocks that are not there yet; returns whether all blocks of all tasks are there now."""
        self._claim()
        mine = [b for b in range(len(self.spans)) if b % self.task[1] == self.task[0]]
        left = [b for b in mine if not self.path(b).is_file()]
        if len(left) < len(mine):
            done = sum(self.spans[b][1] - self.spans[b][0] for b in mine if b not in left)
            self.say(f"{self.text}: {done} images were done earlier, going on")
        with progress_bar(self.text, sum(self.spans[b][1] - self.spans[b][0] for b in left)) as advance:
            for block in left:
                start, stop = self.spans[block]
                keep = np.empty((stop - start, self.extractor.dim), np.float32) if self.keep else None
                found = measure(
                    self.images, self.extractor, batch_size=self.batch_size, keep=keep, span=(start, stop),
                    advance=advance, **self.options,
                )  # fmt: skip
                arrays = {"index": np.arange(start, stop), **found.arrays()}
                write_atomic(self.path(block), lambda file, a=arrays: np.savez(file, **a))
        return self.complete

    def merge(self, features: np.ndarray | None = None) -> Measured:
        """The sums of all blocks in the order of their indices. features: array [count, dim] that gets those kept."""
        whole = empty(self.images, self.extractor, **self.options)
        expected = 0
        for block in range(len(self.spans)):
            arrays = self._read(block)
            index = arrays["index"]
            if not np.array_equal(index, np.arange(expected, expected + len(index))):
                raise ValueError(f"{self.path(block)} holds other images than {expected} onwards; delete {self.folder}")
            expected += len(index)
            whole.take(arrays)
            if features is not None:
                features[index[0] : index[-1] + 1] = arrays["features"]
        if expected != self.images.count or whole.moments.count != self.images.count:
            raise ValueError(f"{self.folder} holds {expected} of {self.images.count} images; delete it and start again")
        whole.features = features
        return whole

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, block: int) -> dict[str, np.ndarray]:
        path = self.path(block)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and start the command again") from None

    def _claim(self) -> None:
        """Write job.json, or compare with the one that is there."""
        path = self.folder / "job.json"
        about = json.loads(json.dumps(self.about, default=str))
        if not path.is_file():
            write_json(path, about)
            return
        there = json.loads(path.read_text())
        if same_images(there.get("source"), about["source"]):
            there["source"] = about["source"]
        for key in sorted(set(about) | set(there)):
            if about.get(key) != there.get(key):
                raise ValueError(
                    f"{self.folder} holds parts of another job ({key} was {there.get(key)}, now {about.get(key)}); "
                    "pass overwrite=true to drop them, or another out="
                )
