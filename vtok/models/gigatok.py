"""GigaTok: convolutions around a Q-Former that turns the grid into a sequence, quantises it and turns it back.

Xiong et al., arXiv 2504.08736; published sizes 136 M to 2.9 B parameters, 256 tokens for 256 px. The tokens have no
places: queries are means of the grid over a pyramid of cells, and the decoder's queries are all the first token. What
keeps large ones usable for a generator is an alignment of the decoder's hidden state with DINOv2, so the projection
that it needs belongs to the tokenizer; the loss itself is an objective's. Differences: no dropout (all published
models have none), and the short auxiliary reconstruction from the convolutions alone has no adversarial loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map
from vtok.layers.qformer import QFormerDecoder, QFormerEncoder
from vtok.layers.vit import initialise
from vtok.layout import SequenceLayout
from vtok.losses.alignment import projection
from vtok.noise import SampleNoise
from vtok.tokenizer import Part, Quantized, Quantizer, Reconstruction, Tokenizer, TokenSpec


class GigaTok(Tokenizer):
    """image_size: a multiple of the stride, the only side that it then takes (positions are learned). tokens: a power
    of two; redundant: further ones behind them that are no part of an image's tokens, for vtok.models.retok.

    encoder, decoder: (width, layers, heads) of the two Q-Formers. channels, multipliers, blocks, groups: of the
    convolutions, see vtok.layers.cnn; decoder_multipliers where the decoder's differ; z_channels: width between them
    and the Q-Formers. alignment_depth: decoder layer whose hidden state is projected to `alignment_channels` and shown
    as features["alignment"], [B, cells, channels]; None builds no projection: choose it where no objective reads that.
    auxiliary_until: share of training in which the decoder also learns from the encoder's features directly
    (published: 15,000 steps): losses "feature" (squared distance to these, weight feature_weight) and "direct" (squared
    error of the image that they decode to), and that image as features["direct_images"]. checkpointing: recompute
    Q-Former layers in the backward pass.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        tokens: int = 256,
        redundant: int = 0,
        encoder: Sequence[int] = (512, 6, 8),
        decoder: Sequence[int] = (512, 6, 8),
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_multipliers: Sequence[int] | None = None,
        blocks: int = 2,
        z_channels: int = 256,
        groups: int = 32,
        alignment_depth: int | None = 3,
        alignment_channels: int = 768,
        auxiliary_until: float = 0.0,
        feature_weight: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.alignment_depth = alignment_depth
        self.auxiliary_until, self.feature_weight = auxiliary_until, feature_weight
        plain = dict(channels=channels, groups=groups, attention=False, mid_attention=False)
        self.encoder = Encoder(out_channels=z_channels, multipliers=multipliers, blocks=blocks, **plain)
        self.stride, self.tokens, self.redundant = self.encoder.stride, tokens, redundant
        self.decoder = Decoder(
            in_channels=z_channels,
            multipliers=decoder_multipliers or multipliers,
            blocks=blocks + 1,
            upsample="depth_to_space",
            adaptive=True,
            **plain,
        )
        if self.decoder.stride != self.stride:
            raise ValueError("decoder_multipliers must have as many levels as multipliers")
        if channels >= 128:  # the published start; narrower convolutions learn sooner from torch's
            initialise(self)
        self.spec = self._spec(image_size, quantizer)
        side, shape = image_size // self.stride, dict(channels=z_channels, checkpointing=checkpointing)
        width, depth, heads = encoder
        self.to_tokens = QFormerEncoder(
            dim=width, depth=depth, heads=heads, side=side, tokens=tokens, redundant=redundant, **shape
        )
        width, depth, heads = decoder
        self.to_grid = QFormerDecoder(
            dim=width, depth=depth, heads=heads, side=side, tokens=tokens + redundant, **shape
        )
        if alignment_depth is not None:
            if not 1 <= alignment_depth <= depth:
                raise ValueError(f"alignment_depth={alignment_depth} is no layer of a decoder of {depth}")
            self.alignment = projection(width, 4 * width, alignment_channels)
            initialise(self.alignment)
        self.quantizer = quantizer
        self.project_in = nn.Linear(z_channels, quantizer.width)
        self.project_out = nn.Linear(quantizer.channels, z_channels)

    def _spec(self, size: int, quantizer: Quantizer) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        parts = (Part(self.tokens, quantizer.vocab_size, quantizer.channels),)
        return TokenSpec(SequenceLayout.line(self.tokens), parts, size, describe(quantizer))

    def spec_for(self, size: int) -> TokenSpec:
        return self.only_size(size)

    def grid(self, images: Tensor) -> Tensor:
        """The convolutions' features [B, z_channels, h, w] of images."""
        self.check_images(images)
        self.spec_for(images.shape[2])
        return self.encoder(images.to(self.project_in.weight.dtype))

    def vectors(self, grid: Tensor) -> Tensor:
        """What the quantizer gets, [B, tokens + redundant, C], of the convolutions' features."""
        return self.project_in(self.to_tokens(from_map(grid)))

    def features(self, images: Tensor) -> Tensor:
        return self.vectors(self.grid(images))[:, : self.tokens]

    def regrid(self, z: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoder's features [B, z_channels, h, w] and hidden state [B, cells, D] of z [B, l, C]; see `pixels`."""
        z = z.to(self.project_out.weight.dtype)
        return self.to_grid(self.project_out(z), seen, self.alignment_depth)

    def pixels(
        self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Images of z [B, l, C], l from 1 to tokens. seen: bool [B, l], the tokens that a sample uses; None = all."""
        return self.decoder(self.regrid(z, seen)[0])

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        grid = self.grid(images)
        found = self.quantize(self.vectors(grid), key)
        return self.reconstruct(images, grid, found, found.z[:, : self.tokens], None, progress)

    def reconstruct(
        self, images: Tensor, grid: Tensor, found: Quantized, z: Tensor, seen: Tensor | None, progress: float
    ) -> Reconstruction:
        """Decode z [B, l, C] as training does: images, the hidden state to align, the auxiliary losses."""
        again, hidden = self.regrid(z, seen)
        recon = Reconstruction(self.decoder(again), found.ids[:, : self.tokens], dict(found.loss), dict(found.stats))
        if self.alignment_depth is not None:
            recon.features["alignment"] = self.alignment(hidden)
        if progress < self.auxiliary_until:
            direct = self.decoder(grid)
            recon.losses["feature"] = self.feature_weight * F.mse_loss(again.float(), grid.detach().float())
            recon.losses["direct"] = F.mse_loss(direct.float(), images.float())
            recon.features["direct_images"] = direct
        return recon

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight
