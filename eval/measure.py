"""One pass of an extractor over images, and what it leaves: moments, Inception scores, right labels, features.

What a pass over a part of the images leaves can be stored and added to that of another part: see eval/blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from eval.features import Extractor
from eval.moments import InceptionScore, Moments
from eval.progress import progress_bar
from eval.sources import Images


@dataclass
class Measured:
    """What a pass over images gives. score: after the fixed permutation; file_order: as ADM's evaluator splits.

    right: how many labels the extractor's classifier names; None where it was not asked. features [n, dim] float32 of
    the images of this pass, where they were to be kept (they may lie in a memory-mapped file).
    """

    images: int  # of the whole set
    moments: Moments
    spatial: Moments | None
    score: InceptionScore | None
    file_order: InceptionScore | None
    hits: int | None
    features: np.ndarray | None = None

    @property
    def right(self) -> float | None:
        """Share of the images whose label the classifier names."""
        return None if self.hits is None else self.hits / self.images

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays for an npz, bit for bit."""
        found = self.moments.arrays("moments_")
        for prefix, part in (("spatial_", self.spatial), ("score_", self.score), ("file_order_", self.file_order)):
            found |= part.arrays(prefix) if part is not None else {}
        if self.hits is not None:
            found["hits"] = np.array(self.hits)
        return found | ({"features": self.features} if self.features is not None else {})

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what `arrays` says about other images of the same set; features are left to the caller."""
        self.moments.merge(Moments.restore(arrays, "moments_"))
        if self.spatial is not None:
            self.spatial.merge(Moments.restore(arrays, "spatial_"))
        if self.score is not None:
            self.score.take(arrays, "score_")
            self.file_order.take(arrays, "file_order_")
        if self.hits is not None:
            self.hits += int(arrays["hits"])


def empty(
    images: Images,
    extractor: Extractor,
    *,
    splits: int | None = None,
    permutation: int = 2020,
    class_accuracy: bool = False,
) -> Measured:
    """Nothing measured yet. splits: of the Inception score; None leaves it out."""
    score = InceptionScore(images.count, splits=splits, seed=permutation) if splits else None
    return Measured(
        images.count,
        Moments(extractor.dim),
        Moments(extractor.spatial_dim) if extractor.spatial_dim else None,
        score,
        InceptionScore(images.count, splits=splits, seed=None) if splits else None,
        0 if class_accuracy else None,
    )


def measure(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int,
    splits: int | None = None,
    permutation: int = 2020,
    class_accuracy: bool = False,
    keep: np.ndarray | None = None,
    text: str = "features",
    span: tuple[int, int] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measured:
    """One pass: moments, with `splits` also the Inception score, with `class_accuracy` also right labels.

    keep: array [n, dim] that gets the features. span: (start, stop) of the images to look at; None = all. advance: told
    how many more are done; None shows a progress bar named `text`.
    """
    if advance is None:
        with progress_bar(text, images.count) as own:
            return measure(
                images, extractor, batch_size=batch_size, splits=splits, permutation=permutation,
                class_accuracy=class_accuracy, keep=keep, span=span, advance=own,
            )  # fmt: skip
    found = empty(images, extractor, splits=splits, permutation=permutation, class_accuracy=class_accuracy)
    found.features = keep
    first, last = span or (0, images.count)
    place = first
    for batch in images.part(batch_size, first, last) if span else images.batches(batch_size):
        features, logits, places = extractor(batch)
        found.moments.add(features)
        if found.spatial is not None:
            found.spatial.add(places)
        if keep is not None:
            keep[place - first : place - first + len(batch)] = features.cpu().numpy()
        index = torch.arange(place, place + len(batch))
        if found.score is not None:
            found.score.add(index, logits)
            found.file_order.add(index, logits)
        if found.hits is not None:
            found.hits += int((logits.argmax(1).cpu() == images.labels[index]).sum())
        place += len(batch)
        advance(len(batch))
    return found
