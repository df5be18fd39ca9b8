"""Multi-scale residual vector quantisation: an image's features as square maps of codes of growing size that add up.

VAR (Tian et al., arXiv 2404.02905), algorithms 1 and 2. With residual r = f and sum a = 0, scale k codes the residual
averaged down to its side; the codes, brought up to the full side and passed through phi_k(h) = (1 - w) h + w conv(h),
are added to a and taken from r. One table serves all scales. Everything runs in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.cnn import from_map, to_map
from vtok.layers.resolution import interpolate
from vtok.precision import full
from vtok.quantize.codebook import Codebook, nearest
from vtok.quantize.statistics import code_statistics
from vtok.tokenizer import Quantized, Quantizer


class MultiScaleVQ(Quantizer):
    """Residual quantiser over scales.

    vocab_size V, channels C. sides: of the square maps, growing; the last is the side of the feature map.
    l2_norm: choose codes by cosine (the codes that are added keep their length). beta: weight of the commitment loss.
    phi: number of 3 x 3 convolutions shared by the scales: 1 for all, n for neighbours, 0 one per scale.
    phi_weight: w of phi; 0 makes it the identity, without parameters. ema_decay, restart: see Codebook.
    """

    scales = "residual"

    def __init__(
        self,
        *,
        vocab_size: int,
        channels: int,
        sides: Sequence[int],
        l2_norm: bool = False,
        beta: float = 0.25,
        phi: int = 4,
        phi_weight: float = 0.5,
        ema_decay: float | None = None,
        restart: float = 0.0,
    ) -> None:
        super().__init__()
        self.sides = check_sides(sides)
        if phi < 0 or not 0 <= phi_weight <= 1:
            raise ValueError(f"phi must be at least 0 and phi_weight within [0, 1], got {phi} and {phi_weight}")
        self.vocab_size, self.channels = vocab_size, channels
        self.l2_norm, self.beta, self.phi_weight = l2_norm, beta, phi_weight
        self.codebook = Codebook(
            vocab_size=vocab_size, channels=channels, l2_norm=False, ema_decay=ema_decay, restart=restart
        )
        convolutions = (phi or len(self.sides)) if phi_weight else 0
        self.phi = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convolutions))
        self.shared = phi_table(len(self.sides), convolutions) if convolutions else ()
        self.bounds = bounds(self.sides)

    @property
    def side(self) -> int:
        """Side of the feature map."""
        return self.sides[-1]

    @property
    def length(self) -> int:
        """L, tokens of an image."""
        return self.bounds[-1]

    def forward(self, z: Tensor) -> Quantized:
        """z [B, H, W, C] with H = W = sides[-1]. Quantized.z is the sum over all scales, with z's gradient.

        loss: mean over the scales of the squared distance between z and the sum *so far*, in both directions.
        """
        with torch.autocast(z.device.type, enabled=False):
            target = self._map(z)
            held = target.detach()
            residual, total = held, torch.zeros_like(held)
            ids, vectors = [], []
            codebook = commitment = 0.0
            for step in range(len(self.sides)):
                vector = self._pooled(residual, step)
                ids.append(self._nearest(vector).view(len(z), -1))
                vectors.append(vector)
                added = self._contribution(F.embedding(ids[-1], self.codebook.table()), step)
                total, residual = total + added, residual - added.detach()
                codebook = codebook + F.mse_loss(total, held) / len(self.sides)
                commitment = commitment + self.beta * F.mse_loss(target, total.detach()) / len(self.sides)
            flat = torch.cat(ids, 1)
            # codes carry z's gradient, as z itself does below: that of the map averaged down to their scale
            means = [self._pooled(target - held, k).view(len(z), -1, self.channels) for k in range(len(ids))]
            codes = self.lookup(flat).detach() + torch.cat(means, 1)
            if self.training:
                self.codebook.update(torch.cat(vectors), torch.cat([i.reshape(-1) for i in ids]))
            out = from_map(total.detach() + (target - held))
        stats = code_statistics(flat, self.vocab_size, everywhere=self.training)
        return Quantized(out, codes, flat, {"codebook": codebook, "commitment": commitment}, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z [B, H, W, C], scale after scale."""
        with torch.autocast(z.device.type, enabled=False):
            residual, ids = self._map(z), []
            for step in range(len(self.sides)):
                ids.append(self._nearest(self._pooled(residual, step)).view(len(z), -1))
                residual = residual - self._contribution(self.lookup(ids[-1]), step)
            return torch.cat(ids, 1)

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return F.embedding(ids, self.codebook.table())

    def assemble(self, codes: Tensor, keep: int | None = None) -> Tensor:
        """Sum [B, H, W, C] of the first `keep` codes of codes [B, l, C] (default: all that are given).

        Raises ValueError unless `keep` is the end of a scale.
        """
        count = codes.shape[1] if keep is None else keep
        if count not in self.bounds or count > codes.shape[1]:
            ends = self.bounds[1:]
            raise ValueError(f"keep={count} of {codes.shape[1]} tokens is no end of a scale: choose from {ends}")
        total = codes.new_zeros(len(codes), self.channels, self.side, self.side, dtype=full(codes[:0]).dtype)
        with torch.autocast(codes.device.type, enabled=False):
            for total in self._sums(codes, self.bounds.index(count)):  # noqa: B007
                pass
        return from_map(total)

    def maps(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Inputs of the steps start..stop-1 (start >= 1), float32 [B, n, C], n their tokens: cell by cell the sum of
        all earlier scales averaged down to the step's side.

        codes: [B, l, C] with at least the codes of steps < stop - 1; later ones are not read. A step's map is the same
        bits whichever span it is asked in.
        """
        if not 1 <= start < stop <= len(self.sides):
            raise ValueError(f"maps exist for steps 1..{len(self.sides) - 1}, asked for {start}..{stop - 1}")
        if codes.shape[1] < self.bounds[stop - 1]:
            raise ValueError(f"maps up to step {stop - 1} need {self.bounds[stop - 1]} codes, got {codes.shape[1]}")
        with torch.autocast(codes.device.type, enabled=False):
            sums = enumerate(self._sums(codes, stop - 1), start=1)
            return torch.cat([self.input_of(total, k) for k, total in sums if k >= start], 1)

    def input_of(self, total: Tensor, step: int) -> Tensor:
        """Input of a step, float32 [B, n, C], of the sum [B, C, H, W] of all scales before it."""
        return F.interpolate(total, size=self.sides[step], mode="area").flatten(2).transpose(1, 2)

    def add(self, total: Tensor | None, codes: Tensor, step: int) -> Tensor:
        """The sum [B, C, H, W] of the scales 0..step, of that of the scales before (None: there are none) and the codes
        [B, side * side, C] of this one. The same bits as the sums of `maps`."""
        with torch.autocast(codes.device.type, enabled=False):
            return (0.0 if total is None else total) + self._contribution(codes, step)

    # --- one scale ----------------------------------------------------------------------------------------------------

    def _sums(self, codes: Tensor, steps: int) -> Iterator[Tensor]:
        """Sum [B, C, H, W] after each of the first `steps` scales."""
        total = None
        for step in range(steps):
            total = self.add(total, codes[:, self.bounds[step] : self.bounds[step + 1]], step)
            yield total

    def _contribution(self, codes: Tensor, step: int) -> Tensor:
        """What codes [B, side * side, C] of a scale add to the full map, [B, C, H, W]. Bicubic up, then phi."""
        h = to_map(full(codes), self.sides[step])
        if step < len(self.sides) - 1:
            h = interpolate(h, self.side, mode="bicubic")
        if not self.phi:
            return h
        conv, w = self.phi[self.shared[step]], self.phi_weight
        return (1 - w) * h + w * F.conv2d(h, full(conv.weight), full(conv.bias), padding=1)

    def _pooled(self, residual: Tensor, step: int) -> Tensor:
        """Vectors [B * side * side, C] that a scale codes."""
        if step < len(self.sides) - 1:
            residual = F.interpolate(residual, size=self.sides[step], mode="area")
        return from_map(residual).reshape(-1, self.channels)

    def _nearest(self, vectors: Tensor) -> Tensor:
        table = self.codebook.table().detach()
        if self.l2_norm:
            return nearest(F.normalize(vectors, dim=-1), F.normalize(table, dim=-1))
        return nearest(vectors, table)

    def _map(self, z: Tensor) -> Tensor:
        if z.dim() != 4 or tuple(z.shape[1:]) != (self.side, self.side, self.channels):
            want = (self.side, self.side, self.channels)
            raise ValueError(
                f"z is {tuple(z.shape)}, expected [B, {want[0]}, {want[1]}, {want[2]}]: change image_size or sides"
            )
        return to_map(full(z), self.side)


def phi_table(scales: int, convolutions: int) -> tuple[int, ...]:
    """Which convolution each scale uses: the one whose tick is nearest to k / (K - 1), the first on a tie.

    The ticks are n evenly spaced points with a margin of 1/(3n) at n = 4 and 1/(2n) otherwise. For K = 10, n = 4 the
    scales 2 and 7 lie exactly between two ticks in real numbers: the table of all published VARs, 0 0 1 1 1 2 2 3 3 3,
    comes out of float64 rounding in the order of operations below, so do not simplify it.
    """
    if convolutions == 1 or scales == 1:
        return (0,) * scales
    if convolutions == scales:
        return tuple(range(scales))
    margin = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    spacing = (1 - margin - margin) / (convolutions - 1)
    ticks = [i * spacing + margin for i in range(convolutions - 1)] + [1 - margin]
    places = [k / (scales - 1) for k in range(scales)]
    return tuple(min(range(convolutions), key=lambda j: abs(ticks[j] - place)) for place in places)


def check_sides(sides: Sequence[int]) -> tuple[int, ...]:
    """`sides` as a tuple. Raises ValueError unless they are positive and growing."""
    found = tuple(int(side) for side in sides)
    if not found or list(found) != sorted(found) or found[0] < 1:
        raise ValueError(f"sides must be positive and growing, got {found}")
    return found


def bounds(sides: Sequence[int]) -> tuple[int, ...]:
    """Where each scale's tokens start, and at the end their number."""
    return tuple(sum(side * side for side in sides[:k]) for k in range(len(sides) + 1))
