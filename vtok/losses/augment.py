"""Differentiable augmentation of what a discriminator sees: colour, translation, cutout, and a random view.

DiffAug (Zhao et al., arXiv 2006.10738) with the amounts of StyleGAN-T (Sauer et al., arXiv 2301.09515): brightness
+-0.5, saturation x [0, 2], contrast x [0.5, 1.5], shifts of an eighth, a hole of a fifth of the side. The view, a crop
or the whole image resized, is the one that VAR's family gives the DINO discriminator. What differs: whether an
augmentation is applied is drawn for every image, not for the batch, from the sample's own noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.resolution import interpolate
from vtok.noise import SampleNoise
from vtok.precision import full

DRAWS = 14  # positions of the noise that one call uses


class DiffAug(nn.Module):
    """Images [B, C, H, W] in [-1, 1] to augmented ones, with gradients; zeros are what is shifted in or cut out.

    prob: of each of the three per image. unit: act on the pixels in [0, 1] (ResTok), so that brightness moves twice as
    far and black is shifted in and cut out. color: on or off. translation, cutout: shares of the side, 0 = off. size:
    side of the result, None = as it is; crop: share of the images that are cropped to `size` rather than resized.
    """

    def __init__(
        self,
        *,
        prob: float = 1.0,
        unit: bool = False,
        color: bool = True,
        translation: float = 0.125,
        cutout: float = 0.2,
        size: int | None = None,
        crop: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("prob", prob), ("translation", translation), ("cutout", cutout), ("crop", crop)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if crop and size is None:
            raise ValueError(f"crop={crop} needs size, the side to crop to")
        self.prob, self.color, self.translation, self.cutout = prob, color, translation, cutout
        self.unit = unit
        self.size, self.crop = size, crop

    def forward(self, images: Tensor, noise: SampleNoise, stream: int = 0) -> Tensor:
        """noise: of the B samples; stream: another number draws another augmentation."""
        x = full(images)  # colours and means: not in half precision
        x = x * 0.5 + 0.5 if self.unit else x
        u = noise.uniform(torch.arange(DRAWS, device=x.device), stream)
        apply = u[:, :3] <= self.prob
        if self.color:
            x = torch.where(apply[:, 0, None, None, None], self._color(x, u[:, 3:6]), x)
        if self.translation:
            x = torch.where(apply[:, 1, None, None, None], self._translate(x, u[:, 6:8]), x)
        if self.cutout:
            x = torch.where(apply[:, 2, None, None, None], self._cut(x, u[:, 8:10]), x)
        x = x * 2 - 1 if self.unit else x
        return x if self.size is None else self._view(x, u[:, 10:13])

    def _color(self, x: Tensor, u: Tensor) -> Tensor:
        brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
        x = x + (brightness - 0.5)
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * (2 * saturation) + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * (contrast + 0.5) + mean

    def _translate(self, x: Tensor, u: Tensor) -> Tensor:
        sides = x.shape[2:]
        most = [round_half_up(side * self.translation) for side in sides]
        shift = [pick(u[:, i], 2 * most[i] + 1) - most[i] for i in (0, 1)]
        at = [torch.arange(sides[i], device=x.device) + shift[i][:, None] for i in (0, 1)]
        inside = [(at[i] >= 0) & (at[i] < sides[i]) for i in (0, 1)]
        moved = take(x, at[0].clamp(0, sides[0] - 1), at[1].clamp(0, sides[1] - 1))
        return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])

    def _cut(self, x: Tensor, u: Tensor) -> Tensor:
        holes = []
        for i, side in enumerate(x.shape[2:]):
            width = round_half_up(side * self.cutout)
            start = pick(u[:, i], side + 1 - width % 2) - width // 2
            at = torch.arange(side, device=x.device)
            holes.append((at >= start[:, None]) & (at < start[:, None] + width))
        return x * ~(holes[0][:, None, :, None] & holes[1][:, None, None, :])

    def _view(self, x: Tensor, u: Tensor) -> Tensor:
        height, width = x.shape[2:]
        whole = resize(x, self.size)
        if not self.crop or min(height, width) <= self.size:
            return whole
        at = torch.arange(self.size, device=x.device)
        starts = [pick(u[:, i + 1], side - self.size + 1)[:, None] for i, side in enumerate((height, width))]
        cropped = take(x, at + starts[0], at + starts[1])
        return torch.where((u[:, 0] <= self.crop)[:, None, None, None], cropped, whole)


def resize(x: Tensor, size: int) -> Tensor:
    """Square images of side `size`: area means where x is larger, bicubic where it is smaller."""
    if tuple(x.shape[2:]) == (size, size):
        return x
    return interpolate(x, size, mode="area" if x.shape[2] > size else "bicubic")


def take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x [B, C, H, W] at rows int64 [B, h] and columns int64 [B, w]: [B, C, h, w]."""
    rows = rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    picked = x.gather(2, rows)
    return picked.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], picked.shape[2], -1))


def pick(u: Tensor, count: int) -> Tensor:
    """A whole number in [0, count) from u in (0, 1]."""
    return (u * count).long().clamp(max=count - 1)


def round_half_up(value: float) -> int:
    return int(value + 0.5)
