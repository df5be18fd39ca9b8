"""Stage one of TiTok (Yu et al., arXiv 2406.07550, section 3.3): predict the codes that a trained VQGAN gives an image.

A term of the objective: the cross-entropy between the tokenizer's `features["proxy_logits"]` and the teacher's ids. The
teacher is a trained MaskGITVQGAN (vtok.convert, family maskgit_vqgan) or any tokenizer with one id per patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.checkpoint import best_weights, load_module
from vtok.losses.frozen import Frozen
from vtok.tokenizer import Reconstruction, Tokenizer


class ProxyCodes(nn.Module):
    """teacher: run, checkpoint or folder of the trained tokenizer (averaged weights, where it has them), or the
    tokenizer itself. weight: of the loss. label: its name in the logs."""

    lr_scale = 1.0

    def __init__(self, *, teacher: str | Tokenizer, weight: float = 1.0, label: str = "proxy") -> None:
        super().__init__()
        if not isinstance(teacher, Tokenizer):
            from vtok.models import FAMILIES

            teacher = load_module(teacher, FAMILIES, best_weights(teacher))
        if not teacher.spec.discrete:
            raise ValueError(f"the teacher, a {type(teacher).__name__}, has continuous tokens: proxy codes are ids")
        self.teacher, self.weight, self.label = Frozen(teacher), weight, label

    def forward(
        self,
        recon: Reconstruction,
        images: Tensor,
        *,
        step: int = 0,
        progress: float = 0.0,
        key: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> dict[str, Tensor]:
        """{label: mean cross-entropy in nats a patch, weighted} of images [B, 3, H, W] in [-1, 1]."""
        logits = recon.features.get("proxy_logits")
        if logits is None:
            raise ValueError("objective term proxy: the tokenizer gives no proxy_logits; use TiTok with a ProxyHead")
        with torch.autocast(images.device.type, enabled=False):  # the ids are targets: decided in float32
            ids = self.teacher.net.encode(images.float())
        if ids.shape != logits.shape[:2]:
            raise ValueError(
                f"the teacher gives {tuple(ids.shape)} ids, the tokenizer logits for {tuple(logits.shape[:2])}: its "
                "stride must be that of the teacher"
            )
        return {self.label: self.weight * F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())}
