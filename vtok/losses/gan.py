"""The adversarial part of a tokenizer's objective: a discriminator, and when, how strongly and on what it acts.

One step is that of VQGAN (Esser et al., arXiv 2012.09841) and LlamaGen (arXiv 2406.06525): the tokenizer gets
weight * a * G(fake), a = 1 or the adaptive weight; the discriminator gets its own loss on the same images. The GAN is
exactly absent before `start`: the discriminator is not run then. Nothing is remembered between calls except parameters
and buffers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vtok.losses.adversarial import (
    GAN_LOSSES,
    GanLoss,
    LeCam,
    LeCamOf,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vtok.losses.augment import DiffAug
from vtok.noise import SampleNoise, noise_of
from vtok.precision import full

Logs = dict[str, Tensor]
# streams of the sample's noise; the tokenizer families have theirs below 400
FOOLING, REAL, FAKE, REAL_STRONG, FAKE_STRONG = 400, 401, 402, 403, 404


class GAN(nn.Module):
    """discriminator: images [B, 3, H, W] in [-1, 1] to logits of any shape.

    weight: of the tokenizer's adversarial loss. loss: of the discriminator, "hinge" or "non_saturating" (= "softplus");
    generator_loss: of the tokenizer, None = the same. start: first optimizer step with a GAN; ramp: steps over which
    the tokenizer's weight rises to `weight` from there. every: the discriminator learns in every so many steps.
    first: which of the two is updated first in a step (IBQ: "discriminator"). alternate: from `start` on a step updates
    either of them, the discriminator where its number, counted from 0, is odd (iFSQ). clip: whether the discriminator's
    gradient is clipped as the tokenizer's is. adaptive: multiply the weight by the ratio of the gradient norms at the
    decoder's last layer; adaptive_eps: added to its denominator; adaptive_max: its largest value, for
    losses that are means (a paper's for sums over an image is divided by 3 H W). augment: of all that the discriminator
    sees. lecam_weight: LeCam regulariser (0.999), of lecam_of. own_schedule: the discriminator's rate counts its steps
    from `start` on, with a warm-up of its own, as in 1d-tokenizer; else it is the tokenizer's at the time.
    consistency_weight: squared difference of the logits under `augment` and under `strong`.
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module,
        weight: float = 0.5,
        loss: GanLoss = "hinge",
        generator_loss: GanLoss | None = None,
        start: int = 20_000,
        ramp: int = 0,
        every: int = 1,
        first: Literal["generator", "discriminator"] = "generator",
        alternate: bool = False,
        clip: bool = True,
        adaptive: bool = False,
        adaptive_eps: float = 1e-4,
        adaptive_max: float = 1e4,
        augment: DiffAug | None = None,
        lecam_weight: float = 0.0,
        consistency_weight: float = 0.0,
        strong: DiffAug | None = None,
        lecam_of: LeCamOf = "logits",
        own_schedule: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("loss", loss), ("generator_loss", generator_loss or loss)):
            if value not in GAN_LOSSES:
                raise ValueError(f"gan.{name}={value!r}: choose {', '.join(GAN_LOSSES)}")
        if first not in ("generator", "discriminator"):
            raise ValueError(f"gan.first={first!r}: choose generator or discriminator")
        for name, value in (("weight", weight), ("start", start), ("ramp", ramp), ("lecam_weight", lecam_weight)):
            if value < 0:
                raise ValueError(f"gan.{name} must not be negative, got {value}")
        if adaptive_eps <= 0 or adaptive_max <= 0:
            raise ValueError(f"gan.adaptive_eps={adaptive_eps} and gan.adaptive_max={adaptive_max} must be positive")
        if every < 1:
            raise ValueError(f"gan.every={every}: the discriminator learns in every so many steps, at least 1")
        if alternate and (every > 1 or first != "generator"):
            raise ValueError(f"gan.alternate=true excludes gan.every={every}, gan.first={first}: set 1 and generator")
        if bool(consistency_weight) != (strong is not None):
            raise ValueError(f"gan.consistency_weight={consistency_weight} and gan.strong go together: give both")
        self.discriminator = discriminator
        self.weight, self.loss, self.fooling = weight, loss, generator_loss or loss
        self.start, self.ramp, self.every, self.first, self.adaptive = start, ramp, every, first, adaptive
        self.alternate, self.clip = alternate, clip
        self.adaptive_eps, self.adaptive_max = adaptive_eps, adaptive_max
        self.augment, self.strong = augment, strong
        self.lecam_weight, self.consistency_weight = lecam_weight, consistency_weight
        self.lecam = LeCam(of=lecam_of) if lecam_weight else None
        self.own_schedule = own_schedule

    def active(self, step: int) -> bool:
        """Whether the tokenizer is judged in optimizer step `step` (counted from 0)."""
        return step >= self.start

    def learns(self, step: int) -> bool:
        """Whether the discriminator is updated in optimizer step `step`."""
        return self.active(step) and (step % 2 == 1 if self.alternate else (step - self.start) % self.every == 0)

    def strength(self, step: int) -> float:
        """Weight of the tokenizer's adversarial loss, without the adaptive factor."""
        if not self.active(step):
            return 0.0
        return self.weight * (min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0)

    def judge(
        self, fakes: Tensor, reconstruction: Tensor, last_layer: nn.Parameter | None, step: int, key: Tensor | None
    ) -> tuple[Tensor, Logs]:
        """The tokenizer's weighted loss on its images `fakes`; the discriminator gets no gradient.

        reconstruction: the scalar loss whose gradient the adaptive weight compares with. key int64 [B]: of the samples.
        """
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        seen = self._see(full(fakes), self.augment, self._noise(key, fakes), FOOLING)
        adversarial = generator_loss(full(functional_call(self.discriminator, frozen, (seen,))), self.fooling)
        weight = seen.new_tensor(self.strength(step))
        if self.adaptive:
            if last_layer is None:
                raise ValueError("gan.adaptive=true needs the tokenizer's last_layer; set adaptive=false")
            limits = {"eps": self.adaptive_eps, "most": self.adaptive_max}
            weight = weight * adaptive_weight(reconstruction, adversarial, last_layer, **limits)
        loss = weight * adversarial
        return loss, {"adversarial": loss.detach(), "adversarial_weight": weight}

    def train_loss(self, images: Tensor, fakes: Tensor, key: Tensor | None) -> tuple[Tensor, Logs]:
        """The discriminator's loss on real `images` and on `fakes`, both [B, 3, H, W]; fakes are detached here."""
        images, fakes, noise = full(images), full(fakes.detach()), self._noise(key, images)
        real = full(self.discriminator(self._see(images, self.augment, noise, REAL)))
        fake = full(self.discriminator(self._see(fakes, self.augment, noise, FAKE)))
        loss = discriminator_loss(real, fake, self.loss)
        logs = {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
        if self.lecam is not None:
            regulariser = self.lecam_weight * self.lecam(real, fake)
            loss = loss + regulariser
            logs["lecam"] = regulariser.detach()
        if self.strong is not None:
            changed_real = full(self.discriminator(self._see(images, self.strong, noise, REAL_STRONG)))
            changed_fake = full(self.discriminator(self._see(fakes, self.strong, noise, FAKE_STRONG)))
            difference = F.mse_loss(torch.cat([real, fake]), torch.cat([changed_real, changed_fake]))
            loss = loss + self.consistency_weight * difference
            logs["consistency"] = (self.consistency_weight * difference).detach()
        return loss, logs

    def _noise(self, key: Tensor | None, images: Tensor) -> SampleNoise | None:
        # without augmentation nothing is drawn, not even from torch's generator
        if self.augment is None and self.strong is None:
            return None
        if key is not None and len(key) != len(images):  # several decodings of each image, one after the other
            key = key.repeat(len(images) // len(key))
        return noise_of(key, images)

    @staticmethod
    def _see(images: Tensor, augment: DiffAug | None, noise: SampleNoise | None, stream: int) -> Tensor:
        return images if augment is None else augment(images, noise, stream)
