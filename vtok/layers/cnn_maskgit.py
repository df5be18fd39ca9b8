"""The convolutional encoder and decoder of MaskGIT's VQGAN (Chang et al., arXiv 2202.04200), f16, without attention.

Teacher of TiTok's proxy codes and trunk of ResTok. They are those of vtok.layers.cnn with options: the convolutions
inside the residual blocks and the encoder's first one have no bias; resolution falls by average pooling; the encoder
ends in a 1 x 1 convolution; encoder and decoder have the same number of blocks, also in the middle; and where the width
changes, the shortcut reads the residual branch (see ResidualBlock there). TensorFlow's "same" padding is the ordinary
symmetric one here: all convolutions have stride 1 and odd kernels.
"""

from __future__ import annotations

from typing import Any

# options of vtok.layers.cnn's Encoder and Decoder, beside mid_blocks, which equals blocks
DECODER: dict[str, Any] = {"attention": False, "mid_attention": False, "bias": False, "shortcut": "branch"}
ENCODER: dict[str, Any] = {**DECODER, "out_kernel": 1, "downsample": "average"}
