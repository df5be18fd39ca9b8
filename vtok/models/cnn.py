"""The plain convolutional tokenizer: encoder, 1 x 1 convolution, a pointwise quantiser, 1 x 1 convolution, decoder.

LlamaGen's VQ-16 and VQ-8 (Sun et al., arXiv 2406.06525, section 3.1) with a cosine VQ; with FSQ or any other quantiser
that treats each cell alone it is that quantiser's standard tokenizer. Tokens are the cells in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.layout import SequenceLayout
from vtok.tokenizer import Part, Quantizer, Reconstruction, Tokenizer, TokenSpec


class CNNTokenizer(Tokenizer):
    """image_size: trained side; any multiple of the stride works. quantizer: pointwise, e.g. VQ or FSQ.

    channels, multipliers, blocks, groups, attention, mid_attention, dropout: see vtok.layers.cnn; the decoder has
    blocks + 1 a level. z_channels: width between the convolutions and the 1 x 1 projections.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int = 256,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        shape = dict(channels=channels, multipliers=multipliers, attention=attention, mid_attention=mid_attention)
        shape |= dict(groups=groups, dropout=dropout)
        self.encoder = Encoder(out_channels=z_channels, blocks=blocks, **shape)
        self.decoder = Decoder(in_channels=z_channels, blocks=blocks + 1, **shape)
        self.quantizer = quantizer
        self.project_in = nn.Conv2d(z_channels, quantizer.channels, 1)
        self.project_out = nn.Conv2d(quantizer.channels, z_channels, 1)
        self.stride = self.encoder.stride
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        """Specification of the tokens of size x size images."""
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        side, quantizer = size // self.stride, self.quantizer
        parts = (Part(side * side, quantizer.vocab_size, quantizer.channels),)
        return TokenSpec(SequenceLayout.raster(side, side), parts, size, describe(quantizer))

    def features(self, images: Tensor) -> Tensor:
        """What the quantiser gets, [B, h, w, C]."""
        self.check_images(images)
        return from_map(self.project_in(self.encoder(images.to(self.project_in.weight.dtype))))

    def encode(
        self,
        images: Tensor,
        *,
        layout: SequenceLayout | None = None,
        prefix: Tensor | None = None,
        noise: Any | None = None,
    ) -> Tensor:
        """Ids int64 [B, h * w], in raster order. Deterministic: `noise` is not used."""
        if prefix is not None:
            raise ValueError("CNNTokenizer codes each cell alone: encode takes no prefix")
        if layout is not None and layout != SequenceLayout.raster(*(n // self.stride for n in images.shape[2:])):
            raise ValueError("CNNTokenizer has one layout, the raster of the image: leave layout away")
        return self.quantizer.indices(self.features(images))

    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: Any | None = None,
    ) -> Tensor:
        """Images of ids [B, h * w]; `size` tells the image side where it is not image_size. Deterministic."""
        if keep is not None:
            raise ValueError("CNNTokenizer decodes whole grids only: leave keep away")
        spec = self.spec if size is None else self.spec_for(size)
        spec.check(tokens)
        return self._pixels(self.quantizer.assemble(self.embed(tokens)), spec.layout.sides[0][0])

    def forward(self, images: Tensor) -> Reconstruction:
        found = self.quantizer(self.features(images))
        images = self._pixels(found.z, images.shape[2] // self.stride)
        return Reconstruction(images, found.ids, found.loss, found.stats)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def _pixels(self, z: Tensor, height: int) -> Tensor:
        z = to_map(z, height).to(self.project_out.weight.dtype)
        return self.decoder(self.project_out(z))
