"""MaskGIT's VQGAN (Chang et al., arXiv 2202.04200): f16, 1024 codes of width 256, Euclidean nearest, no attention.

TiTok (arXiv 2406.07550) learns its codes as proxies and starts from its decoder. The published model sees images in
[0, 1]; the change of range happens here. In its quantizer loss the commitment has weight 1 and the codebook 0.25
(quantizer.beta and quantizer.codebook_weight).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.layers.cnn_maskgit import DECODER, ENCODER
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Part, Quantizer, Tokenizer, TokenSpec


class MaskGITVQGAN(Tokenizer):
    """image_size: trained side; any multiple of the stride works. The other arguments: see vtok.layers.cnn."""

    grows = "any"

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        shape = dict(channels=channels, multipliers=multipliers, groups=groups, dropout=dropout)
        shape |= dict(blocks=blocks, mid_blocks=blocks)
        self.encoder = Encoder(out_channels=quantizer.width, **shape, **ENCODER)
        self.decoder = Decoder(in_channels=quantizer.channels, **shape, **DECODER)
        self.quantizer = quantizer
        self.stride = self.encoder.stride
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        side, quantizer = size // self.stride, self.quantizer
        part = Part(side * side, quantizer.vocab_size, quantizer.channels)
        return TokenSpec(SequenceLayout.raster(side, side), (part,), size, describe(quantizer))

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return from_map(self.encoder((images * 0.5 + 0.5).to(self.encoder.conv_out.weight.dtype)))

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        z = to_map(z, (size or self.spec.image_size) // self.stride)
        return self.decoder(z.to(self.decoder.conv_out.weight.dtype)) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight
