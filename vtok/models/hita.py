"""Hita: tokens of the whole image in front of those of the grid, and a decoder in which the grid follows from them.

Holistic Tokenizer for Autoregressive Image Generation, arXiv 2507.02358; Hita-V and, with `vision=True`, Hita-U, which
also predicts DINOv2's patches from the holistic tokens (as VFMTok, arXiv 2507.08441). Carrier queries, DINOv2's tokens
and the convolutions' cells see each other for three layers; carriers and cells then pass three causal ones, are
quantised apart, and pass three causal ones again. There cell j is read `shift` positions early, so that the first cells
come out of the last holistic tokens and nothing comes from the last `shift` cells, whose ids change no image.
Different from the original: the first three layers drop attention weights in training, not the attention's output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, from_map, to_map
from vtok.layers.resolution import interpolate
from vtok.layers.trunk import Inputs, Trunk
from vtok.layers.vit import table, together
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise
from vtok.quantize.parts import PartsQuantizer
from vtok.tokenizer import Reconstruction, Tokenizer, TokenSpec


class Hita(Tokenizer):
    """image_size: trained side; other multiples of the stride resize the positions (Hita is trained at 336 px).

    quantizer: two parts, holistic tokens and cells. dim, depth, heads, hidden: of each of the three transformers; dim
    is also the width of the convolutions' output. side: frozen network, no part of the state, that makes side tokens
    [B, m, side_channels] of images (vtok.models.hita_side); encoding needs it, decoding does not. side_channels: width
    of the side tokens; None leaves them out. shift: 0 to the number of holistic tokens. vision: side of the grid of
    patches that features["alignment"] [B, vision^2, vision_channels] predicts; 0 for none.
    """

    grows = "squares"

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: PartsQuantizer,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_multipliers: Sequence[int] | None = None,
        blocks: int = 2,
        groups: int = 32,
        dim: int = 512,
        depth: int = 3,
        heads: int = 8,
        hidden: int = 1368,
        dropout: float = 0.1,
        side: nn.Module | None = None,
        side_channels: int | None = 1024,
        shift: int = 4,
        vision: int = 0,
        vision_channels: int = 1024,
    ) -> None:
        super().__init__()
        if len(quantizer.parts) != 2:
            raise ValueError(f"quantizer has {len(quantizer.parts)} parts, expected holistic tokens and cells")
        self.holistic = quantizer.counts[0]
        if not 0 <= shift <= self.holistic:
            raise ValueError(f"shift={shift} must lie between 0 and the {self.holistic} holistic tokens")
        if side is not None and side_channels is None:
            raise ValueError("side needs side_channels, the width of its tokens")
        self.side, self.shift, self.vision = side, shift, vision
        shape = dict(channels=channels, groups=groups)
        self.encoder = Encoder(out_channels=dim, multipliers=multipliers, blocks=blocks, **shape)
        self.decoder = Decoder(
            in_channels=dim, multipliers=decoder_multipliers or multipliers, blocks=blocks + 1, **shape
        )
        self.stride = self.encoder.stride
        if self.decoder.stride != self.stride:
            raise ValueError("decoder_multipliers must have as many levels as multipliers")
        self.quantizer = quantizer
        self.spec = self.spec_for(image_size)
        cells = (image_size // self.stride) ** 2
        shape = dict(dim=dim, depth=depth, heads=heads, hidden=hidden, dropout=dropout)
        self.fuse = Fusion(carriers=self.holistic, cells=cells, side_channels=side_channels, **shape)
        self.unfold = Causal(**shape)
        self.place, self.holistic_place = table(cells, dim), table(self.holistic, dim)
        if vision:
            self.vision_query, self.vision_norm = table(1, dim), nn.LayerNorm(dim)
            self.vision_out = nn.Linear(dim, vision_channels)
        first, last = quantizer.parts
        self.project_in, self.project_out = nn.Linear(dim, last.channels), nn.Linear(last.channels, dim)
        self.holistic_in, self.holistic_out = nn.Linear(dim, first.channels), nn.Linear(first.channels, dim)

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of the stride {self.stride}")
        side, length = size // self.stride, self.holistic
        coords = [(0, 0, i) for i in range(length)] + [(1, r, c) for r in range(side) for c in range(side)]
        layout = SequenceLayout((1,) * len(coords), tuple(coords))
        return TokenSpec(layout, self.quantizer.layout(len(coords)), size, describe(self.quantizer))

    def side_tokens(self, images: Tensor) -> Tensor | None:
        """What the frozen network sees in images, [B, m, side_channels]; None where the tokenizer takes none."""
        if self.fuse.project is None:
            return None
        if self.side is None:
            raise ValueError("encoding needs the frozen network: set side, or side_channels=null to train without it")
        with torch.no_grad():
            return self.side(images).to(self.project_in.weight.dtype)

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        grid = self.encoder(images.to(self.project_in.weight.dtype))
        carriers, cells = self.fuse(from_map(grid), self.side_tokens(images))
        return self.quantizer.join_parts([self.holistic_in(carriers), self.project_in(cells)])

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        holistic, cells = self.latents(z)
        height = (size or self.spec.image_size) // self.stride
        width = cells.shape[1] // height
        cells = cells + resized(self.place, height, width)
        x = self.unfold(torch.cat([holistic + self.holistic_place, cells], 1))
        start = self.holistic - self.shift
        return self.decoder(to_map(x[:, start : start + height * width], height))

    def latents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Holistic tokens and cells, both [B, .., D], of quantised z [B, L, C]."""
        holistic, cells = self.quantizer.split_parts(z.to(self.project_out.weight.dtype))
        return self.holistic_out(holistic), self.project_out(cells)

    def see(self, holistic: Tensor) -> Tensor:
        """Predicted patches [B, vision^2, vision_channels] of holistic tokens [B, n, D]: mask tokens that see all of
        them and each other, behind the causal holistic tokens, in the decoder's own transformer."""
        query = self.vision_query + resized(self.place, self.vision, self.vision)
        x = torch.cat([holistic, query.expand(len(holistic), -1, -1)], 1)
        rank = torch.arange(x.shape[1], device=x.device).clamp(max=self.holistic)
        pattern = (*range(1, self.holistic + 1), x.shape[1])
        x = self.unfold.trunk(Inputs(self.vision_norm(x), rank, pattern))
        return self.vision_out(x[:, self.holistic :])

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        found = self.quantizer(self.features(images))
        recon = Reconstruction(self.pixels(found.z, size=images.shape[2]), found.ids, found.loss, found.stats)
        if self.vision:
            recon.features["alignment"] = self.see(self.latents(found.z)[0])
        return recon

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight


