"""DetailFlow's tokenizer: one-dimensional tokens ordered by resolution, in groups that a generator writes in parallel.

Liu et al., arXiv 2505.21473; code ByteFlow-AI/DetailFlow. The encoder is a SigLIP2 trunk over patches and latents: the
latents of the first group see each other in order, later groups see all of themselves and of those before; patches see
patches. The decoder is a transformer from mask tokens to pixels at any size. Training decodes prefixes against
images of the resolution R(t), and repairs itself: codes of one group are replaced by near ones, and a second pass of
the encoder, which is given them, writes the rest anew. Published: N = 128, 256 or 512, V = 8192, C = 8, groups of 8.

Different from the original: it draws prefix and corruption once a batch, here every sample draws its own, keyed; so
images that are rendered at a smaller side are enlarged to the image's, as are their targets, to stand in one batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from vtok.config import describe
from vtok.layers.dit import repa_head
from vtok.layers.nested import check_keep
from vtok.layers.resolution import by_value, decode_side, degrade, prefix_side, resized
from vtok.layers.siglip import MaskDecoder, SiglipEncoder
from vtok.layers.vit import NARROW, initialise
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, host_uniforms, noise_of
from vtok.quantize.statistics import all_mean
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, Quantized, Quantizer, Reconstruction, Tokenizer, TokenSpec

SIGLIP2 = 1152  # width of the published encoder, which starts as SigLIP2's first layers
DEGRADE, LENGTH, PLACE, CODE = 51, 52, 53, 54  # streams of the keyed noise


class DetailFlowTokenizer(Tokenizer):
    """image_size: trained side; other multiples of patch work. quantizer: pointwise; a VQ where correction is on.

    tokens: N. group: tokens that a generator writes at once. causal: the first tokens, written one by one (null: the
    first group). dim, depth, heads, hidden: of the encoder; decoder_*: of the decoder. grid: side of the position
    tables. power: p of R(t). degradation: share of samples that train on a prefix. correction: second pass after a
    corruption (training only). near: a corrupted code is one of the `near` nearest. global_width: width of a network on
    the first token, given out as Reconstruction.features["global"] [B, global_width] to be aligned with the mean patch
    feature of a pretrained network; null builds none.

    With correction, training returns clean and repaired images, [2 B, 3, H, W], and their targets.
    """

    prefixes = True
    host_draws = True

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        tokens: int = 128,
        group: int = 8,
        causal: int | None = None,
        patch: int = 16,
        dim: int = 1152,
        depth: int = 12,
        heads: int = 16,
        hidden: int = 4304,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        decoder_hidden: int = 3072,
        grid: int = 16,
        power: float = 1.5,
        degradation: float = 0.2,
        correction: bool = True,
        near: int = 50,
        global_width: int | None = None,
    ) -> None:
        super().__init__()
        causal = group if causal is None else causal
        if tokens % group or causal % group or not causal < tokens:
            raise ValueError(
                f"tokens={tokens} and causal={causal} must be multiples of group={group}, {causal=} smaller"
            )
        if correction and not isinstance(quantizer, VQ):
            raise ValueError(f"correction=true needs a VQ quantizer, got {type(quantizer).__name__}; set it to false")
        self.tokens, self.group, self.causal, self.stride, self.power = tokens, group, causal, patch, power
        self.degradation, self.correction, self.near = degradation, correction, near
        self.layout = SequenceLayout.levels((1,) * causal + (group,) * ((tokens - causal) // group))
        self.encoder = SiglipEncoder(
            layout=self.layout,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            hidden=hidden,
            grid=grid,
            refine=correction,
        )
        self.project_in = nn.Linear(dim, quantizer.width)
        self.quantizer = quantizer
        self.project_out = nn.Linear(quantizer.channels, decoder_dim)
        self.project_back = nn.Linear(quantizer.channels, dim) if correction else None
        self.decoder = MaskDecoder(
            tokens=tokens,
            patch=patch,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            hidden=decoder_hidden,
            grid=grid,
        )
        self.global_head = repa_head(quantizer.channels, global_width, 1024) if global_width else None
        if min(dim, decoder_dim) < NARROW:
            initialise(self, width=min(dim, decoder_dim))
        self.spec = self.spec_for(image_size)

    def spec_for(self, size: int) -> TokenSpec:
        if size < self.stride or size % self.stride:
            raise ValueError(f"image_size={size} must be a multiple of patch={self.stride}")
        part = Part(self.tokens, self.quantizer.vocab_size, self.quantizer.channels)
        return TokenSpec(self.layout, (part,), size, describe(self.quantizer))

    def side_of(self, count: int, size: int | None = None) -> int:
        """Side at which the first `count` tokens are decoded in training: R(count), rounded up to whole patches."""
        return decode_side(prefix_side(count, self.tokens, size or self.spec.image_size, self.power), self.stride)

    # --- encoding -----------------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.project_in(self.encoder(images))

    def refine(self, images: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        """Features [B, N, C] of a second pass in which the first counts [B] codes of codes [B, N, C] are given."""
        if self.project_back is None:
            raise ValueError("a prefix is only continued by a tokenizer with correction=true")
        given = self.project_back(codes.to(self.project_back.weight.dtype))
        return self.project_in(self.encoder(images, given, counts))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        layout: SequenceLayout | None = None,
        prefix: Tensor | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """prefix: ids int64 [B, k] that stay; the tokens after them are written anew, to go with them."""
        if prefix is None:
            return super().encode(images, layout=layout, noise=noise)
        if layout not in (None, self.spec.layout):
            raise ValueError("a prefix is only continued in the layout of the tokenizer's spec: leave `layout` away")
        self.check_images(images)
        rest = prefix.new_zeros(len(prefix), self.tokens - prefix.shape[1])
        counts = prefix.new_full((len(prefix),), prefix.shape[1])
        written = self.quantizer.indices(self.refine(images, self.embed(torch.cat([prefix, rest], 1)), counts))
        return torch.cat([prefix, written[:, prefix.shape[1] :]], 1)

    def corrupt(self, z: Tensor, clean: Tensor, length: Tensor, noise: SampleNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Replaces the codes of one token of the causal ones, or of one later group, by near ones.

        z [B, N, C]: features; clean [B, N]: their ids; length [B]: tokens in use, a group of which is left to repair.
        Returns ids [B, N] and start and end [B] of what was replaced; nothing (end = 0) where length is 1.
        """
        index = torch.arange(self.tokens, device=z.device)
        room = torch.where(length <= self.causal, length, length - self.group)
        start = (_uniform(noise, PLACE) * room).floor().long().minimum(room - 1)
        single = start < self.causal
        start = torch.where(single, start, start // self.group * self.group)
        end = torch.where(length == 1, 0, start + torch.where(single, 1, self.group))
        near = self.quantizer.near(z, min(self.near, self.quantizer.vocab_size))
        pick = (noise.uniform(index, CODE) * near.shape[-1]).floor().long().clamp(max=near.shape[-1] - 1)
        changed = near.gather(2, pick.unsqueeze(-1)).squeeze(-1)
        inside = (index >= start[:, None]) & (index < end[:, None])
        return torch.where(inside, changed, clean), start, end

    @torch.no_grad()
    def corrupted(
        self, images: Tensor, noise: SampleNoise, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(clean, given, wanted) ids [B, N] for a generator that learns to repair its own mistakes.

        given: clean ids, the corrupted ones, then those written to repair them; wanted: the same, uncorrupted. rows:
        int64 [n], of which samples; both are the clean ids for the others. None: of all.
        """
        z = self.features(images)
        clean = self.quantizer.indices(z)
        rows = torch.arange(len(images), device=z.device) if rows is None else rows
        if not len(rows):
            return clean, clean, clean
        right = clean[rows]
        ids, _, end = self.corrupt(z[rows], right, torch.full_like(right[:, 0], self.tokens), noise.rows(rows))
        written = self.quantizer.indices(self.refine(images[rows], self.embed(ids), end))
        kept = torch.arange(self.tokens, device=z.device) < end[:, None]
        pair = torch.where(kept, ids, written), torch.where(kept, right, written)
        return clean, *(clean.index_copy(0, rows, changed) for changed in pair)

    # --- decoding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        keep: int | Tensor | None = None,
        size: int | None = None,
        noise: SampleNoise | None = None,
    ) -> Tensor:
        """Images of side `size` of the first `keep` tokens (int, or int64 [B]), decoded at `side_of(keep, size)`, as
        training decodes so few, and enlarged."""
        size = size or self.spec.image_size
        self.spec_for(size).check(tokens)
        if isinstance(check_keep(keep, self.tokens), Tensor):
            counted = by_value(keep)
            made = torch.cat([self.decode(tokens[rows], keep=count, size=size) for count, rows in counted])
            return made[torch.cat([rows for _, rows in counted]).argsort()]
        side = size if keep is None else self.side_of(keep, size)
        return resized(self.pixels(self.embed(tokens[:, :keep]), size=side), size)

    def pixels(self, z: Tensor, *, size: int | None = None, noise: SampleNoise | None = None) -> Tensor:
        """Images of z [B, n, C], decoded at that side."""
        return self.decoder(self.project_out(z.to(self.project_out.weight.dtype)), size or self.spec.image_size)

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        *,
        key: Tensor | None = None,
        progress: float = 0.0,
        host_key: np.ndarray | None = None,
    ) -> Reconstruction:
        """In eval mode: all tokens, no corruption, the images themselves as targets. Without host_key training on a GPU
        waits for the sides that it renders."""
        noise, z = noise_of(key, images), self.features(images)
        found = self.quantize(z, key)
        features = {} if self.global_head is None else {"global": self.global_head(found.z[:, 0])}
        if not self.training:
            made = self.pixels(found.z, size=images.shape[-1])
            return Reconstruction(made, found.ids, found.loss, found.stats, features)
        length = self.draw_length(_uniform(noise, LENGTH), _uniform(noise, DEGRADE)).long()
        host_key = noise.seeds.cpu().numpy() if host_key is None else host_key
        known = self.draw_length(*(host_uniforms(host_key, 1, stream)[:, 0] for stream in (LENGTH, DEGRADE)))
        decoded, losses, lengths, targets = found.z, found.loss, length, images
        if self.correction:
            repaired, losses = self.repair(images, z, found, length, noise)
            decoded, targets = torch.cat([decoded, repaired]), torch.cat([images, images])
            lengths, known = torch.cat([length, length]), np.tile(known, 2)
        made, targets = self.render(decoded, targets, lengths, known.astype(np.int64))
        return Reconstruction(made, found.ids, losses, found.stats, features, targets)

    def draw_length(self, place: Tensor | np.ndarray, share: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Tokens to decode, float32 [B] of whole numbers: N, or for a share `degradation` uniform in 1 .. N - group, in
        whole groups. place, share: float32 [B] in (0, 1], drawn; the same numbers on the device and, as arrays, on the
        host."""
        where, most = (torch if isinstance(place, Tensor) else np).where, self.tokens - self.group
        drawn = place * most // 1 + 1
        drawn = where(drawn > most, most, drawn)
        drawn = where(drawn > self.causal, (drawn + self.group - 1) // self.group * self.group, drawn)
        return where(share < self.degradation, drawn, self.tokens)

    def repair(
        self, images: Tensor, z: Tensor, found: Quantized, length: Tensor, noise: SampleNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes of the second pass [B, N, C], and the losses of both quantizer calls, by the tokens they judge."""
        ids, _, end = self.corrupt(z.detach(), found.ids, length, noise)
        kept = torch.arange(self.tokens, device=z.device) < end[:, None]
        given = self.quantizer.lookup(ids).detach()
        judged = (~kept & (end > 0)[:, None]).float()
        second = self.quantizer(self.refine(images, given, end), weight=judged)
        share = judged.numel() / (judged.numel() + all_mean(judged.sum()))  # as the second pass weighs all processes
        losses = {k: share * found.loss[k] + (1 - share) * second.loss[k] for k in found.loss}
        codes = torch.where(kept.unsqueeze(-1), given, second.z)
        return torch.where((end > 0)[:, None, None], codes, found.z), losses

    def render(self, z: Tensor, images: Tensor, lengths: Tensor, known: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images of the first lengths [B] codes of z [B, N, C], and what they should be, both of the side of images.
        known: lengths on the host."""
        size, made, wanted, order = images.shape[-1], [], [], []
        for length, rows in by_value(lengths, known):
            side = self.side_of(length, size)
            made.append(resized(self.pixels(z[rows, :length], size=side).float(), size))
            clear = prefix_side(length, self.tokens, size, self.power)
            wanted.append(resized(degrade(images[rows].float(), clear, side), size))
            order.append(rows)
        back = torch.cat(order).argsort()
        return torch.cat(made)[back], torch.cat(wanted)[back]

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.out.weight

    def fresh_start(self) -> str | None:
        if self.encoder.trunk.dim != SIGLIP2:
            return None
        return (
            "DetailFlow's encoder starts without SigLIP2's weights, unlike the paper's; python scripts/convert.py "
            "family=siglip2 writes a folder for init_from"
        )


def _uniform(noise: SampleNoise, stream: int) -> Tensor:
    """One number a sample, [B]."""
    return noise.uniform(torch.zeros(1, dtype=torch.int64, device=noise.seeds.device), stream).squeeze(1)
