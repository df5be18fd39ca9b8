"""Feature extractors behind one interface: uint8 images [B, H, W, 3] in, features and logits out.

`inception` is the 2015 TensorFlow graph in torch-fidelity's port, the only network whose Frechet distance may be called
FID; its weights are not in the clone. `cifar` is the judge of eval/judge.py. `auto` takes the first where its weights
are found and otherwise the second, and says so.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from eval.judge import SIDE, WEIGHTS, load_judge, to_float
from vtok.checkpoint import file_hash

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_MB = 95
INCEPTION_PREFIX = "6726825d"  # of the SHA-256, as in the file's name
INCEPTION_PAGE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"


class Activations(NamedTuple):
    features: Tensor  # float32 [B, dim]
    logits: Tensor | None  # float32 [B, classes], where the extractor classifies
    spatial: Tensor | None = None  # float32 [B, spatial_dim], where the extractor has features with places (sFID)


class Extractor(Protocol):
    name: str  # as in FD[name]; "inception" makes it FID
    dim: int
    spatial_dim: int  # 0 where there are none
    hash: str  # SHA-256 of the weights file
    resize: str  # what happens to images of another size
    classes: list[str] | None  # names, where the logits are class scores that mean something for the data

    def __call__(self, images: Tensor) -> Activations: ...


class Inception:
    """torch-fidelity's port of the 2015-12-05 graph: pool features (2048) and logits without bias (1008); for sFID the
    first 7 channels of `mixed_6/conv` on its 17 x 17 places (2023 numbers, place after place), as in ADM's evaluator.

    weights_path: local file; None searches $VTOK_WEIGHTS (a folder or the file) and the torch hub folder. Weights whose
    SHA-256 is not the published one get a name of their own, so that their number is not taken for FID.
    """

    dim = 2048
    spatial_dim = 7 * 17 * 17
    classes = None
    resize = "to 299 x 299, bilinear of TensorFlow 1 (no antialias, corner-aligned grid)"

    def __init__(self, *, weights_path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_inception(weights_path)
        if path is None:
            raise ValueError(missing_inception(weights_path))
        self.hash = file_hash(path)
        known = self.hash.startswith(INCEPTION_PREFIX)
        self.name = "inception" if known else f"inception-{self.hash[:8]}"
        try:
            # torch-fidelity unpickles without restriction; a file that passes here holds tensors only.
            torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is damaged or holds more than weights ({first:.160})") from None
        features = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(path))
        self.network.to(device)
        self.device = torch.device(device)
        self._seen: list[Tensor] = []  # the port's name of mixed_6/conv; after its ReLU
        self.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: self._seen.append(out))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Activations:
        check_images(images)
        features, logits = self.network(images.to(self.device).permute(0, 3, 1, 2))
        places = self._seen.pop()[:, :7].permute(0, 2, 3, 1).flatten(1).float()
        return Activations(features, logits, places)


class CifarJudge:
    """The CIFAR-10 judge: 208 features and 10 logits; images of another size are resized to 32 x 32."""

    name = "cifar"
    spatial_dim = 0
    resize = f"to {SIDE} x {SIDE}, bilinear with antialias"

    def __init__(self, *, weights_path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        path = Path(weights_path or WEIGHTS)
        judge, about = load_judge(path)
        self.network = judge.to(device)
        self.device = torch.device(device)
        self.hash = file_hash(path)
        self.dim = about["widths"][-1]
        self.classes: list[str] | None = about["classes"]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Activations:
        check_images(images)
        x = to_float(images.to(self.device).permute(0, 3, 1, 2))
        if x.shape[2:] != (SIDE, SIDE):
            x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return Activations(*self.network(x))


def make_extractor(
    name: str,
    *,
    weights_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Extractor:
    """name: inception | cifar | dinov2 | auto. `say` gets the sentence that tells what `auto` chose."""
    if name == "inception":
        return Inception(weights_path=weights_path, device=device)
    if name == "cifar":
        return CifarJudge(weights_path=weights_path, device=device)
    if name == "dinov2":
        from eval.dinov2 import DinoV2

        return DinoV2(weights_path=weights_path, device=device)
    if name != "auto":
        raise ValueError(f"extractor={name}: choose inception, cifar, dinov2 or auto")
    if find_inception(weights_path) is not None:
        return Inception(weights_path=weights_path, device=device)
    if weights_path is not None:
        raise ValueError(missing_inception(weights_path))
    say(
        f"extractor=auto: no Inception weights ({INCEPTION_FILE}), so the CIFAR-10 judge: this gives FD[cifar], not FID"
    )
    return CifarJudge(device=device)


def find_inception(weights_path: str | Path | None = None) -> Path | None:
    """The weights file: `weights_path` (file or folder) if given, else $VTOK_WEIGHTS, else the torch hub folder."""
    places = (
        [weights_path] if weights_path else [os.environ.get("VTOK_WEIGHTS"), Path(torch.hub.get_dir(), "checkpoints")]
    )
    for place in filter(None, places):
        for path in (Path(place), Path(place) / INCEPTION_FILE):
            if path.is_file():
                return path
    return None


def missing_inception(weights_path: str | Path | None) -> str:
    looked = weights_path or f"$VTOK_WEIGHTS and {Path(torch.hub.get_dir(), 'checkpoints')}"
    return (
        f"Inception weights {INCEPTION_FILE} ({INCEPTION_MB} MB) not found in {looked}\n"
        f"get them from {INCEPTION_PAGE}\n"
        "and pass weights_path=FILE, or set VTOK_WEIGHTS to their folder, or choose extractor=cifar (gives FD[cifar])"
    )


def check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}, expected uint8 [B, H, W, 3]")
