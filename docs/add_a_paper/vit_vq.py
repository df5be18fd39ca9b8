"""Patches and transformers around a codebook: an example of a tokenizer of your own.

After ViT-VQGAN (Yu et al., arXiv 2110.04627, section 3): patches, a transformer, a two-layer tanh projection to narrow
normalised codes, and the mirror image of that for the decoder. Status: an example; sizes are chosen here, and no
weights of the original are public.
"""

from __future__ import annotations

from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.trunk import Trunk
from vtok.layers.vit import PatchEmbed, initialise, table, together, unpatchify
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.tokenizer import Part, Quantizer, Tokenizer, TokenSpec


class ViTVQ(Tokenizer):
    """image_size: the one side that works. quantizer: pointwise (VQ, FSQ, ...). patch: stride; dim, depth, heads: of
    the encoder's and of the decoder's transformer.
    """

    def __init__(
        self, *, image_size: int, quantizer: Quantizer, patch: int = 8, dim: int = 256, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of patch={patch}")
        self.quantizer, self.stride = quantizer, patch
        self.spec = self._spec(image_size)
        shape = dict(dim=dim, depth=depth, heads=heads, hidden=4 * dim, norm="layer", ffn="gelu", bias="qkv")
        length = self.spec.layout.length
        self.embedding = PatchEmbed(dim=dim, patch=patch)
        self.encoder_places, self.decoder_places = table(length, dim), table(length, dim)
        self.encoder, self.decoder = Trunk(**shape), Trunk(**shape)
        self.narrow = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, quantizer.width))
        self.widen = nn.Linear(quantizer.channels, dim)
        self.to_pixels = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 3 * patch * patch))
        for part in (self.embedding, self.encoder, self.decoder, self.narrow, self.widen, self.to_pixels):
            initialise(part)

    def _spec(self, size: int) -> TokenSpec:
        side, quantizer = size // self.stride, self.quantizer
        part = Part(side * side, quantizer.vocab_size, quantizer.channels)
        return TokenSpec(SequenceLayout.raster(side, side), (part,), size, describe(quantizer))

    def spec_for(self, size: int) -> TokenSpec:
        if size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of patch={self.stride}")
        if size != self.spec.image_size:
            raise ValueError(
                f"ViTVQ has positions for {self.spec.image_size} px, not for image_size={size}: train a tokenizer with "
                f"data.image_size={size}, or let scripts/reconstruct.py cut larger pictures into tiles"
            )
        return self.spec

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        self.spec_for(images.shape[-1])
        return self.narrow(self.encoder(together(self.embedding(images) + self.encoder_places)))

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        x = self.widen(z.to(self.widen.weight.dtype)) + self.decoder_places
        return unpatchify(self.to_pixels(self.decoder(together(x))), self.stride, self.spec.image_size // self.stride)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.to_pixels[-1].weight
