"""The convolutional encoder and decoder of MaskGIT's VQGAN (Chang et al., arXiv 2202.04200), f16, without attention.

Teacher of TiTok's proxy codes and trunk of ResTok. What differs from vtok.layers.cnn: the convolutions inside the
residual blocks and the encoder's first one have no bias; resolution falls by average pooling; the encoder ends in a
1 x 1 convolution; encoder and decoder have the same number of blocks, also in the middle; and where the width changes,
the 1 x 1 shortcut reads the residual branch's output instead of the block's input (see ResidualBlock). TensorFlow's
"same" padding is the ordinary symmetric one here: all convolutions have stride 1 and odd kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.cnn import Upsample, level_widths, norm
from vtok.layers.dropout import Dropout


class MaskGITEncoder(nn.Module):
    """Images [B, 3, H, W] to features [B, out_channels, H / s, W / s], s = 2 ** (levels - 1); see vtok.layers.cnn."""

    def __init__(
        self,
        *,
        out_channels: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, multipliers, groups)
        self.stride = 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        starts = [channels, *widths[:-1]]
        self.levels = nn.ModuleList(stack(a, b, blocks, groups, dropout) for a, b in zip(starts, widths))
        self.mid = stack(widths[-1], widths[-1], blocks, groups, dropout)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else F.avg_pool2d(h, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class MaskGITDecoder(nn.Module):
    """Features [B, in_channels, h, w] to images [B, 3, s h, s w]; `levels` run from the lowest resolution up."""

    def __init__(
        self,
        *,
        in_channels: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, multipliers, groups)[::-1]
        self.stride = 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid = stack(widths[0], widths[0], blocks, groups, dropout)
        starts = [widths[0], *widths[:-1]]
        self.levels = nn.ModuleList(stack(a, b, blocks, groups, dropout) for a, b in zip(starts, widths))
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[:-1])
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else self.upsamples[i - 1](h))
        return self.conv_out(F.silu(self.norm_out(h)))


class ResidualBlock(nn.Module):
    """x + h, h = conv(dropout(silu(norm(conv(silu(norm(x))))))); where the width changes h + shortcut(h).

    The latter loses x, a slip of the published port whose weights depend on it.
    """

    def __init__(self, width: int, wide: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(width, groups)
        self.conv1 = nn.Conv2d(width, wide, 3, padding=1, bias=False)
        self.norm2 = norm(wide, groups)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(wide, wide, 1, bias=False) if width != wide else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(h))


def stack(width: int, wide: int, blocks: int, groups: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width if i == 0 else wide, wide, groups, dropout) for i in range(blocks)))
