"""The training objective of a reconstructing tokenizer: pixels + LPIPS + bottleneck losses + a patch GAN.

total = w_p * pixel + w_l * LPIPS + sum(bottleneck losses) + w_a * w_g * G(fake), w_a = 1 or VQGAN's adaptive weight
(Esser et al., arXiv 2012.09841, eq. 7). The GAN is exactly absent before `gan_start` (LlamaGen, arXiv 2406.06525:
step 20,000): the discriminator is not run then. Nothing is remembered between calls except parameters and buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vtok.losses.adversarial import LeCam, PatchGAN, adaptive_weight, discriminator_loss, generator_loss
from vtok.losses.reconstruction import LPIPS, pixel_loss
from vtok.tokenizer import Reconstruction

Logs = dict[str, Tensor]


class TokenizerObjective(nn.Module):
    """Two losses, one for the tokenizer and one for the discriminator.

    pixel, pixel_weight: "l1" or "l2" between images in [-1, 1].
    perceptual_weight: weight of LPIPS; 0 builds none and needs no weights file. weights: folder of the LPIPS files.
    gan_weight: weight of the generator's adversarial loss; 0 builds no discriminator (`discriminator` is None).
    gan_loss: "hinge" or "non_saturating". gan_start: first optimizer step with a GAN. adaptive: multiply by the ratio
    of the gradient norms at the decoder's last layer. lecam_weight: LeCam regulariser of the discriminator.
    discriminator_width, discriminator_layers: 64 and 3 are the published PatchGAN.

    The training loop calls `generator_loss` at every step, and `discriminator_loss` where `gan_active(step)` is true.
    """

    def __init__(
        self,
        *,
        pixel: Literal["l1", "l2"] = "l2",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        gan_weight: float = 0.5,
        gan_loss: Literal["hinge", "non_saturating"] = "hinge",
        gan_start: int = 20_000,
        adaptive: bool = False,
        lecam_weight: float = 0.0,
        discriminator_width: int = 64,
        discriminator_layers: int = 3,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if pixel not in ("l1", "l2"):
            raise ValueError(f"pixel={pixel!r}: choose l1 or l2")
        if gan_loss not in ("hinge", "non_saturating"):
            raise ValueError(f"gan_loss={gan_loss!r}: choose hinge or non_saturating")
        for name, value in (("perceptual_weight", perceptual_weight), ("gan_weight", gan_weight)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.pixel, self.pixel_weight = pixel, pixel_weight
        self.perceptual_weight, self.gan_weight = perceptual_weight, gan_weight
        self.gan_loss, self.gan_start, self.adaptive = gan_loss, gan_start, adaptive
        self.lecam_weight = lecam_weight
        self.perceptual = LPIPS(weights=weights) if perceptual_weight else None
        self.discriminator = None
        self.lecam = None
        if gan_weight:
            self.discriminator = PatchGAN(width=discriminator_width, layers=discriminator_layers)
            self.lecam = LeCam() if lecam_weight else None

    def gan_active(self, step: int) -> bool:
        """Whether the GAN takes part in optimizer step `step` (counted from 0)."""
        return self.discriminator is not None and step >= self.gan_start

    def generator_loss(
        self, recon: Reconstruction, images: Tensor, last_layer: nn.Parameter | None, step: int
    ) -> tuple[Tensor, Logs]:
        """Loss of the tokenizer, float32 scalar, and its weighted terms, detached.

        recon: what the tokenizer's forward returned for `images` [B, 3, H, W] in [-1, 1]. last_layer: weight of the
        last decoder layer, needed only with `adaptive`. step: optimizer step. The discriminator gets no gradient.
        """
        fake, real = recon.images.float(), images.float()
        reconstruction = self.pixel_weight * pixel_loss(fake, real, self.pixel)
        logs = {"pixel": reconstruction.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual_weight * self.perceptual(fake, real).mean()
            reconstruction = reconstruction + perceptual
            logs["perceptual"] = perceptual.detach()
        loss = reconstruction
        for name, value in recon.losses.items():
            loss = loss + value
            logs[name] = value.detach()
        if self.gan_active(step):
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            adversarial = generator_loss(functional_call(self.discriminator, frozen, (fake,)).float(), self.gan_loss)
            weight = fake.new_tensor(self.gan_weight)
            if self.adaptive:
                if last_layer is None:
                    raise ValueError("adaptive=true needs the tokenizer's last_layer; set adaptive=false")
                weight = weight * adaptive_weight(reconstruction, adversarial, last_layer)
            loss = loss + weight * adversarial
            logs |= {"adversarial": (weight * adversarial).detach(), "adversarial_weight": weight}
        return loss, logs | {"loss": loss.detach()}

    def discriminator_loss(self, images: Tensor, fakes: Tensor, step: int) -> tuple[Tensor, Logs]:
        """Loss of the discriminator on real `images` and on `fakes`, both [B, 3, H, W]; fakes are detached here.

        Before `gan_start` it is a zero with zero gradients; a loop should then skip the discriminator's optimizer.
        """
        if self.discriminator is None:
            raise ValueError("gan_weight=0 builds no discriminator; do not call discriminator_loss")
        if not self.gan_active(step):
            return sum(0.0 * p.sum() for p in self.discriminator.parameters()), {}
        real = self.discriminator(images.float()).float()
        fake = self.discriminator(fakes.detach().float()).float()
        loss = discriminator_loss(real, fake, self.gan_loss)
        logs = {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
        if self.lecam is not None:
            regulariser = self.lecam_weight * self.lecam(real, fake)
            loss = loss + regulariser
            logs["lecam"] = regulariser.detach()
        return loss, logs

    @torch.no_grad()
    def validation(self, recon: Reconstruction, images: Tensor) -> Logs:
        """Weighted pixel, perceptual and bottleneck terms and their sum `loss`, without the GAN: a monitor."""
        return self.generator_loss(recon, images, None, -1)[1]
