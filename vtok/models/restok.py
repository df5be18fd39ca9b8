"""ResTok: hierarchical residuals of image tokens and of latents in one encoder; levels of 1, 1, 2, 4, .. tokens.

ResTok (Kwai-Kolors, arXiv 2601.03955). A MaskGIT CNN gives a grid of image tokens. The latents start as a residual
pyramid of it: each level is the area average of what the coarser ones leave. Inside the trunk the coarsest image level
is halved three times (every second token), each time leaving its residual behind; attention is causal by level. Each
latent level has its own projection before and after the quantizer. Nested dropout keeps a prefix of the latents; the
rest becomes a mask token. The decoder writes all cells at once from [latents, mask tokens], through a MaskGIT CNN.

`legacy_reshape`: the published weights read the latents [N, D] as [D, N] before the projections, a slip inherited from
TiTok. Every quantized token then depends on all latents, whatever the mask says. Off by default: then a token depends
on the latents of its own and of coarser levels only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.config import describe
from vtok.layers.cnn import Decoder, Encoder, to_map
from vtok.layers.cnn_maskgit import DECODER, ENCODER
from vtok.layers.nested import Distribution, check_keep, keep_counts, keep_sums, replace_dropped
from vtok.layers.rope import rope_2d
from vtok.layers.trunk import Trunk
from vtok.layers.vit import NARROW, cell_means, initialise, table, together
from vtok.layout import SequenceLayout, visible
from vtok.noise import SampleNoise, noise_of
from vtok.tokenizer import Part, Quantizer, Reconstruction, Tokenizer, TokenSpec

Size = Sequence[int]  # width, depth, heads
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]
STREAM = 71  # of the noise: how many tokens are kept


class ResTok(Tokenizer):
    """tokens: N, a power of two; levels of 1, 1, 2, 4, .., N / 2. encoder, decoder: [width, depth, heads].

    stages: image levels in the end; the grid's side must be a multiple of 2 ** (stages - 1). theta: base of the rotary
    positions. nested: distribution of the number of tokens kept in training, see vtok.layers.nested. semantic: width of
    the features of a pretrained network that training aligns with: features["alignment_global"] [B, semantic] from the
    mean of the coarsest image level and features["alignment"] [B, h * w, semantic] from a second decoder pass; None has
    neither. width, channels, multipliers, blocks, groups: of the convolutions, see vtok.layers.cnn.
    """

    prefixes = True

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        tokens: int = 128,
        encoder: Size = (1024, 24, 16),
        decoder: Size = (1024, 24, 16),
        stages: int = 4,
        legacy_reshape: bool = False,
        theta: float = 10000.0,
        nested: Distribution = "all",
        semantic: int | None = None,
        width: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
    ) -> None:
        super().__init__()
        levels = level_sizes(tokens)
        if not 1 <= stages <= encoder[1]:
            raise ValueError(f"stages={stages} must lie between 1 and the encoder's depth {encoder[1]}")
        shape = dict(channels=channels, multipliers=multipliers, blocks=blocks, mid_blocks=blocks, groups=groups)
        self.cnn_encoder = Encoder(out_channels=width, **shape, **ENCODER)
        self.cnn_decoder = Decoder(in_channels=width, **shape, **DECODER)
        options = dict(levels=levels, theta=theta)
        self.encoder = LevelEncoder(
            size=encoder, channels=width, out=quantizer.width, legacy_reshape=legacy_reshape, stages=stages, **options
        )
        self.decoder = LevelDecoder(size=decoder, channels=quantizer.channels, out=width, **options)
        self.tokens, self.stages, self.nested = tokens, stages, nested
        self.fill = table(1, quantizer.channels)
        self.semantic = semantic
        if semantic:
            self.semantic_mask = table(1, decoder[0])
            self.align_levels = nn.Linear(encoder[0], semantic, bias=False)
            self.align_cells = nn.Linear(decoder[0], semantic, bias=False)
        halves = {self.cnn_encoder: encoder, self.cnn_decoder: decoder, self.encoder: encoder, self.decoder: decoder}
        if semantic:
            halves |= {self.align_levels: encoder, self.align_cells: decoder}
        for part, size in halves.items():
            initialise(part, width=size[0])
        self.start_short(encoder[0] < NARROW, decoder[0] < NARROW)
        self.quantizer = quantizer
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.stride = self.cnn_encoder.stride
        self.spec = self.spec_for(image_size)
        self.register_buffer("keep_sums", keep_sums(nested, tokens), persistent=False)

    @torch.no_grad()
    def start_short(self, encoder: bool, decoder: bool) -> None:
        """The start of narrow halves, which train for minutes: what reads, reads few and not the mean of all, in which
        all are alike; and pictures begin nearly grey."""
        for part in (self.encoder,) * encoder + (self.decoder,) * decoder:
            for block in part.trunk.blocks:
                block.attention.q_norm.weight.mul_(3)
        if decoder:
            self.cnn_decoder.conv_out.weight.mul_(0.1)

    def spec_for(self, size: int) -> TokenSpec:
        """Any multiple of stride * 2 ** (stages - 1) has the same tokens."""
        multiple = self.stride * 2 ** (self.stages - 1)
        if size < multiple or size % multiple:
            raise ValueError(
                f"image_size={size} must be a multiple of {multiple}, stride {self.stride} times 2 ** (stages - 1); "
                "change data.image_size, or for a new model tokenizer.stages (1 takes any multiple of the stride); "
                "scripts/reconstruct.py cuts other images into tiles"
            )
        part = Part(self.tokens, self.quantizer.vocab_size, self.quantizer.channels)
        layout = SequenceLayout.levels(self.encoder.levels)
        return TokenSpec(layout, (part,), size, describe(self.quantizer))

    def image_levels(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the quantizer gets, [B, N, C], and the image tokens, coarsest level first: [B, n, D] each."""
        self.check_images(images)
        self.spec_for(images.shape[3])
        dtype = self.cnn_encoder.conv_out.weight.dtype
        return self.encoder(self.cnn_encoder(((images * 0.5 + 0.5 - self.mean) / self.std).to(dtype)))

    def features(self, images: Tensor) -> Tensor:
        return self.image_levels(images)[0]

    def pixels(
        self,
        z: Tensor,
        *,
        size: int | None = None,
        noise: SampleNoise | None = None,
        keep: int | Tensor | None = None,
    ) -> Tensor:
        """keep: number of tokens that are not replaced by the mask token, for all or int64 [B]."""
        return self._render(self.decoder(replace_dropped(z, keep, self.fill), self._side(size)), size)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        (self.spec if size is None else self.spec_for(size)).check(tokens)
        return self.pixels(self.embed(tokens), size=size, keep=check_keep(keep, self.tokens))

    def forward(self, images: Tensor, *, key: Tensor | None = None, progress: float = 0.0) -> Reconstruction:
        size = images.shape[3]
        z, levels = self.image_levels(images)
        found = self.quantize(z, key)
        if not self.training:
            return Reconstruction(self.pixels(found.z, size=size), found.ids, found.loss, found.stats)
        keep = keep_counts(self.keep_sums, noise_of(key, images), stream=STREAM)
        z = replace_dropped(found.z, keep, self.fill)
        h, features = self.decoder(z, self._side(size)), {}
        if self.semantic:
            features["alignment_global"] = self.align_levels(levels[0].mean(1))
            again = self.decoder.hidden(z, self._side(size), self.semantic_mask)
            features["alignment"] = self.align_cells(again)
        return Reconstruction(self._render(h, size), found.ids, found.loss, found.stats, features)

    def _side(self, size: int | None) -> int:
        return (size or self.spec.image_size) // self.stride

    def _render(self, h: Tensor, size: int | None) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):  # float32 as published: the CNN is the fragile part in fp16
            h = to_map(h.to(self.cnn_decoder.conv_out.weight.dtype), self._side(size))
            return self.cnn_decoder(h) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        return self.cnn_decoder.conv_out.weight

    def undecayed(self) -> list[nn.Parameter]:
        """Tables, codes, and what reads patches and codes, as in the original."""
        encoder, decoder = self.encoder, self.decoder
        found = [self.fill, encoder.image_level, encoder.latent_level, encoder.embed.weight]
        found += [decoder.latent_level, decoder.mask, *(layer.weight for layer in decoder.embed)]
        found += [self.semantic_mask] if self.semantic else []
        return [*found, *self.quantizer.parameters()]


