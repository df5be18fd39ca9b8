"""VAR's multi-scale tokenizer: the convolutional autoencoder around a multi-scale residual quantiser.

Tian et al., arXiv 2404.02905, section 3.2; published size: 160 channels, V = 4096, C = 32. Tokens are the maps of the
scales, one after the other; any prefix of whole scales decodes to a coarser image. 3 x 3 convolutions stand around the
quantiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.layout import SequenceLayout
from vtok.quantize.residual import MultiScaleVQ
from vtok.tokenizer import Part, Reconstruction, Tokenizer, TokenSpec


class VARTokenizer(Tokenizer):
    """image_size must be quantizer.sides[-1] times the stride; other sizes take a tokenizer with other sides.

    channels, multipliers, blocks, groups, attention, mid_attention, dropout: see vtok.layers.cnn; the decoder has
    blocks + 1 a level.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: MultiScaleVQ,
        channels: int = 160,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = quantizer.channels
        shape = dict(channels=channels, multipliers=multipliers, attention=attention, mid_attention=mid_attention)
        shape |= dict(groups=groups, dropout=dropout)
        self.encoder = Encoder(out_channels=width, blocks=blocks, **shape)
        self.decoder = Decoder(in_channels=width, blocks=blocks + 1, **shape)
        self.quantizer = quantizer
        self.project_in = nn.Conv2d(width, width, 3, padding=1)
        self.project_out = nn.Conv2d(width, width, 3, padding=1)
        self.stride = self.encoder.stride
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        """Specification of the tokens of size x size images; only the size that `sides` was made for."""
        quantizer = self.quantizer
        if size != quantizer.side * self.stride:
            raise ValueError(
                f"image_size={size} does not fit quantizer.sides[-1]={quantizer.side} times the stride {self.stride}"
            )
        parts = (Part(quantizer.length, quantizer.vocab_size, quantizer.channels),)
        return TokenSpec(SequenceLayout.scales(quantizer.sides), parts, size, describe(quantizer))

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
        """Ids int64 [B, L], scale after scale. Deterministic: `noise` is not used."""
        if prefix is not None:
            raise ValueError("VARTokenizer takes no prefix")
        if layout is not None and layout != self.spec.layout:
            raise ValueError("another set of scales is another quantizer.sides: build the tokenizer with it")
        return self.quantizer.indices(self.features(images))

    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: Any | None = None,
    ) -> Tensor:
        """Images of ids [B, L]; keep: use the first `keep` tokens, the end of a scale. Deterministic."""
        if isinstance(keep, Tensor):
            raise ValueError("VARTokenizer decodes one keep for the whole batch: pass an int")
        if size is not None:
            self.spec_for(size)
        self.spec.check(tokens)
        return self._pixels(self.quantizer.assemble(self.embed(tokens), keep))

    def forward(self, images: Tensor) -> Reconstruction:
        found = self.quantizer(self.features(images))
        return Reconstruction(self._pixels(found.z), found.ids, found.loss, found.stats)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def _pixels(self, z: Tensor) -> Tensor:
        z = to_map(z, self.quantizer.side).to(self.project_out.weight.dtype)
        return self.decoder(self.project_out(z))
