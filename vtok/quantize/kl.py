"""The bottleneck of a variational autoencoder: a diagonal Gaussian per cell, whose samples are continuous tokens.

Kingma and Welling, arXiv 1312.6114; as in latent diffusion (Rombach et al., arXiv 2112.10752) and in MAR's KL-16 (Li et
al., arXiv 2406.11838), whose generators (MAR, xAR, FlowAR) see the latent times a constant that brings its standard
deviation to about 1. Here the tokens carry that constant already and `assemble` takes it off again. Draws are keyed by
sample, not by batch. Encoding and decoding are held to the original's recorded outputs; for its training: No reference
available (MAR's class has no training step), so divergence and draws are held to their formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.noise import SampleNoise
from vtok.precision import full
from vtok.tokenizer import Quantized, Quantizer

STREAM = 2101  # noise stream of the posterior's samples
BOUNDS = (-30.0, 20.0)  # of the log variance, as everywhere in the field


class KL(Quantizer):
    """Mean and log variance, 2C channels in all, to C continuous channels.

    scale: factor of the tokens, 1 / standard deviation of the latents (0.2325 for KL-16). kl_weight: of the divergence
    to a standard normal, in nats an image (sum over its latents, mean over the batch): where pixels are averaged, not
    summed as in latent diffusion, its 1e-6 is 1e-6 / (3 H W) here. deterministic: a plain autoencoder, which takes the
    mean always, has no loss, and leaves the log variance unused.
    """

    vocab_size = None

    def __init__(
        self, *, channels: int, scale: float = 1.0, kl_weight: float = 1e-6, deterministic: bool = False
    ) -> None:
        super().__init__()
        if channels < 1 or scale <= 0 or kl_weight < 0:
            raise ValueError(
                f"channels and scale must be positive, kl_weight at least 0, got {channels}, {scale} and {kl_weight}"
            )
        self.channels, self.scale, self.kl_weight = channels, scale, kl_weight
        self.deterministic = deterministic

    @property
    def draws(self) -> bool:
        return not self.deterministic

    @property
    def width(self) -> int:
        """2C: mean and log variance."""
        return 2 * self.channels

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, both float32 [.., C], of z [.., 2C]; the log variance within BOUNDS."""
        if z.shape[-1] != self.width:
            raise ValueError(f"z has {z.shape[-1]} channels, expected 2 * channels = {self.width}")
        mean, log_variance = full(z).chunk(2, dim=-1)
        return mean, log_variance.clamp(*BOUNDS)

    def sample(self, z: Tensor, noise: SampleNoise | None) -> Tensor:
        """Latents [B, .., C], without the scale, of z [B, .., 2C]: posterior draws, or without noise the mean."""
        mean, log_variance = self.posterior(z)
        if noise is None or self.deterministic:
            return mean
        cells = torch.arange(mean[0, ..., 0].numel(), device=z.device)
        normal = noise.normal(cells, self.channels, STREAM).view_as(mean)
        return mean + torch.exp(0.5 * log_variance) * normal

    def divergence(self, z: Tensor) -> Tensor:
        """KL divergence of the posterior to a standard normal, nats per image, [B]."""
        mean, log_variance = self.posterior(z)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)

    def forward(self, z: Tensor, noise: SampleNoise | None = None) -> Quantized:
        """z [B, L, 2C] or [B, h, w, 2C]. Quantized.z: latents without the scale; ids and codes: tokens [B, L, C].

        stats: kl, nats an image; spread, standard deviation of the tokens, 1 where `scale` fits.
        """
        with torch.autocast(z.device.type, enabled=False):
            latents = self.sample(z, noise)
            divergence = self.divergence(z).mean()
            tokens = (latents * self.scale).flatten(1, -2)
        stats = {"kl": divergence.detach(), "spread": tokens.detach().std()}
        loss = {} if self.deterministic else {"kl": self.kl_weight * divergence}
        return Quantized(latents, tokens, tokens, loss, stats)

    @torch.no_grad()
    def tokens(self, z: Tensor, noise: SampleNoise | None = None) -> Tensor:
        """Scaled latents [B, L, C]: the posterior's mean, or with noise its sample."""
        with torch.autocast(z.device.type, enabled=False):
            return (self.sample(z, noise) * self.scale).flatten(1, -2)

    def indices(self, z: Tensor) -> Tensor:
        raise ValueError("KL has continuous tokens, no ids: use tokens")

    def lookup(self, ids: Tensor) -> Tensor:
        """Continuous tokens are their own codes."""
        return ids

    def assemble(self, codes: Tensor, keep: int | None = None) -> Tensor:
        """Latents without the scale of codes [B, L, C], the first `keep` of them."""
        return full(super().assemble(codes, keep)) / self.scale