class LevelEncoder(nn.Module):
    """Features [B, channels, h, w] to latents [B, N, out] and image levels; see ResTok."""

    def __init__(
        self,
        *,
        size: Size,
        channels: int,
        out: int,
        levels: Sequence[int],
        stages: int,
        legacy_reshape: bool,
        theta: float,
    ) -> None:
        super().__init__()
        dim, depth, _ = size
        self.levels, self.legacy_reshape, self.theta = tuple(levels), legacy_reshape, theta
        self.merges = {int(i / stages * depth) - 1 for i in range(1, stages)}
        self.embed = nn.Conv2d(channels, dim, 1)
        self.image_level, self.latent_level = table(stages, dim), table(len(levels), dim)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = vit(size)
        self.out = nn.ModuleList(nn.Linear(dim, out) for _ in levels)

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        grid = self.embed(features)
        sides = [tuple(grid.shape[2:])]
        latents = residual_pyramid(grid, self.levels) + by_level(self.latent_level, self.levels)
        image = grid.flatten(2).transpose(1, 2) + self.image_level[0]
        h = self.trunk_pass(self.norm_in(torch.cat([image, latents], 1)), sides)
        counts = [height * width for height, width in sides]
        *image_levels, latents = h.split([*counts, sum(self.levels)], dim=1)
        return self.project(self.norm_out(latents)), image_levels

    def trunk_pass(self, x: Tensor, sides: list[tuple[int, int]]) -> Tensor:
        """The blocks on [image levels, latents]; merged levels come in front, and their sides in front of `sides`."""
        position, mask = self.places(sides, x.device)
        for i, block in enumerate(self.trunk.blocks):
            height, width = sides[0]
            merge = partial(halve, count=height * width) if i in self.merges else None
            options = dict(vector=None, position=position, mask=mask, cache=None, layer=i, between=merge)
            again = self.trunk.checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False, **options) if again else block(x, **options)
            if merge is None:
                continue
            sides.insert(0, (height, width // 2))
            count = height * (width // 2)
            x = torch.cat([x[:, :count] + self.image_level[len(sides) - 1], x[:, count:]], 1)
            position, mask = self.places(sides, x.device)
        return x

    def places(self, sides: Sequence[tuple[int, int]], device: torch.device) -> tuple[tuple, Tensor]:
        """Rotary tables and mask. Each image level has the cells of its own grid, moved along the diagonal past all
        tokens before it; latents go on along the diagonal. A level sees itself and what is coarser; latents see all
        image levels."""
        rows, columns, ranks, start = [], [], [], 0
        for level, (height, width) in enumerate(sides):
            cell = torch.arange(height * width, device=device)
            rows.append(start + cell // width)
            columns.append(start + cell % width)
            ranks.append(torch.full_like(cell, level))
            start += height * width
        latent = start + torch.arange(sum(self.levels), device=device)
        ranks += [torch.full((n,), len(sides) + level, device=device) for level, n in enumerate(self.levels)]
        head = self.trunk.dim // self.trunk.heads
        cos, sin = rope_2d(torch.cat([*rows, latent]), torch.cat([*columns, latent]), head, self.theta)
        rank = torch.cat(ranks)
        return (cos, sin, None), visible(rank, rank)

    def project(self, latents: Tensor) -> Tensor:
        """Latents [B, N, D] to [B, N, out], each level by its own layer."""
        if self.legacy_reshape:
            latents = latents.reshape(len(latents), -1, latents.shape[1]).transpose(1, 2)
        parts = latents.split(self.levels, dim=1)
        return torch.cat([layer(part) for layer, part in zip(self.out, parts)], 1)


class LevelDecoder(nn.Module):
    """Codes [B, N, channels] to one vector per cell [B, side * side, out]."""

    def __init__(self, *, size: Size, channels: int, out: int, levels: Sequence[int], theta: float) -> None:
        super().__init__()
        dim = size[0]
        self.levels, self.theta = tuple(levels), theta
        self.embed = nn.ModuleList(nn.Linear(channels, dim) for _ in levels)
        self.latent_level, self.mask = table(len(levels), dim), table(1, dim)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = vit(size)
        self.out = nn.Linear(dim, out)

    def forward(self, z: Tensor, side: int) -> Tensor:
        return self.out(self.norm_out(self.hidden(z, side, self.mask)))

    def hidden(self, z: Tensor, side: int, mask: Tensor) -> Tensor:
        """Hidden states [B, side * side, D] of the cells, which start as `mask` [1, D]."""
        parts = z.to(self.embed[0].weight.dtype).split(self.levels, dim=1)
        latents = torch.cat([layer(part) for layer, part in zip(self.embed, parts)], 1)
        latents = latents + by_level(self.latent_level, self.levels)
        x = torch.cat([latents, mask.expand(len(z), side * side, -1)], 1)
        latent, cell = torch.arange(z.shape[1], device=z.device), torch.arange(side * side, device=z.device)
        rows, columns = torch.cat([latent, len(latent) + cell // side]), torch.cat([latent, len(latent) + cell % side])
        cos, sin = rope_2d(rows, columns, self.trunk.dim // self.trunk.heads, self.theta)
        return self.trunk(together(self.norm_in(x), position=(cos, sin, None)))[:, len(latent) :]


def vit(size: Size) -> Trunk:
    """The transformer of both halves: LayerNorm, also on q and k; no bias of k; a learned scale on each branch."""
    width, depth, heads = size
    options = dict(norm="layer", ffn="gelu", bias="qv", qk_norm="layer", layer_scale=1.0, final_norm=False)
    return Trunk(dim=width, depth=depth, heads=heads, hidden=4 * width, **options)


def level_sizes(tokens: int) -> list[int]:
    """1, 1, 2, 4, .., tokens / 2."""
    if tokens < 2 or tokens & (tokens - 1):
        raise ValueError(f"tokens={tokens} must be a power of two, at least 2: levels hold 1, 1, 2, 4, .. tokens")
    return [1, *(2**i for i in range(tokens.bit_length() - 1))]


def by_level(values: Tensor, levels: Sequence[int]) -> Tensor:
    """Row k of `values` for each token of level k, [N, D]."""
    return torch.cat([row.expand(count, -1) for row, count in zip(values, levels)])


def residual_pyramid(grid: Tensor, levels: Sequence[int]) -> Tensor:
    """Area averages of grid [B, D, h, w] at 1 x 1, 1 x 1, 1 x 2, 2 x 2, 2 x 4, .. cells, [B, N, D]: each level of what
    the nearest-neighbour enlargements of the levels before it leave. The second one is zero up to rounding."""
    rest, found = grid, []
    for count in levels:
        height = 2 ** ((count.bit_length() - 1) // 2)
        pooled = cell_means(rest, height, count // height)
        found.append(pooled.flatten(2).transpose(1, 2))
        rest = rest - F.interpolate(pooled, size=grid.shape[2:], mode="nearest")
    return torch.cat(found, 1)


def halve(x: Tensor, count: int) -> Tensor:
    """[B, l, D] with every second one of the first `count` tokens in front, as a coarser level; what is left of those
    `count` is their difference to it (nearest neighbour), zero at the sampled ones."""
    fine = x[:, :count]
    coarse = fine[:, ::2]
    return torch.cat([coarse, fine - coarse.repeat_interleave(2, dim=1), x[:, count:]], 1)