class Causal(nn.Module):
    """A norm and causal layers; the residual stream leaves them without a norm."""

    def __init__(self, *, dim: int, depth: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.trunk = _trunk(dim, depth, heads, hidden, dropout, "qkv")

    def forward(self, x: Tensor) -> Tensor:
        rank = torch.arange(x.shape[1], device=x.device)
        return self.trunk(Inputs(self.norm(x), rank, "causal"))


class Fusion(nn.Module):
    """Carriers and cells of an image out of the convolutions' grid and side tokens."""

    def __init__(
        self,
        *,
        carriers: int,
        cells: int,
        side_channels: int | None,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.carriers, self.place = table(carriers, dim), table(cells, dim)
        self.project = None
        if side_channels is not None:
            self.project = nn.Sequential(
                nn.Linear(side_channels, dim, bias=False),
                nn.LayerNorm(dim),
                nn.ReLU(),
                nn.Linear(dim, dim, bias=False),
                nn.LayerNorm(dim),
            )
        self.norm, self.trunk = nn.LayerNorm(dim), _trunk(dim, depth, heads, hidden, dropout, "none")
        self.causal = Causal(dim=dim, depth=depth, heads=heads, hidden=hidden, dropout=dropout)

    def forward(self, grid: Tensor, side: Tensor | None) -> tuple[Tensor, Tensor]:
        """grid [B, h, w, D], side [B, m, side_channels] -> carriers [B, n, D] and cells [B, h * w, D]."""
        height, width = grid.shape[1:3]
        cells, length = grid.flatten(1, 2) + resized(self.place, height, width), len(self.carriers)
        parts = [self.carriers.expand(len(grid), -1, -1), cells]
        if self.project is not None:
            parts.insert(1, self.project(side))
        x = self.trunk(together(self.norm(torch.cat(parts, 1))))
        x = self.causal(torch.cat([x[:, :length], x[:, -height * width :]], 1))
        return x[:, :length], x[:, length:]


def _trunk(dim: int, depth: int, heads: int, hidden: int, dropout: float, bias: str) -> Trunk:
    options = dict(norm="layer", eps=1e-5, ffn="swiglu", ffn_bias=True, out_bias=True, final_norm=False)
    shape = dict(dim=dim, depth=depth, heads=heads, hidden=hidden, attention_dropout=dropout)
    return Trunk(bias=bias, **shape, **options)


def resized(places: Tensor, height: int, width: int) -> Tensor:
    """Positions [height * width, D] of a square table [cells, D], bicubic, with DINO's offset of 0.1 cells in the scale
    (facebookresearch/dino, issue 8); the table itself where it has this size."""
    side = math.isqrt(len(places))
    if (height, width) == (side, side):
        return places
    maps = places.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    scale = ((height + 0.1) / math.sqrt(len(places)), (width + 0.1) / math.sqrt(len(places)))
    found = interpolate(maps, scale_factor=scale, mode="bicubic")
    assert found.shape[2:] == (height, width), f"{tuple(found.shape[2:])} instead of {(height, width)}"
    return found[0].flatten(1).T
