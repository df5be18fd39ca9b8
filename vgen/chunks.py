"""A folder of samples that many processes fill: which chunk is whose, and which are there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vtok.checkpoint import write_atomic, write_json


class Chunks:
    """The images of a folder, one PNG each, made in chunks that are shared out among tasks by number.

    Image i is made in chunk i // size whatever the number of tasks, and so always from the same batch: the same bytes.
    Files are renamed when they are whole, so a killed task goes on with the chunks that lack one.
    """

    def __init__(self, out: Path, labels: Tensor, *, size: int, task: tuple[int, int] = (0, 1)) -> None:
        self.out, self.labels, self.size, self.task = out, labels.tolist(), size, task

    def path(self, index: int) -> Path:
        return self.out / f"{index:06d}_class{self.labels[index]:04d}.png"

    def left(self) -> list[tuple[int, int]]:
        """(first image, end) of this task's chunks that lack an image."""
        own = range(self.task[0] * self.size, len(self.labels), self.task[1] * self.size)
        spans = [(start, min(start + self.size, len(self.labels))) for start in own]
        return [span for span in spans if not all(self.path(i).is_file() for i in range(*span))]

    def missing(self) -> int:
        return sum(not self.path(i).is_file() for i in range(len(self.labels)))

    def claim(self, record: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write metadata.json; images that are there are kept if they were asked for with these very settings."""
        ours, found = plain(record), recorded(self.out)
        old = list(self.out.glob("[0-9]*_class[0-9]*.png")) if self.out.is_dir() else []
        if found != ours and (old or found is not None):
            different = next((k for k in ours if (found or {}).get(k) != ours[k]), "its settings")
            if found is not None and different in found and not isinstance(found[different], (list, dict)):
                different += f" ({found[different]}, now {ours[different]})"
            if not overwrite or self.task[1] > 1:  # another task may be writing already: it is not for us to remove
                raise ValueError(
                    f"{self.out} holds images made with another {different}: remove it or give another out="
                )
            for path in old:
                path.unlink()
            if old:
                print(f"note: removed {len(old)} images of {self.out}, made with another {different}")
        if found != ours:
            write_json(self.out / "metadata.json", record)

    def write(self, start: int, images: np.ndarray) -> None:
        for i, image in enumerate(images):
            picture = Image.fromarray(image)
            write_atomic(self.path(start + i), lambda file, p=picture: p.save(file, "PNG"))


def begun(out: Path, record: Mapping[str, Any]) -> int | None:
    """The chunk of the images that `out` holds, where their record is this one but for it; None elsewhere."""
    found, ours = recorded(out), plain(record)
    return None if found is None or found | {"chunk": 0} != ours | {"chunk": 0} else found.get("chunk")


def recorded(out: Path) -> dict[str, Any] | None:
    """The record in `out` as `plain` has it; None where there is none that can be read."""
    try:
        return plain(json.loads((out / "metadata.json").read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON keeps it, whatever the command."""
    return json.loads(json.dumps(record, default=str)) | {"command": ""}
