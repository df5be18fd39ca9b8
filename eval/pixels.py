"""PSNR and SSIM of uint8 pictures, each with its definition in its name, and the use of a codebook over a whole set.

PSNR of a set is two different numbers: `psnr_mean` averages the decibels of the images, `psnr_set` takes one mean
squared error over all pixels (2 dB apart on the same pictures). SSIM: Wang et al. 2004, "Image quality assessment: from
error visibility to structural similarity", equation 13, with an 11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03
and range 1; windows that leave the image are left out, and so are images with a side below 11 pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5


class PixelErrors:
    """Streaming PSNR and SSIM (similarity=False: PSNR only) of pairs of uint8 images [B, H, W, 3]."""

    def __init__(self, *, similarity: bool = True) -> None:
        self.wanted = similarity
        self.count = self.windowed = 0  # images; those that SSIM's window fits
        self.decibels = self.squares = self.similarity = 0.0

    def add(self, originals: Tensor, copies: Tensor) -> None:
        if originals.shape != copies.shape or originals.dtype != torch.uint8 or copies.dtype != torch.uint8:
            raise ValueError(
                f"images are {tuple(originals.shape)} and {tuple(copies.shape)}, expected equal uint8 shapes"
            )
        a, b = (x.permute(0, 3, 1, 2).double() / 255 for x in (originals, copies))
        errors = (a - b).square().mean(dim=(1, 2, 3))
        self.count += len(errors)
        self.decibels += float((-10 * errors.clamp(min=1e-10).log10()).sum())  # 100 dB for equal images
        self.squares += float(errors.sum())
        if self.wanted and min(a.shape[2:]) >= WINDOW:
            self.windowed += len(errors)
            self.similarity += float(ssim(a, b).sum())

    def result(self) -> dict[str, float]:
        """psnr_mean, psnr_set, ssim_gauss11 of images on [0, 1]; the last of those counted in `windowed`, and left out
        where there are none."""
        mean = max(self.squares / self.count, 1e-10)
        found = {"psnr_mean": self.decibels / self.count, "psnr_set": -10 * math.log10(mean)}
        if self.windowed:
            found["ssim_gauss11"] = self.similarity / self.windowed
        return found


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity [B] of images [B, C, H, W] on [0, 1]. ValueError for sides below the window's."""
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW}, got {tuple(a.shape[2:])}")
    place = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    bell = torch.exp(-(place**2) / (2 * SIGMA**2))
    bell = bell / bell.sum()

    def blur(x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.conv2d(x, bell.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(x, bell.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return score.mean(dim=(1, 2, 3))


def codebook_use(counts: Tensor) -> dict[str, float]:
    """counts [V] over a whole set: usage = share of codes seen; perplexity = exp(entropy in nats); tokens counted."""
    total = counts.sum()
    share = counts[counts > 0].double() / total
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_perplexity": float(torch.exp(-(share * share.log()).sum())),
        "tokens_counted": int(total),
    }
