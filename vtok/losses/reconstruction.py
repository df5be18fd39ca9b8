"""Reconstruction losses: pixels, and LPIPS (Zhang et al., arXiv 1801.03924) on VGG16 features.

LPIPS is the variant that VQGAN and its descendants train with: ImageNet VGG16, five layers, unit-normalised features,
squared differences weighted by the non-negative heads of LPIPS v0.1, spatial means, summed. Its weights are frozen and
stand in no checkpoint. They are two public files that a user fetches once; nothing is downloaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.losses.frozen import read_weights, weights_folder

VGG_FILE = "vgg16-397923af.pth"
HEADS_FILE = "vgg.pth"
SOURCES = {
    VGG_FILE: ("528 MB", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    HEADS_FILE: (
        "7 KB",
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    ),
}

# VGG16's 3 x 3 convolutions as (index in torchvision's `features`, out channels), one row per compared layer:
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3. A 2 x 2 max-pool stands between the rows.
LAYERS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
LEAST_SIDE = 2 ** (len(LAYERS) - 1)  # of a picture that the pools leave a pixel of


def pixel_loss(images: Tensor, targets: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """Mean absolute or squared difference, scalar."""
    return F.l1_loss(images, targets) if kind == "l1" else F.mse_loss(images, targets)


class LPIPS(nn.Module):
    """Perceptual distance [B] of images [B, 3, H, W] in [-1, 1], of at least 16 x 16.

    weights_path: folder that holds vgg16-397923af.pth (torchvision's) and vgg.pth (the heads). Raises ValueError that
    names the file, its size, its source and where to put it. All weights are non-persistent buffers.
    """

    def __init__(self, *, weights_path: str | Path | None = None) -> None:
        super().__init__()
        folder = weights_folder(weights_path)
        vgg, heads = _read(folder, VGG_FILE), _read(folder, HEADS_FILE)
        channels = 3
        for level, row in enumerate(LAYERS):
            for index, width in row:
                self._take(f"weight_{index}", vgg, f"features.{index}.weight", (width, channels, 3, 3), folder)
                self._take(f"bias_{index}", vgg, f"features.{index}.bias", (width,), folder)
                channels = width
            self._take(f"head_{level}", heads, f"lin{level}.model.1.weight", (1, channels, 1, 1), folder)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        if min(images.shape[2:]) < LEAST_SIDE:
            size = f"{images.shape[3]} x {images.shape[2]}"
            raise ValueError(f"LPIPS needs images of {LEAST_SIDE} x {LEAST_SIDE}, got {size}: set perceptual_weight=0")
        # one pass over both: the features of the targets need no gradient, but a second pass would cost more launches
        x = (torch.cat([images, targets]) - self.shift) / self.scale
        distance = x.new_zeros(len(images))
        for level, row in enumerate(LAYERS):
            x = F.max_pool2d(x, 2) if level else x
            for index, _ in row:
                x = F.relu(F.conv2d(x, getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}"), padding=1))
            features = x.float()  # squares of small differences: not in half precision
            features = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (features[: len(images)] - features[len(images) :]).square()
            distance = distance + (difference * getattr(self, f"head_{level}")).sum(1).mean((1, 2))
        return distance

    def _take(self, name: str, state: dict, key: str, shape: tuple[int, ...], folder: Path) -> None:
        if key not in state or tuple(state[key].shape) != shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise ValueError(f"LPIPS weights in {folder}: {key} is {found}, expected {shape}; fetch the files anew")
        self.register_buffer(name, state[key].float(), persistent=False)


def _read(folder: Path, name: str) -> dict:
    size, source = SOURCES[name]
    return read_weights(folder / name, who="LPIPS", size=size, source=source, remedy="set perceptual_weight=0")
