"""The training objective of a reconstructing tokenizer: pixels, LPIPS, the family's own losses, plug-ins and a GAN.

total = w_p * pixel + w_l * LPIPS + sum(own losses) + sum(terms) + GAN. A term is any module
`term(recon, images, *, step, progress, key, tokenizer) -> {name: weighted scalar loss}`: semantic alignment, an
autoregressive prior, logits of a classifier (vtok/losses). Its parameters, if it has any, are trained beside the
tokenizer, at `term.lr_scale` times its learning rate; one with `needs_codes` finds them in recon.features["codes"]; one
with `of_images` reads recon.images, which not every tokenizer has in training.
Nothing is remembered between calls except parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vtok import rng
from vtok.losses.gan import GAN, Logs
from vtok.losses.prior import watch
from vtok.losses.reconstruction import LPIPS, pixel_loss
from vtok.precision import full
from vtok.tokenizer import Reconstruction, Tokenizer

AT_THE_END = 10**12  # validation measures what training ends with: every warm-up done, every temporary loss gone


class TokenizerObjective(nn.Module):
    """Two losses, one for the tokenizer and one for the discriminator.

    pixel, pixel_weight: "l1" or "l2" between images in [-1, 1] (papers that measure in [0, 1] have a quarter of the l2
    and half of the l1). perceptual_weight: of LPIPS; 0 builds none and needs no weights file; perceptual_warmup: steps
    over which it rises linearly from 0. weights_path: folder of the LPIPS files. own_weights: factors of losses of the
    family by name (1 where not named; 0 drops one). own_strict: a name that the family does not have is a mistake.
    terms: plug-ins by name, null drops one. gan: the GAN.

    The training loop calls `generator_loss` where `tokenizer_learns(step)`, which is at every step unless the GAN
    alternates, and `discriminator_loss` where `discriminator_learns(step)`.
    """

    def __init__(
        self,
        *,
        pixel: Literal["l1", "l2"] = "l2",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        perceptual_warmup: int = 0,
        weights_path: str | Path | None = None,
        own_weights: Mapping[str, float] | None = None,
        own_strict: bool = True,
        terms: Mapping[str, nn.Module] | None = None,
        gan: GAN | None = None,
    ) -> None:
        super().__init__()
        if pixel not in ("l1", "l2"):
            raise ValueError(f"pixel={pixel!r}: choose l1 or l2")
        numbers = {"pixel_weight": pixel_weight, "perceptual_weight": perceptual_weight}
        for name, value in (numbers | {"perceptual_warmup": perceptual_warmup}).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.pixel, self.pixel_weight = pixel, pixel_weight
        self.perceptual_weight, self.perceptual_warmup = perceptual_weight, perceptual_warmup
        self.own_weights, self.own_strict = dict(own_weights or {}), own_strict
        self.perceptual = LPIPS(weights_path=weights_path) if perceptual_weight else None
        self.terms = nn.ModuleDict({name: term for name, term in (terms or {}).items() if term is not None})
        self.gan = gan

    @property
    def discriminator(self) -> nn.Module | None:
        return None if self.gan is None else self.gan.discriminator

    def gan_active(self, step: int) -> bool:
        """Whether the GAN takes part in optimizer step `step` (counted from 0)."""
        return self.gan is not None and self.gan.active(step)

    def discriminator_learns(self, step: int) -> bool:
        """Whether the discriminator is updated in optimizer step `step`."""
        return self.gan is not None and self.gan.learns(step)

    def tokenizer_learns(self, step: int) -> bool:
        """Whether the tokenizer is updated in optimizer step `step`."""
        return self.gan is None or not (self.gan.alternate and self.gan.learns(step))

    def reconstruct(
        self,
        tokenizer: Tokenizer,
        images: Tensor,
        *,
        key: Tensor | None = None,
        host_key: np.ndarray | None = None,
        progress: float = 0.0,
    ) -> Reconstruction:
        """The tokenizer's training pass, with its codes among the features where a term asks for them. host_key: `key`
        as an array on the host."""
        given = {"key": key, "progress": progress} | ({"host_key": host_key} if tokenizer.host_draws else {})
        if not any(getattr(term, "needs_codes", False) for term in self.terms.values()):
            return tokenizer(images, **given)
        with watch(tokenizer.quantizer) as passes:
            recon = tokenizer(images, **given)
        if not passes:
            raise ValueError(
                f"objective.terms holds a prior of the codes, but those of this {type(tokenizer).__name__} are frozen: "
                "drop it by objective.terms.<its name>=null, or train with tokenizer.stage=joint"
            )
        recon.features["codes"] = passes[0].codes[:, : recon.tokens.shape[1]]
        return recon

    def generator_loss(
        self,
        recon: Reconstruction,
        images: Tensor,
        last_layer: nn.Parameter | None,
        step: int,
        *,
        progress: float = 0.0,
        key: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> tuple[Tensor, Logs]:
        """Loss of the tokenizer, float32 scalar, and its weighted terms, detached.

        recon: what `reconstruct` returned for `images` [B, 3, H, W] in [-1, 1]. last_layer: weight of the
        last decoder layer, needed only with gan.adaptive. step: optimizer step; progress: share of training done; key
        int64 [B]: of the samples; tokenizer: what made `recon`. The discriminator gets no gradient.
        """
        reconstruction, loss, logs = self._without_gan(recon, images, step, progress, key, tokenizer)
        if self.gan_active(step):
            adversarial, found = self.gan.judge(
                recon.images, reconstruction, last_layer, step, _keys(key, recon.images)
            )
            loss = loss + adversarial
            logs |= found
        return loss, logs | {"loss": loss.detach()}

    def discriminator_loss(
        self, images: Tensor, fakes: Tensor, step: int, *, key: Tensor | None = None
    ) -> tuple[Tensor, Logs]:
        """Loss of the discriminator on real `images` and on `fakes`, both [B, 3, H, W]; fakes are detached here.

        Before `gan.start` it is a zero with zero gradients; a loop should then skip the discriminator's optimizer.
        """
        if self.gan is None:
            raise ValueError("gan=null: there is no discriminator; do not call discriminator_loss")
        if not self.gan.active(step):
            return sum(0.0 * p.sum() for p in self.discriminator.parameters()), {}
        return self.gan.train_loss(images, fakes, _keys(key, images))

    def rehearse(self, tokenizer: Tokenizer, images: Tensor, *, steps: int) -> None:
        """Compute what a training of `steps` steps on images [B, 3, H, W] will, with a GAN that starts within them:
        what raises in its first step, or only at `gan.start`, raises here. Nothing is changed by it: buffers and random
        generators are put back, parameters get no gradient, blocks under torch.compile run as written.

        Raises ValueError, too, where images without a gradient meet losses of them.
        """
        modules, key = (tokenizer, self), torch.arange(len(images), device=images.device)
        kept = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in modules]
        gan = self.gan if self.gan is not None and self.gan.start < steps else None
        try:
            with rng.untouched(), torch.compiler.set_stance("force_eager"):
                recon = self.reconstruct(tokenizer, images, key=key)
                if recon.images is None or not recon.images.requires_grad:
                    self._refuse_losses_of_images(gan)
                reconstruction, *_ = self._without_gan(recon, images, 0, 0.0, key, tokenizer)
                if gan is not None:
                    rows = _keys(key, recon.images)
                    gan.judge(recon.images, reconstruction, tokenizer.last_layer, gan.start, rows)
                    gan.train_loss(recon.real(images), recon.images, rows)
        finally:
            for module, before in zip(modules, kept):
                for name, buffer in module.named_buffers():
                    if name in before:
                        buffer.data.copy_(before[name])

    def _refuse_losses_of_images(self, gan: GAN | None) -> None:
        """Raise ValueError if there are losses of images, for a tokenizer whose images have no gradient."""
        weights = {"pixel_weight": self.pixel_weight, "perceptual_weight": self.perceptual_weight, "gan": gan}
        weights |= {f"terms.{name}": getattr(term, "of_images", False) for name, term in self.terms.items()}
        if blind := [f"objective.{name}" for name, value in weights.items() if value]:
            raise ValueError(
                "the images of this tokenizer carry no gradient (stage=proxy and a FlexTok with a VAE make none in "
                f"training), so nothing learns from {', '.join(blind)}: set {'it' if len(blind) == 1 else 'each'} to 0 "
                "(gan and terms: to null)"
            )

    @torch.no_grad()
    def validation(
        self,
        recon: Reconstruction,
        images: Tensor,
        *,
        key: Tensor | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Logs:
        """The weighted losses as at the end of training, and their sum `loss`, without the GAN: a monitor."""
        _, loss, logs = self._without_gan(recon, images, AT_THE_END, 1.0, key, tokenizer)
        return logs | {"loss": loss}

    def _without_gan(
        self,
        recon: Reconstruction,
        images: Tensor,
        step: int,
        progress: float,
        key: Tensor | None,
        tokenizer: Tokenizer | None,
    ) -> tuple[Tensor, Tensor, Logs]:
        """Pixels and LPIPS, the sum of all, and all of them detached by name."""
        if recon.images is None:
            self._refuse_losses_of_images(self.gan if self.gan_active(step) else None)
            reconstruction = torch.zeros((), device=images.device)
        else:
            fake, real = full(recon.images), full(recon.real(images))
            reconstruction = self.pixel_weight * pixel_loss(fake, real, self.pixel)
        losses = {"pixel": reconstruction}
        if self.perceptual is not None:
            rise = min(1.0, step / self.perceptual_warmup) if self.perceptual_warmup else 1.0
            losses["perceptual"] = rise * self.perceptual_weight * self.perceptual(fake, real).mean()
            reconstruction = reconstruction + losses["perceptual"]
            if "direct_images" in recon.features:  # a second decoding that some families learn from at first
                direct = self.perceptual(recon.features["direct_images"].float(), images.float()).mean()
                losses["perceptual_direct"] = rise * self.perceptual_weight * direct
        unknown = set(self.own_weights) - set(recon.losses)
        if unknown and self.own_strict and step == 0:  # later some may have ended
            raise ValueError(f"own_weights: the tokenizer has the losses {sorted(recon.losses)}, not {sorted(unknown)}")
        _add(losses, {name: self.own_weights.get(name, 1.0) * value for name, value in recon.losses.items()})
        for term in self.terms.values():
            _add(losses, term(recon, images, step=step, progress=progress, key=key, tokenizer=tokenizer))
        total = reconstruction
        for name, value in losses.items():
            total = total if name in ("pixel", "perceptual") else total + value
        return reconstruction, total, {name: value.detach() for name, value in losses.items()}


def _keys(key: Tensor | None, images: Tensor) -> Tensor | None:
    """One key a row where a pass decoded every image several times."""
    return key if key is None else key.repeat(len(images) // len(key))


def _add(losses: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if twice := sorted(set(losses) & set(found)):
        raise ValueError(f"two losses are called {twice[0]}: give one of objective.terms another label=")
    losses |= found
