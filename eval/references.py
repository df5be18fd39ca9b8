"""The other side of a Frechet distance: statistics in a file, or the images they are computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.features import Extractor
from eval.measure import Measured, measure
from eval.moments import Statistics
from eval.sources import Images, from_data, npz_names, open_images
from vtok.checkpoint import file_hash, weights_hash

DATA_SPLITS = ("train", "val")


def find(reference: str, data: Any | None, extractor: Extractor) -> tuple[Statistics | None, Images | None]:
    """(statistics, None) where a file holds those of this extractor, else (None, the images).

    reference: npz of statistics (ours, ADM's, MAR's), npz of images, folder, or train | val of the data config.
    """
    path = Path(reference)
    if reference in DATA_SPLITS or path.suffix != ".npz":
        return None, reference_images(reference, data)
    names = npz_names(path)
    if not {"mu", "sigma"} <= set(names):
        return None, open_images(path)
    found = Statistics.load(path)
    if len(found.mu) == extractor.dim:
        if found.about.get("hash", extractor.hash) != extractor.hash:
            raise ValueError(
                f"{path} was made with {found.about.get('feature')} {found.about['hash'][:12]}, this is "
                f"{extractor.name} {extractor.hash[:12]}; change reference or extractor"
            )
        return found, None
    if "arr_0" not in names:
        raise ValueError(
            f"{path} holds statistics of {len(found.mu)} features, {extractor.name} has {extractor.dim}; "
            "change reference or extractor"
        )
    print(f"{path}: its statistics are not of {extractor.name}, so its images are used")
    return None, open_images(path)


def reference_images(reference: str, data: Any | None, *, why: str = "manifold=true") -> Images:
    """The images behind `reference`, for what needs more than statistics. ValueError where it has none."""
    if reference in DATA_SPLITS:
        if data is None:
            raise ValueError(
                f"reference={reference} is a split of a data set: add data=<config>, for example data=digits"
            )
        return from_data(data, reference)
    path = Path(reference)
    if path.suffix == ".npz" and "arr_0" not in npz_names(path):
        raise ValueError(f"{why} needs the images of reference={reference}, which holds statistics only")
    return open_images(path)


def reference_statistics(
    reference: str, data: Any | None, extractor: Extractor, *, batch_size: int
) -> tuple[Statistics, str, str]:
    """Statistics of the other side in one pass, its description and a hash that identifies it."""
    statistics, images = find(reference, data, extractor)
    if statistics is not None:
        return statistics, reference, file_hash(reference)
    made = described(measure(images, extractor, batch_size=batch_size, text="reference"), images, extractor)
    return made, images.name, statistics_hash(made)


def described(measured: Measured, images: Images, extractor: Extractor) -> Statistics:
    """The statistics of a pass over `images`, with what made them."""
    statistics = measured.moments.statistics(
        feature=extractor.name,
        hash=extractor.hash,
        resize=extractor.resize,
        source=images.name,
        file_format=images.file_format,
    )
    statistics.spatial = measured.spatial.statistics() if measured.spatial else None
    return statistics


def statistics_hash(statistics: Statistics) -> str:
    """SHA-256 of mean and covariance: names a reference whose images were read here."""
    return weights_hash({"mu": statistics.mu, "sigma": statistics.sigma})
