"""CIFAR-10: 50,000 training and 10,000 held-out (test) pictures of 32 x 32 in ten classes.

Source: Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images". Read from class folders
(folder/train/airplane/... and folder/test/...; jpg or png, decoded once into a cache) or from torchvision's download.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from vtok.data.files import OnBadImage, cached, one_at_a_time
from vtok.data.imagefolder import file_source, find
from vtok.data.module import ImageData
from vtok.data.sources import ArraySource, Source, Sources

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BINARY = "cifar-10-batches-py"


class Cifar10(ImageData):
    """folder: class folders under train/ and test/, or where torchvision's files are or go. download: fetch them."""

    def __init__(
        self,
        *,
        folder: str,
        download: bool = False,
        image_size: int = 32,
        batch_size: int = 64,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        flip: bool = True,
        shift: int = 0,
        window: int | None = None,
        on_bad_image: OnBadImage = "error",
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
            flip=flip,
            shift=shift,
            window=window,
            limit_train=limit_train,
            limit_val=limit_val,
        )
        self.folder, self.download = Path(folder), download
        self.on_bad_image, self.cache_dir = on_bad_image, Path(cache_dir)

    def prepare(self) -> Sources:
        if (self.folder / "train").is_dir() and (self.folder / "test").is_dir():
            return Sources(self._tree("train"), self._tree("test"), list(CLASSES))
        if not self.download and not (self.folder / BINARY).is_dir():
            raise ValueError(
                f"data.folder={self.folder} holds neither train/ and test/ with class folders nor {BINARY}/; "
                "change data.folder, or set data.download=true to fetch the data set into it"
            )
        return Sources(self._binary(train=True), self._binary(train=False), list(CLASSES))

    def _tree(self, part: str) -> Source:
        names, classes = find(self.folder / part)
        if classes != CLASSES:
            different = sorted(set(classes) ^ set(CLASSES))
            raise ValueError(
                f"{self.folder / part} is not CIFAR-10: class folders differ in {different[:3]}; use data=imagefolder"
            )
        source = file_source(self.folder / part, names, classes, self.on_bad_image)
        return cached(source, self.image_size, self.cache_dir)

    def _binary(self, *, train: bool) -> ArraySource:
        from torchvision.datasets import CIFAR10

        try:
            with one_at_a_time(self.folder / "download.lock") if self.download else nullcontext():
                data = CIFAR10(str(self.folder), train=train, download=self.download)
        except (OSError, RuntimeError) as error:  # no network, a broken download, damaged files
            raise ValueError(
                f"CIFAR-10 could not be read from or downloaded to {self.folder} ({str(error).splitlines()[0]:.150}); "
                "without a network set data.folder to class folders under train/ and test/"
            ) from None
        return ArraySource(data.data, np.asarray(data.targets, np.int64), "train" if train else "test")
