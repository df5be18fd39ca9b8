"""The side tokens of Hita's encoder: class and patch tokens of a frozen DINOv2 with registers.

DINOv2: Oquab et al., arXiv 2304.07193; registers: Darcet et al., arXiv 2309.16588. The weights are read when images are
first encoded: decoding needs none of it. The network is in no checkpoint of the tokenizer.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.config import Configured
from vtok.losses.backbone import Backbone
from vtok.losses.frozen import find_weights, read_weights


class DinoTokens(Configured, nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to [B, 1 + n, D]: class token, then the n patches, after the last norm.

    model: timm's name with its tag. weights_path: the file <model>.safetensors, or its folder; None: see
    vtok.losses.frozen. size: side to which images are resized.
    """

    def __init__(
        self,
        *,
        model: str = "vit_large_patch14_reg4_dinov2.lvd142m",
        weights_path: str | None = None,
        size: int = 224,
    ) -> None:
        super().__init__()
        self.model, self.weights_path, self.size = model, weights_path, size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError where the file of the weights is missing or does not fit."""
        path = find_weights(self.weights_path, f"{self.model}.safetensors")
        label, patches = network(self.model, path, self.size, images.device)(resized(images.float(), self.size))
        return torch.cat([label.unsqueeze(1), patches], 1)


@functools.lru_cache(maxsize=2)  # a tokenizer and its averaged copy share one network
def network(model: str, path: Path, size: int, device: torch.device) -> Backbone:
    if not path.is_file():
        read_weights(
            path,
            who="Hita's encoder",
            size="about 1.2 GB",
            source=f"https://huggingface.co/timm/{model} (model.safetensors)",
            remedy="train without side tokens by tokenizer.side=null tokenizer.side_channels=null",
        )
    return Backbone(model=model, size=size, weights_path=path).requires_grad_(False).eval().to(device)


def resized(images: Tensor, size: int) -> Tensor:
    """[B, 3, size, size] as the original resizes (kornia): a slight blur, then bicubic with aligned corners."""
    for axis in (2, 3):
        factor = images.shape[axis] / size
        if factor > 1:
            images = blurred(images, axis, max((factor - 1) / 2, 1e-3))
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True).clamp(-1, 1)


def blurred(images: Tensor, axis: int, sigma: float) -> Tensor:
    """Gaussian along `axis` (2 or 3) over max(4 sigma, 3) pixels, made odd; the edges are mirrored."""
    radius = int(max(4 * sigma, 3)) // 2
    place = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.softmax(-0.5 * (place / sigma).square(), 0)
    lines = images.movedim(axis, -1)
    padded = F.pad(lines.flatten(1, 2), (radius, radius), mode="reflect").view(*lines.shape[:3], -1)
    return (padded.unfold(-1, 2 * radius + 1, 1) * weights).sum(-1).movedim(-1, axis)  # a product, lest autocast rounds
