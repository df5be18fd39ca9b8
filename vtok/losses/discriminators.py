"""Convolutional discriminators of tokenizers: PatchGAN, StyleGAN's residual one, and MaskBit's blur-pooled one.

PatchGAN: Isola et al., arXiv 1611.07004, in the form that VQGAN (arXiv 2012.09841) and LlamaGen (arXiv 2406.06525)
train. StyleGANDiscriminator: Karras et al., arXiv 1912.04958, as the option of LlamaGen and MaskGIT has it.
MaskBitDiscriminator: Weber et al., arXiv 2409.16211, as TiTok (arXiv 2406.07550) trains it. Parameter counts at the
published sizes: 2,765,633, 36,500,225 (256 px) and 1,909,889, counted in the originals too. Images are [B, 3, H, W] in
[-1, 1].
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.resolution import must_repeat
from vtok.precision import full


class PatchGAN(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, 1, h, w], one per overlapping patch (70 px at 3 layers).

    width: channels of the first layer, doubled per layer up to 8 x. layers: stride-2 convolutions.
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.smallest = 3 * 2**layers  # side: two convolutions of 4 follow those that halve it
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
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"images are {tuple(images.shape[2:])}, this PatchGAN takes sides from {self.smallest}: lower "
                "objective.gan.discriminator.layers"
            )
        return self.layers(images)


class StyleGANDiscriminator(nn.Module):
    """Images of side `image_size`, a power of two, to one logit each [B, 1].

    Residual blocks halve the side down to 4; a blur (1, 2, 1) stands before each strided convolution. width: channels
    at 64 px and below are 4 x and 8 x of it, at 128 px 2 x, at 256 px 1 x. minibatch_std: size of the groups whose
    standard deviation becomes a further channel at 4 px (StyleGAN2 has 4; LlamaGen's code has none, 0).
    """

    def __init__(self, *, image_size: int = 256, width: int = 64, minibatch_std: int = 0) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size={image_size}: StyleGANDiscriminator takes powers of two from 8")
        self.image_size, self.minibatch_std = image_size, minibatch_std
        sides = [image_size >> i for i in range(int(math.log2(image_size)) - 1)]
        widths = [max(1, min(8 * width, 256 * width // side)) for side in sides]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Residual(a, b) for a, b in pairwise(widths))
        last = widths[-1]
        self.conv = nn.Conv2d(last + bool(minibatch_std), last, 3, padding=1)
        self.hidden, self.out = nn.Linear(16 * last, last), nn.Linear(last, 1)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[2:])}, the discriminator has image_size={self.image_size}: change "
                "objective.gan.discriminator.image_size"
            )
        x = F.leaky_relu(self.stem(images), 0.2)
        for block in self.blocks:
            x = block(x)
        if self.minibatch_std:
            x = torch.cat([x, spread(x, self.minibatch_std)], 1)
        x = F.leaky_relu(self.conv(x), 0.2).flatten(1)
        return self.out(F.leaky_relu(self.hidden(x), 0.2))


class MaskBitDiscriminator(nn.Module):
    """Images [B, 3, H, W], H and W multiples of 2^stages, to logits [B, 1, patches, patches].

    Each stage: 3 x 3 convolution, blur-pool (1, 3, 3, 1) by 2, GroupNorm (eps 1e-5), LeakyReLU 0.1; widths are width x
    1, 2, 4, ... Then the largest value in each of patches x patches cells.
    """

    def __init__(self, *, width: int = 128, stages: int = 3, groups: int = 32, patches: int = 16) -> None:
        super().__init__()
        if stages < 1:
            raise ValueError(f"stages={stages}: MaskBitDiscriminator has at least one")
        widths = [width, *(width * 2**i for i in range(stages))]
        self.stem = nn.Conv2d(3, width, 5, padding=2)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, b) for b in widths[1:])
        self.patches = patches
        self.hidden, self.out = nn.Conv2d(widths[-1], widths[-1], 1), nn.Conv2d(widths[-1], 1, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(images), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(blur(F.pad(conv(x), (1, 1, 1, 1)), (1, 3, 3, 1), stride=2)), 0.1)
        return self.out(F.leaky_relu(self.hidden(self._largest(x)), 0.1))

    def _largest(self, x: Tensor) -> Tensor:
        """Of each cell of x [B, C, h, w], [B, C, patches, patches]."""
        height, width = x.shape[2:]
        if height % self.patches == width % self.patches == 0:
            return F.max_pool2d(x, (height // self.patches, width // self.patches))
        if must_repeat(x):
            raise ValueError(
                f"trainer.deterministic=true: the discriminator's cells on a map of {height} x {width} overlap, which "
                "has no repeatable gradient on a GPU; set objective.gan.discriminator.patches to a divisor of both"
            )
        return F.adaptive_max_pool2d(x, self.patches)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions, blur and a strided one, beside a strided 1 x 1 convolution; halves the side."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, out_channels, 1, stride=2)
        self.first = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.down = nn.Conv2d(out_channels, out_channels, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)
        h = self.down(blur(mirrored(h), (1, 2, 1)))
        return (h + self.skip(x)) / math.sqrt(2)


def mirrored(x: Tensor) -> Tensor:
    """x [B, C, H, W] with a row or column reflected at each edge."""
    if not must_repeat(x):
        return F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], 2)
    return torch.cat([x[..., 1:2], x, x[..., -2:-1]], 3)


def blur(x: Tensor, taps: tuple[int, ...], stride: int = 1) -> Tensor:
    """x [B, C, H, W], padded already, convolved with the separable kernel of `taps`, which is made to sum to 1."""
    row = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
    kernel = (row[:, None] * row[None, :]).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, stride=stride, groups=x.shape[1])


def spread(x: Tensor, group: int) -> Tensor:
    """Minibatch standard deviation (Karras et al., arXiv 1710.10196): [B, 1, H, W], one value for each group of images.

    The batch is cut into runs of `group` images; where it does not divide, the last run is shorter.
    """
    values = []
    for part in full(x).split(group):
        value = (part.var(0, unbiased=False) + 1e-8).sqrt().mean()
        values.append(value.expand(len(part)))
    return torch.cat(values)[:, None, None, None].expand(-1, 1, *x.shape[2:]).to(x.dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
