"""The plain convolutional tokenizer: encoder, projection, quantiser, projection, decoder.

LlamaGen's VQ-16 and VQ-8 (Sun et al., arXiv 2406.06525, section 3.1) with a cosine VQ; with FSQ or any other quantiser
that treats each cell alone it is that quantiser's standard tokenizer: MAR's KL-16 with KL, iFSQ's with FSQ, IBQ's with
IBQ. Tokens are the cells in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Part, Quantizer, Tokenizer, TokenSpec


class CNNTokenizer(Tokenizer):
    """image_size: trained side; any multiple of the stride works. quantizer: pointwise, e.g. VQ or FSQ.

    channels, multipliers, blocks, groups, attention, mid_attention, dropout: see vtok.layers.cnn; the decoder has
    blocks + 1 a level. z_channels: width between the convolutions and the projections; None: the quantiser's own.
    projection: kernel of the projections. decoder_z_channels, decoder_attention, decoder_blocks: of the decoder, where
    they are not z_channels, attention and blocks + 1.
    """

    grows = "any"

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int | None = 256,
        projection: int = 1,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
        mid_blocks: int = 2,
        decoder_z_channels: int | None = None,
        decoder_attention: bool | None = None,
        decoder_blocks: int | None = None,
    ) -> None:
        super().__init__()
        shape = dict(channels=channels, multipliers=multipliers, mid_attention=mid_attention, mid_blocks=mid_blocks)
        shape |= dict(groups=groups, dropout=dropout)
        width, codes = quantizer.width, quantizer.channels
        inner, outer = z_channels or width, decoder_z_channels or z_channels or codes
        self.encoder = Encoder(out_channels=inner, blocks=blocks, attention=attention, **shape)
        attention = attention if decoder_attention is None else decoder_attention
        self.decoder = Decoder(in_channels=outer, blocks=decoder_blocks or blocks + 1, attention=attention, **shape)
        self.quantizer = quantizer
        self.project_in = nn.Conv2d(inner, width, projection, padding=projection // 2)
        self.project_out = nn.Conv2d(codes, outer, projection, padding=projection // 2)
        self.stride = self.encoder.stride
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        side, quantizer = size // self.stride, self.quantizer
        parts = (Part(side * side, quantizer.vocab_size, quantizer.channels),)
        return TokenSpec(SequenceLayout.raster(side, side), parts, size, describe(quantizer))

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return from_map(self.project_in(self.encoder(images.to(self.project_in.weight.dtype))))

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        z = to_map(z, (size or self.spec.image_size) // self.stride).to(self.project_out.weight.dtype)
        return self.decoder(self.project_out(z))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight
