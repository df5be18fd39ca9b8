"""Adversarial losses of tokenizers: PatchGAN, hinge and non-saturating losses, VQGAN's adaptive weight, LeCam.

PatchGAN: Isola et al., arXiv 1611.07004, in the form that VQGAN (arXiv 2012.09841) and LlamaGen (arXiv 2406.06525)
train: 4 x 4 convolutions, BatchNorm, LeakyReLU 0.2, weights N(0, 0.02); 2,765,633 parameters at width 64 and 3 layers.
LeCam: Tseng et al., arXiv 2104.03310. LlamaGen's non-saturating branch swaps logits and targets; here they stand as
in Goodfellow et al., arXiv 1406.2661.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.quantize.statistics import all_mean

GanLoss = Literal["hinge", "non_saturating"]


class PatchGAN(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, 1, h, w], one per overlapping patch (70 px at 3 layers).

    width: channels of the first layer, doubled per layer up to 8 x. layers: stride-2 convolutions.
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            # the normalisation's shift replaces the convolution's bias
            modules.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False))
            modules += [nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        modules.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*modules)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """Scalar that the tokenizer minimises, from the logits of its images."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """Scalar that the discriminator minimises, from the logits of real and reconstructed images."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at `last_layer`, within [0, 1e4], detached."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (pushed,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.float().norm() / (pushed.float().norm() + 1e-4)).clamp(0, 1e4).detach()


class LeCam(nn.Module):
    """LeCam regulariser: mean(relu(real - m_fake)^2) + mean(relu(m_real - fake)^2), m running means of the logits.

    The means live in buffers, so a resumed run continues them; they are means over all processes.
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        for mean, logits in ((self.real, real), (self.fake, fake)):
            mean.lerp_(all_mean(logits.detach().float().mean()), 1 - self.decay)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
