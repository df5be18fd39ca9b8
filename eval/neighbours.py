"""Figures for small data sets, where a Frechet distance says little: accuracy, spread, nearest, coverage.

    python -m eval.neighbours samples=outputs/demo/samples.npz

Everything is measured between vectors in plain pixel space: an image is averaged over blocks to 8 x 8 grey values in
[0, 1], 64 numbers, Euclidean distance. Real digits are the scanned 8 x 8 values over 16, which the training images have
as their block means, so that anyone can recompute each figure from samples.npz and the digits:

- class_accuracy: share of samples that a nearest-neighbour classifier over the real training digits gives the class
  that was asked for. real_class_accuracy: the same for held-out digits.
- spread: mean distance between two samples of one class, averaged over classes, over the same for training digits.
- nearest: median distance from a sample to its nearest training digit, over that from held-out to training digits.
  Below one half, say, the generator recites.
- coverage: Naeem et al. 2020, arXiv 2002.09797, equation 3: share of held-out digits with at least one sample inside
  their ball, whose radius is the distance to the 5th nearest other held-out digit. It grows with the number of samples,
  so the first 36 of each class are taken. `real_coverage` is that of 36 training digits a class: about the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtok.cli import entry

SIDE = 8
PER_CLASS = 36
BALL = 5
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def vectors(images: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 [N, H, W, 3] to float64 [N, side * side] in [0, 1]: mean over channels, then over blocks."""
    count, height, width, channels = images.shape
    if height % side or width % side:
        raise ValueError(f"images are {height} x {width}; both sides must be multiples of {side}")
    blocks = images.reshape(count, side, height // side, side, width // side, channels)
    return blocks.mean(axis=(2, 4, 5), dtype=np.float64).reshape(count, -1) / 255


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [len(a), len(b)], from differences: the expanded square loses half the digits near zero."""
    return np.stack([np.sqrt(np.square(b - row).sum(axis=1)) for row in a])


def class_accuracy(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Share of samples whose nearest real vector has their label."""
    return float((real_labels[distances(samples, real).argmin(axis=1)] == labels).mean())


def mean_distance(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between two different vectors of one class, averaged over the classes that have two."""
    found = []
    for label in np.unique(labels):
        own = x[labels == label]
        if len(own) > 1:
            found.append(distances(own, own).sum() / (len(own) * (len(own) - 1)))
    if not found:
        raise ValueError("spread needs a class with two samples; draw more with per_class")
    return float(np.mean(found))


def coverage(samples: np.ndarray, held_out: np.ndarray, k: int = BALL) -> float:
    """Share of `held_out` with a sample within the distance to their k-th nearest other held-out vector."""
    if len(held_out) <= k:
        raise ValueError(f"coverage needs more than {k} real images, got {len(held_out)}")
    among = distances(held_out, held_out)
    np.fill_diagonal(among, np.inf)  # a digit is not its own neighbour, but an equal one may be
    radius = np.partition(among, k - 1, axis=1)[:, k - 1]
    return float((distances(held_out, samples).min(axis=1) <= radius).mean())


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` items of every class, in file order. ValueError where a class has fewer."""
    chosen = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < count:
            raise ValueError(f"class {label} has {len(own)} samples, coverage takes {count} of each: raise per_class")
        chosen.append(own[:count])
    return np.sort(np.concatenate(chosen))


def figures(
    samples: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    train_labels: np.ndarray,
    held_out: np.ndarray,
    held_out_labels: np.ndarray,
    *,
    per_class: int = PER_CLASS,
) -> dict[str, float]:
    """All figures, from vectors [N, d] and labels [N] of samples, real training images and real held-out images."""
    reals = first_of_each(train_labels, per_class)
    return {
        "class_accuracy": class_accuracy(samples, labels, train, train_labels),
        "real_class_accuracy": class_accuracy(held_out, held_out_labels, train, train_labels),
        "spread": mean_distance(samples, labels) / mean_distance(train, train_labels),
        "nearest": float(
            np.median(distances(samples, train).min(axis=1)) / np.median(distances(held_out, train).min(axis=1))
        ),
        "coverage": coverage(samples[first_of_each(labels, per_class)], held_out),
        "real_coverage": coverage(train[reals], held_out),
    }


def digit_figures(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All figures of samples uint8 [N, H, W, 3] that should be digits, at any size that is a multiple of 8."""
    from vtok.data.digits import held_out_digits, read_digits

    digits, answers = read_digits()
    held = held_out_digits(answers)
    train = np.setdiff1d(np.arange(len(answers)), held)
    real = digits.reshape(len(digits), -1) / 16
    return figures(vectors(images), labels, real[train], answers[train], real[held], answers[held])


@entry("eval_neighbours", CONFIGS)
def main(config: Mapping[str, Any]) -> None:
    from eval.sources import from_npz
    from vtok.checkpoint import write_json

    images = from_npz(config.samples)
    if images.labels is None:
        raise ValueError(f"{config.samples} holds no labels (arr_1)")
    found = digit_figures(np.concatenate([b.numpy() for b in images.batches(1024)]), images.labels.numpy())
    for name, value in found.items():
        print(f"{name} {value:.4f}")
    if config.out:
        write_json(config.out, found)


if __name__ == "__main__":
    main()
