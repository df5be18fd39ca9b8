"""1,797 scanned handwritten digits of 8 x 8 pixels, committed with the package: the data of the demo and of the tests.

Source: Alpaydin & Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, CC BY
4.0, in the form known from scikit-learn (see DIGITS.md beside this file). Differs: a pixel becomes a square block of
`image_size` / 8 pixels, as RGB, so that block means give the scan back; a fixed fifth of every class is held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vtok.data.module import ImageData
from vtok.data.sources import ArraySource, Sources
from vtok.noise import key

FILE = Path(__file__).with_name("digits.npz")
_SPLIT = 1998  # part of the definition of the held-out set: never change it


class Digits(ImageData):
    """shift: optional augmentation, moves a digit by up to that many pixels (a scanned pixel is image_size / 8)."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size: int = 64,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        shift: int = 0,
        window: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            accumulate=accumulate,
            workers=workers,
            seed=seed,
            crop="none",
            shift=shift,
            window=window,
            limit_train=limit_train,
            limit_val=limit_val,
        )
        if image_size % 8:
            raise ValueError(f"data.image_size={image_size} must be a multiple of 8, the side of the scanned digits")

    def prepare(self) -> Sources:
        digits, labels = read_digits()
        held_out = held_out_digits(labels)
        images = enlarge(digits, self.image_size)
        parts = []
        for chosen in (np.setdiff1d(np.arange(len(labels)), held_out), held_out):
            names = [f"digits/{i}" for i in chosen]
            parts.append(ArraySource(images[chosen], labels[chosen], names))
        return Sources(parts[0], parts[1], [str(d) for d in range(10)])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey values 0..16, uint8 [1797, 8, 8], and labels 0..9, int64 [1797]."""
    with np.load(FILE, allow_pickle=False) as file:
        digits, labels = file["x"], file["y"]
    assert digits.shape == (1797, 8, 8) and digits.dtype == np.uint8 and digits.max() == 16, (
        digits.shape,
        digits.max(),
    )
    assert labels.shape == (1797,) and set(labels.tolist()) == set(range(10)), labels.shape
    return digits, labels.astype(np.int64)


def held_out_digits(labels: np.ndarray) -> np.ndarray:
    """Sorted indices of the held-out digits: of every class the fifth (rounded) with the smallest hash of its index."""
    chosen: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: key(_SPLIT, i))
        chosen += members[: round(len(members) / 5)]
    return np.array(sorted(chosen))


def enlarge(digits: np.ndarray, size: int) -> np.ndarray:
    """uint8 0..16 [N, 8, 8] to uint8 0..255 [N, size, size, 3], every pixel a square block.

    Smooth interpolation would look nicer, but its block means are not the scanned values, and whoever recomputes a
    figure from samples compares those.
    """
    blocks = np.kron(digits.astype(np.float64), np.ones((size // 8, size // 8)))
    return np.repeat(np.rint(blocks * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
