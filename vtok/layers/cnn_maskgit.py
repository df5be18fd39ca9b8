"""The convolutional encoder and decoder of MaskGIT's VQGAN (Chang et al., arXiv 2202.04200), f16, without attention.

Teacher of TiTok's proxy codes and trunk of ResTok. They are those of vtok.layers.cnn with options: the convolutions
inside the residual blocks and the encoder's first one have no bias; resolution falls by average pooling; the encoder
ends in a 1 x 1 convolution; encoder and decoder have the same number of blocks, also in the middle; and where the width
changes, the shortcut reads the residual branch (see ResidualBlock there). TensorFlow's "same" padding is the ordinary
symmetric one here: all convolutions have stride 1 and odd kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtok.layers.cnn import Decoder, Encoder


def maskgit_encoder(
    *,
    out_channels: int = 256,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    groups: int = 32,
    dropout: float = 0.0,
) -> Encoder:
    """Images [B, 3, H, W] to features [B, out_channels, H / s, W / s], s = 2 ** (levels - 1)."""
    return Encoder(
        out_channels=out_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        mid_blocks=blocks,
        groups=groups,
        dropout=dropout,
        attention=False,
        mid_attention=False,
        out_kernel=1,
        bias=False,
        downsample="average",
        shortcut="branch",
    )


def maskgit_decoder(
    *,
    in_channels: int = 256,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    groups: int = 32,
    dropout: float = 0.0,
) -> Decoder:
    """Features [B, in_channels, h, w] to images [B, 3, s h, s w]."""
    return Decoder(
        in_channels=in_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        mid_blocks=blocks,
        groups=groups,
        dropout=dropout,
        attention=False,
        mid_attention=False,
        bias=False,
        shortcut="branch",
    )
