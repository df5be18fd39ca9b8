"""The formulas of a tokenizer's GAN: hinge and non-saturating losses, VQGAN's adaptive weight, LeCam.

Hinge: Lim and Ye, arXiv 1705.02894, halved as in VQGAN (arXiv 2012.09841). Non-saturating: Goodfellow et al., arXiv
1406.2661; VQGAN calls its softplus form "vanilla". LlamaGen's non-saturating branch swaps logits and targets; here they
stand as in the paper. LeCam: Tseng et al., arXiv 2104.03310.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.precision import full
from vtok.quantize.statistics import all_mean

GanLoss = Literal["hinge", "non_saturating", "softplus"]
GAN_LOSSES = ("hinge", "non_saturating", "softplus")  # the last two are two names of one function


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """Scalar that the tokenizer minimises, from the logits of its images."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """Scalar that the discriminator minimises, from the logits of real and reconstructed images."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, eps: float = 1e-4, most: float = 1e4
) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + eps) at `last_layer`, within [0, most], detached.

    The gradients are averaged over the processes first, so the weight is that of one process with the whole batch.
    """
    with torch.autocast(last_layer.device.type, enabled=False):  # as the backward pass itself
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (pushed,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    wanted, pushed = all_mean(full(wanted)), all_mean(full(pushed))
    return (wanted.norm() / (pushed.norm() + eps)).clamp(0, most).detach()


LeCamOf = Literal["logits", "mean"]


class LeCam(nn.Module):
    """LeCam regulariser: mean(relu(real - m_fake)^2) + mean(relu(m_real - fake)^2), m running means of the logits.

    The means live in buffers, so a resumed run continues them; they are means over all processes. of: what real and
    fake are, every logit (Open-MAGVIT2, IBQ, DetailFlow), or the mean logit of the batch (1d-tokenizer).
    """

    def __init__(self, *, decay: float = 0.999, of: LeCamOf = "logits") -> None:
        super().__init__()
        if of not in ("logits", "mean"):
            raise ValueError(f"gan.lecam_of={of!r}: choose logits or mean")
        self.decay, self.of = decay, of
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        for mean, logits in ((self.real, real), (self.fake, fake)):
            now = all_mean(full(logits.detach()).mean())
            # a step that on_nan=skip drops must not stay in the mean for ever
            mean.lerp_(torch.where(now.isfinite(), now, mean), 1 - self.decay)
        if self.of == "mean":
            real, fake = real.mean(), fake.mean()
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()
