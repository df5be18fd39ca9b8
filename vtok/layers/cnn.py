"""The convolutional encoder and decoder of VQGAN and latent diffusion, which most tokenizers of the field reuse.

Esser et al., arXiv 2012.09841; Rombach et al., arXiv 2112.10752. Residual blocks at falling resolutions, single-head
attention at the lowest one and in the middle. What a port gets wrong first: GroupNorm's eps is 1e-6, and the stride-2
convolution pads right and bottom only (symmetric padding takes the same weights and samples one pixel earlier).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.attention import attend
from vtok.layers.cnn_adaptive import AdaptiveGroupNorm, DepthToSpaceUpsample
from vtok.layers.dropout import Dropout
from vtok.layers.group_norm import Norm, in_its_dtype

Shortcut = Literal["input", "branch"]


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] to features [B, out_channels, H / s, W / s], s = 2 ** (levels - 1).

    channels, multipliers: the width of level i is channels * multipliers[i], highest resolution first.
    blocks: residual blocks a level. attention: after each block of the last level. mid_attention: between the two
    middle blocks. groups: of every GroupNorm; must divide all widths. out_kernel: of the last convolution.
    mid_blocks: residual blocks in the middle; the attention stands behind the first. bias: of the convolutions of the
    residual blocks, and of the encoder's first. downsample: a convolution that pads "asymmetric", right and bottom, or
    "symmetric", all sides; or "average", of 2 x 2. shortcut: see ResidualBlock.
    """

    def __init__(
        self,
        *,
        out_channels: int,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
        out_kernel: int = 3,
        mid_blocks: int = 2,
        bias: bool = True,
        downsample: Literal["asymmetric", "symmetric", "average"] = "asymmetric",
        shortcut: Shortcut = "input",
    ) -> None:
        super().__init__()
        if downsample not in ("asymmetric", "symmetric", "average"):
            raise ValueError(f"downsample={downsample!r}: choose asymmetric, symmetric or average")
        widths = level_widths(channels, multipliers, groups)
        last = len(widths) - 1
        self.stride = 2**last
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)
        self.levels = nn.ModuleList()
        width = channels
        for i, wide in enumerate(widths):
            level = Level(width, wide, blocks, attention and i == last, groups, dropout, bias, shortcut)
            self.levels.append(level)
            if i < last and downsample == "average":
                level.resample = nn.AvgPool2d(2)
            elif i < last:
                level.resample = Downsample(wide, symmetric=downsample == "symmetric")
            width = wide
        self.mid = _middle(width, mid_blocks, mid_attention, groups, dropout, bias, shortcut)
        self.norm_out = norm(width, groups)
        self.conv_out = nn.Conv2d(width, out_channels, out_kernel, padding=out_kernel // 2)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features [B, in_channels, h, w] to images [B, out_channels, s * h, s * w]; arguments as in Encoder.

    The levels run from the lowest resolution to the highest: `levels[0]` has width channels * multipliers[-1]. The
    published decoders have one block a level more than their encoders (MAGVIT-v2's: as many). upsample: "nearest"
    followed by a convolution, or "depth_to_space". adaptive: `adaptive[i]`, a GroupNorm that `features` scale and
    shift, stands before level i. Both are MAGVIT-v2's: see vtok.layers.cnn_adaptive.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 3,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
        out_kernel: int = 3,
        mid_blocks: int = 2,
        bias: bool = True,
        upsample: Literal["nearest", "depth_to_space"] = "nearest",
        adaptive: bool = False,
        shortcut: Shortcut = "input",
    ) -> None:
        super().__init__()
        if upsample not in ("nearest", "depth_to_space"):
            raise ValueError(f"upsample={upsample!r}: choose nearest or depth_to_space")
        widths = level_widths(channels, multipliers, groups)[::-1]
        last = len(widths) - 1
        self.stride = 2**last
        width = widths[0]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = _middle(width, mid_blocks, mid_attention, groups, dropout, bias, shortcut)
        self.levels, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i, wide in enumerate(widths):
            if adaptive:
                self.adaptive.append(AdaptiveGroupNorm(width, in_channels, groups))
            level = Level(width, wide, blocks, attention and i == 0, groups, dropout, bias, shortcut)
            self.levels.append(level)
            if i < last:
                level.resample = Upsample(wide) if upsample == "nearest" else DepthToSpaceUpsample(wide)
            width = wide
        self.norm_out = norm(width, groups)
        self.conv_out = nn.Conv2d(width, out_channels, out_kernel, padding=out_kernel // 2)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for i, level in enumerate(self.levels):
            if self.adaptive:
                h = self.adaptive[i](h, features)
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked; then `resample`, if set."""

    def __init__(
        self,
        width: int,
        wide: int,
        blocks: int,
        attention: bool,
        groups: int,
        dropout: float,
        bias: bool = True,
        shortcut: Shortcut = "input",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(width if i == 0 else wide, wide, groups, dropout, bias, shortcut) for i in range(blocks)
        )
        self.attention = nn.ModuleList(Attention2d(wide, groups) for _ in range(blocks if attention else 0))
        self.resample: nn.Module | None = None

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            h = block(h)
            if self.attention:
                h = self.attention[i](h)
        return h if self.resample is None else self.resample(h)


class ResidualBlock(nn.Module):
    """x + h, h = conv(dropout(silu(norm(conv(silu(norm(x))))))), with a 1 x 1 convolution of x where the width changes.

    shortcut: "branch" is a slip of the published port of MaskGIT's VQGAN, on which its weights depend: that convolution
    reads h, and x is lost there.
    """

    def __init__(
        self,
        width: int,
        wide: int,
        groups: int,
        dropout: float = 0.0,
        bias: bool = True,
        shortcut: Shortcut = "input",
    ) -> None:
        super().__init__()
        if shortcut not in ("input", "branch"):
            raise ValueError(f"shortcut={shortcut!r}: choose input or branch")
        self.norm1 = norm(width, groups)
        self.conv1 = nn.Conv2d(width, wide, 3, padding=1, bias=bias)
        self.norm2 = norm(wide, groups)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=bias)
        self.of_branch = shortcut == "branch" and width != wide
        read = wide if self.of_branch else width
        self.shortcut = nn.Conv2d(read, wide, 1, bias=bias) if width != wide else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(h if self.of_branch else x) + h


class Attention2d(nn.Module):
    """One head over all h * w positions, logits scaled by C ** -0.5; `qkv` holds q, k, v in this order."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        # [B, 3C, h, w] -> three of [B, 1, h * w, C]
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        h = attend(q, k, v)
        return x + self.out(h.squeeze(1).transpose(1, 2).unflatten(2, (height, -1)))


class Downsample(nn.Module):
    """Half the resolution: one zero to the right and below, then a 3 x 3 convolution of stride 2 without padding.

    symmetric: zeros on all four sides instead, as MAGVIT-v2's encoder has them.
    """

    def __init__(self, width: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.pad = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, self.pad))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3 x 3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        with in_its_dtype(h):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.conv(h)


def norm(width: int, groups: int) -> Norm:
    return Norm(groups, width, eps=1e-6)


def level_widths(channels: int, multipliers: Sequence[int], groups: int) -> list[int]:
    """Widths of the levels, highest resolution first. Raises ValueError where `groups` does not divide them."""
    widths = [channels * int(m) for m in multipliers]
    if not widths:
        raise ValueError("multipliers is empty: give one number per resolution")
    for width in [channels, *widths]:
        if width % groups:
            raise ValueError(f"a width of {width} does not divide into groups={groups}; change groups or channels")
    return widths


def _middle(
    width: int, blocks: int, attention: bool, groups: int, dropout: float, bias: bool, shortcut: Shortcut
) -> nn.Sequential:
    middle: list[nn.Module] = [Attention2d(width, groups)] if attention else []
    first, *rest = (ResidualBlock(width, width, groups, dropout, bias, shortcut) for _ in range(blocks))
    return nn.Sequential(first, *middle, *rest)


def to_map(tokens: Tensor, height: int) -> Tensor:
    """[B, h * w, C] or [B, h, w, C], channels last, to the [B, C, h, w] of convolutions."""
    if tokens.dim() == 3:
        tokens = tokens.unflatten(1, (height, -1))
    return tokens.permute(0, 3, 1, 2)


def from_map(features: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h, w, C]."""
    return features.permute(0, 2, 3, 1)
