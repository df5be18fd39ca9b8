"""How a number was obtained, as data: printed with the number and stored beside it, so that two can be compared.

FID moves with the evaluator, the reference, rounding, label plan, guidance and the number of images (Parmar et al.
2022, arXiv 2104.11222; Chong and Forsyth 2020, arXiv 1911.07023). A number without these is not a result.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

LIBRARIES = ("torch", "torchvision", "torch-fidelity", "numpy", "pillow", "vtok-vgen")
ADM_IMAGES = 50_000
ADM_REFERENCES = ("VIRTUAL_imagenet256_labeled.npz", "adm_in256_stats.npz")  # the second holds mu, sigma of the first
# Fields that describe circumstances: numbers that differ only in these may stand in one table.
INCIDENTAL = ("name", "source", "seed", "versions", "device", "batch_size")


@dataclass(frozen=True)
class Protocol:
    """Every choice that moves the number.

    name: of the whole recipe; "custom" unless it is a known one.
    images: how many samples. source: what was evaluated. labels: of the samples: "balanced", "random", "none" or
    "given" (the files came as they are). seed, guidance, rule, weights: how they were drawn; None for files.
    rounding: float to uint8. resize: what the extractor does to reach its input size. file_format: how samples were
    stored; "direct" when they went from the generator straight to the extractor.
    reference, reference_images, reference_hash: the other side. splits, permutation: of the Inception score.
    extractor, extractor_hash: name and SHA-256 of its weights. score_order: in which order images were split for the
    Inception score: "permuted" or "file".
    """

    name: str
    images: int
    source: str
    labels: Literal["balanced", "random", "none", "given"]
    seed: int | None
    guidance: float | str | None
    rule: str | None
    weights: str | None
    rounding: str
    resize: str
    file_format: str
    reference: str
    reference_images: int | None
    reference_hash: str
    splits: int
    permutation: int
    extractor: str
    extractor_hash: str
    batch_size: int
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    score_order: str = "permuted"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Protocol:
        """Inverse of `to_json`. ValueError where a field is missing or unknown; files of before a field may lack it."""
        names = {f.name for f in fields(cls)}
        later = {"score_order"}
        if set(data) | later != names | later or set(data) - names:
            raise ValueError(
                f"a protocol misses {sorted(names - later - set(data))} and has unknown {sorted(set(data) - names)}"
            )
        return cls(**data)

    def lines(self) -> list[str]:
        """`key: value` lines for the terminal, in the order of the fields; what does not apply is left out."""
        shown = {k: v for k, v in asdict(self).items() if v is not None and k != "versions"}
        shown["versions"] = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return [f"  {key}: {value}" for key, value in shown.items()]

    def differs(self, other: Protocol) -> list[str]:
        """Fields by which two numbers are not comparable; [] means that they may stand in one table unmarked."""
        return [
            f.name for f in fields(self) if f.name not in INCIDENTAL and getattr(self, f.name) != getattr(other, f.name)
        ]

    def adm_reasons(self) -> list[str]:
        """Why the number is not the FID-50k of ImageNet papers; [] if it is comparable with them."""
        reasons = []
        if self.extractor != "inception":
            reasons.append(f"extractor is {self.extractor}, not the 2015 Inception")
        if self.images != ADM_IMAGES:
            reasons.append(f"{self.images} images, not {ADM_IMAGES}")
        if not self.reference.endswith(ADM_REFERENCES):
            reasons.append(f"reference is not {' or '.join(ADM_REFERENCES)}")
        if self.file_format not in ("direct", "npz", "png"):
            reasons.append(f"samples were stored as {self.file_format}")
        return reasons


def library_versions() -> dict[str, str]:
    """Versions that can move a number."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def metric_name(kind: Literal["FID", "sFID", "rFID", "IS"], extractor: str) -> str:
    """FID, sFID, rFID and IS belong to the 2015 Inception; others give FD[name], sFD[name], rFD[name], IS[name]."""
    if extractor == "inception":
        return kind
    return f"{kind.replace('FID', 'FD')}[{extractor}]"
