"""Open-MAGVIT2's tokenizer: a convolutional autoencoder without attention around a lookup-free quantiser.

Luo et al., arXiv 2409.04410, section 3.1, after MAGVIT-v2 (Yu et al., arXiv 2310.05737). Against the plain CNN: four
blocks a level in both halves and in the middle, without biases; stride-2 convolutions padded on all sides; depth to
space and adaptive GroupNorm in the decoder; no projections around the quantiser.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.models.cnn import CNNTokenizer
from vtok.noise import SampleNoise
from vtok.tokenizer import Quantizer, Tokenizer


class MAGVIT2Tokenizer(CNNTokenizer):
    """image_size: trained side; any multiple of the stride works. quantizer: pointwise, e.g. LFQ or BSQ.

    channels, multipliers, groups, dropout: see vtok.layers.cnn; blocks: of every level and of the middle.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 4,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        Tokenizer.__init__(self)  # the parent's networks are not these
        shape = dict(channels=channels, multipliers=multipliers, blocks=blocks, mid_blocks=blocks, groups=groups)
        shape |= dict(dropout=dropout, bias=False, attention=False, mid_attention=False)
        self.encoder = Encoder(out_channels=quantizer.width, out_kernel=1, downsample="symmetric", **shape)
        self.decoder = Decoder(in_channels=quantizer.channels, upsample="depth_to_space", adaptive=True, **shape)
        self.quantizer = quantizer
        self.stride = self.encoder.stride
        self.spec = self.spec_for(image_size)

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return from_map(self.encoder(images.to(self.encoder.conv_in.weight.dtype)))

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        z = to_map(z, (size or self.spec.image_size) // self.stride)
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))
