"""VAR's multi-scale tokenizer: the convolutional autoencoder around a multi-scale residual quantiser.

Tian et al., arXiv 2404.02905, section 3.2; published size: 160 channels, V = 4096, C = 32. Tokens are the maps of the
scales, one after the other; any prefix of whole scales decodes to a coarser image. The original has no width of its own
between convolutions and quantiser (z_channels=null) and 3 x 3 projections (projection=3).
"""

from __future__ import annotations

from torch import Tensor

from vtok.config import describe
from vtok.layers.nested import check_keep
from vtok.layout import SequenceLayout
from vtok.models.cnn import CNNTokenizer
from vtok.tokenizer import Part, TokenSpec


class VARTokenizer(CNNTokenizer):
    """As CNNTokenizer, with a MultiScaleVQ whose last side is image_size over the stride."""

    prefixes = True
    grows = "no"

    def spec_for(self, size: int) -> TokenSpec:
        """Only the size that `sides` was made for: other sizes take a tokenizer with other sides, whose weights may be
        those of this one (init_from)."""
        quantizer = self.quantizer
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        if size != quantizer.side * self.stride:
            raise ValueError(
                f"image_size={size} does not fit quantizer.sides[-1]={quantizer.side} times the stride {self.stride}; "
                f"let tokenizer.quantizer.sides end with {size // self.stride} (weights of other sides come by "
                "init_from, for a generator by tokenizer_sides), or leave data.image_size="
                f"{quantizer.side * self.stride}; "
                "scripts/reconstruct.py cuts larger images into tiles"
            )
        parts = (Part(quantizer.length, quantizer.vocab_size, quantizer.channels),)
        return TokenSpec(SequenceLayout.scales(quantizer.sides), parts, size, describe(quantizer))

    def decode(self, tokens: Tensor, *, keep: int | Tensor | None = None, **options) -> Tensor:
        """keep: the first `keep` tokens, the end of a scale, one number for the whole batch."""
        if isinstance(keep, Tensor):
            raise ValueError("VARTokenizer decodes one keep for the whole batch: pass an int")
        check_keep(keep, self.quantizer.length)
        return super().decode(tokens, keep=keep, **options)
