"""FlexVAR's tokenizer: the convolutional autoencoder around a multi-scale quantiser without residuals.

Jiao et al., arXiv 2502.20313; published size: LlamaGen's VQ-16 with 8,912 codes of 32 channels. Tokens are the maps of
the scales, one after the other; the last scale makes the image, so encode and decode take any list of scales and any
image size. The original's training code is not public: here the reconstructions of the smaller scales are compared with
the image brought to their size, as section 3.1 describes, and lists of scales are drawn by the law of the generator's
training, which is public; but the full side is always there, for it makes the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.resolution import interpolate
from vtok.layout import SequenceLayout
from vtok.models.var import VARTokenizer
from vtok.noise import SampleNoise
from vtok.noise import key as key_of
from vtok.quantize.independent import IndependentVQ, drawn_sides
from vtok.quantize.residual import bounds
from vtok.tokenizer import Part, Reconstruction, TokenSpec

SIDES = 70  # stream of the noise that draws a step's list of scales


class FlexVARTokenizer(VARTokenizer):
    """As CNNTokenizer, with an IndependentVQ whose last side is image_size over the stride.

    scale_weight: of the mean squared error of the smaller scales' images, the mean over those scales; 0 leaves it out.
    draw_sides: draw the list of scales anew at every training step, from the share of training that is done, so it is
    the same on all processes and in all parts of an accumulated batch; in eval mode it is the quantizer's own.
    """

    layouts = True

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: IndependentVQ,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int | None = 256,
        attention: bool = True,
        mid_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
        scale_weight: float = 1.0,
        draw_sides: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            quantizer=quantizer,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
            z_channels=z_channels,
            attention=attention,
            mid_attention=mid_attention,
            groups=groups,
            dropout=dropout,
        )
        if scale_weight < 0:
            raise ValueError(f"scale_weight must not be negative, got {scale_weight}")
        self.scale_weight, self.draw_sides = scale_weight, draw_sides

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        layout: SequenceLayout | None = None,
        prefix: Tensor | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """layout: any SequenceLayout.scales, whatever the size of the images, which must be square."""
        if prefix is not None:
            raise ValueError("FlexVARTokenizer.encode takes no prefix: its scales do not depend on each other")
        return self.quantizer.indices(self.features(images), None if layout is None else scale_sides(layout))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        """keep: the end of a scale, one number for the whole batch. layout: the scales of `tokens` where they are not
        the spec's; the image then has the last scale's side times the stride, unless `size` says otherwise."""
        if layout is None:
            return super().decode(tokens, keep=keep, size=size, noise=noise)
        if isinstance(keep, Tensor):
            raise ValueError("FlexVARTokenizer decodes one keep for the whole batch: pass an int")
        sides, quantizer = scale_sides(layout), self.quantizer
        size = size or sides[-1] * self.stride
        part = Part(layout.length, quantizer.vocab_size, quantizer.channels)
        TokenSpec(layout, (part,), size).check(tokens)
        return self.pixels(quantizer.assemble(self.embed(tokens), keep, sides), size=size)

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        """Images of z [B, p, p, C], p * stride a side, brought to `size` (default: the spec's) bicubically."""
        images, size = super().pixels(z), size or self.spec.image_size
        if images.shape[-1] == size:
            return images
        return interpolate(images, size, mode="bicubic")

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        """images: squares of any size that the stride divides; the last scale is their own side."""
        quantizer = self.quantizer
        sides = self.sides_at(progress) if self.training and self.draw_sides else quantizer.sides
        z = self.features(images)
        sides = (*(side for side in sides if side < z.shape[1]), z.shape[1])  # of a window, those that are smaller
        found = quantizer(z, sides)
        losses, ends = dict(found.loss), bounds(sides)
        smaller = [k for k, side in enumerate(sides) if side < sides[-1]]
        if self.scale_weight and smaller:
            errors = []
            for k in smaller:
                z = quantizer.assemble(found.codes, ends[k + 1], sides)
                target = F.interpolate(images, size=sides[k] * self.stride, mode="area")
                errors.append(F.mse_loss(super().pixels(z).float(), target.float()))
            losses["scales"] = self.scale_weight * torch.stack(errors).mean()
        return Reconstruction(self.pixels(found.z, size=images.shape[-1]), found.ids, losses, found.stats)

    def sides_at(self, progress: float) -> tuple[int, ...]:
        """The list of scales of the training step that begins when this share of training is done."""
        key = key_of(round(progress * 2**48))
        own, known = self.quantizer.sides, range(1, self.quantizer.side + 1)
        return drawn_sides(key, SIDES, own, known, keep_last=True)


def scale_sides(layout: SequenceLayout) -> tuple[int, ...]:
    """Sides of a layout of whole square maps. Raises ValueError for any other layout."""
    sides = tuple(height for height, _ in layout.sides)
    if layout != SequenceLayout.scales(sides):
        raise ValueError("FlexVARTokenizer takes a layout of square scales: SequenceLayout.scales(sides)")
    return sides
