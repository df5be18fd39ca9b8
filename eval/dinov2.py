"""DINOv2 as an extractor: FD[dinov2], which ranks generators closer to people than Inception does.

Stein et al. 2023, arXiv 2306.04675; preprocessing as EDM2's calculate_metrics.py has it: 224 px, bicubic with
antialiasing, ImageNet's mean and standard deviation, the class token after the last norm of ViT-L/14 (1024 numbers).
timm resamples the positions from 518 to 224 px a little differently than DINOv2's own code (third digit of features),
so compare numbers of this extractor with each other; torch-fidelity's DINOv2 resizes otherwise, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.features import Activations, check_images
from vtok.checkpoint import file_hash
from vtok.losses.backbone import Backbone
from vtok.losses.frozen import find_weights

MODEL = "vit_large_patch14_dinov2.lvd142m"
SIDE = 224


class DinoV2:
    """Class tokens of timm's `model`; no logits, so no score. weights_path: <model>.safetensors or its folder."""

    spatial_dim = 0
    classes = None
    has_logits = False
    resize = f"to {SIDE} x {SIDE}, bicubic with antialias"

    def __init__(
        self, *, model: str = MODEL, weights_path: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        path = find_weights(weights_path, f"{model}.safetensors")
        if not path.is_file():
            raise ValueError(
                f"extractor=dinov2 needs {model}.safetensors (1.2 GB), not found in {path.parent}\n"
                f"get model.safetensors from https://huggingface.co/timm/{model} under that name\n"
                "and pass weights_path=FILE, or set VTOK_WEIGHTS to its folder"
            )
        self.backbone = Backbone(model=model, size=SIDE, weights_path=path).to(device).eval()
        self.device = torch.device(device)
        self.name = "dinov2" if model == MODEL else model
        self.hash = file_hash(path)
        self.dim = self.backbone.net.num_features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Activations:
        check_images(images)
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        tokens = self.backbone.net.forward_features((x - self.backbone.mean) / self.backbone.std)
        return Activations(tokens[:, 0].float(), None)
