"""Known protocols as data: `protocol=adm` and `protocol=torch_fidelity` fix what the papers' numbers fix.

A preset fills in the keys of configs/eval_fid.yaml that are null, and refuses other values: a number with one choice
changed is another protocol and is called custom. Sources: Dhariwal and Nichol 2021, arXiv 2105.05233 (OpenAI's
evaluator, used by VAR, LlamaGen and most of the field); MAR, arXiv 2406.11838, and xAR, arXiv 2502.20388, whose
evaluation is torch-fidelity against the same statistics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class ReferenceFile:
    """A file that the user fetches once. size: for the message."""

    name: str
    size: str
    page: str


@dataclass(frozen=True)
class Preset:
    """What a protocol fixes. order: of the images before they are split for the Inception score's headline.

    manifold: precision and recall (k = 3) against the images inside the reference file.
    """

    images: int
    labels: str
    extractor: str
    reference: ReferenceFile
    splits: int
    permutation: int
    order: Literal["file", "permuted"]
    manifold: bool


VIRTUAL = ReferenceFile(
    "VIRTUAL_imagenet256_labeled.npz",
    "about 2 GB: mu, sigma, mu_s, sigma_s over the training set, and 10,000 images",
    "https://github.com/openai/guided-diffusion/tree/main/evaluations (ImageNet 256x256 reference batch)",
)
ADM_STATISTICS = ReferenceFile(
    "adm_in256_stats.npz", "about 34 MB: mu and sigma of VIRTUAL", "https://github.com/LTH14/mar (fid_stats/)"
)
PRESETS = {
    "adm": Preset(50_000, "balanced", "inception", VIRTUAL, 10, 2020, "file", True),
    "torch_fidelity": Preset(50_000, "balanced", "inception", ADM_STATISTICS, 10, 2020, "permuted", False),
}
CUSTOM = {"labels": "balanced", "extractor": "auto", "splits": 10, "permutation": 2020, "manifold": False}


def settle(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the protocol's choices filled in, and `order` of the Inception score.

    Raises ValueError for an unknown protocol, for a key that contradicts it, and for a missing reference.
    """
    name = config.get("protocol") or "custom"
    filled = dict(config)
    if name == "custom":
        for key, value in CUSTOM.items():
            if filled.get(key) is None:
                filled[key] = value
        if filled.get("reference") is None:
            raise ValueError("reference is not given: pass reference=<npz, folder, train or val>, or protocol=adm")
        return {**filled, "protocol": name, "order": "permuted"}
    if name not in PRESETS:
        raise ValueError(f"protocol={name}: choose custom, {' or '.join(PRESETS)}")
    preset = PRESETS[name]
    for key in ("images", "labels", "extractor", "splits", "permutation", "manifold"):
        wanted, given = getattr(preset, key), filled.get(key)
        if given not in (None, wanted, "auto"):
            raise ValueError(f"protocol={name} fixes {key}={wanted}, got {key}={given}; for that pass protocol=custom")
        filled[key] = wanted
    filled["reference"] = str(find_reference(preset.reference, filled.get("reference")))
    return {**filled, "protocol": name, "order": preset.order}


def find_reference(file: ReferenceFile, given: str | None) -> Path:
    """`given` (the file or its folder), else the file in $VTOK_WEIGHTS or in torch's hub folder."""
    hub = Path(torch.hub.get_dir(), "checkpoints")
    places = [Path(given)] if given else [Path(p) for p in (os.environ.get("VTOK_WEIGHTS"), hub) if p]
    for place in places:
        for path in (place, place / file.name):
            if path.is_file() and path.name == file.name:
                return path
    raise ValueError(
        f"reference {file.name} ({file.size}) not found in {' and '.join(map(str, places))}\n"
        f"get it from {file.page}\nand pass reference=FILE, or set VTOK_WEIGHTS to its folder"
    )
