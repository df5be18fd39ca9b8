"""Coloured shapes by class, drawn on demand: data without a file, for tests, debugging and a first run of a config.

The class sets shape and hue; place, size and background vary by image. The pictures depend on nothing but the class
count, the split and the index: a seed changes the order and the augmentation, never the images.
"""

from __future__ import annotations

import colorsys

import numpy as np

from vtok.data.module import ImageData
from vtok.data.sources import Sources
from vtok.data.transforms import Crop, Draws
from vtok.noise import key

SHAPES = ("disc", "square", "diamond", "ring", "cross")
_FINE = 4  # samples per pixel side: smooth edges


class Fake(ImageData):
    """num_classes: 0 for images without classes. size, val_size: images in the training and the held-out set."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size: int = 16,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        crop: Crop = "none",
        flip: bool = False,
        shift: int = 0,
        window: int | None = None,
        num_classes: int = 10,
        train_images: int = 512,
        val_images: int = 128,
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
        if num_classes < 0 or train_images < 1 or val_images < 1:
            raise ValueError("data.num_classes must be 0 or more, data.train_images and data.val_images at least 1")
        self.classes, self.train_images, self.val_images = num_classes, train_images, val_images

    def prepare(self) -> Sources:
        train = ShapeSource("train", self.train_images, self.image_size, self.classes)
        val = ShapeSource("val", self.val_images, self.image_size, self.classes)
        return Sources(train, val, [f"{SHAPES[c % len(SHAPES)]} {c}" for c in range(self.classes)])


class ShapeSource:
    """`count` pictures; image i has class i mod num_classes."""

    native = True

    def __init__(self, split: str, count: int, size: int, num_classes: int) -> None:
        self.split, self.count, self.size, self.num_classes = split, count, size, num_classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draws = Draws(key(self.split == "val", index))
        label = index % self.num_classes if self.num_classes else 0
        kind = label if self.num_classes else draws.below(len(SHAPES))
        return draw_shape(kind, max(1, self.num_classes), self.size, draws), label

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"


def draw_shape(kind: int, kinds: int, size: int, draws: Draws) -> np.ndarray:
    """uint8 [size, size, 3]."""
    unit = lambda: draws.below(1 << 20) / (1 << 20)  # noqa: E731
    radius = 0.2 + 0.12 * unit()
    x0, y0 = (radius + (1 - 2 * radius) * unit() for _ in range(2))
    axis = (np.arange(size * _FINE) + 0.5) / (size * _FINE)
    x, y = (axis[None, :] - x0) / radius, (axis[:, None] - y0) / radius
    shape = SHAPES[kind % len(SHAPES)]
    if shape == "disc":
        inside = x**2 + y**2 < 1
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.85
    elif shape == "diamond":
        inside = abs(x) + abs(y) < 1.1
    elif shape == "ring":
        inside = abs(x**2 + y**2 - 0.7) < 0.3
    else:
        inside = np.minimum(abs(x), abs(y)) < 0.3
        inside &= np.maximum(abs(x), abs(y)) < 1
    cover = inside.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3))[..., None]
    colour = np.array(colorsys.hsv_to_rgb(kind / kinds, 0.85, 0.75 + 0.25 * unit()))
    background = 0.05 + 0.2 * unit()
    return np.rint(255 * (cover * colour + (1 - cover) * background)).astype(np.uint8)
