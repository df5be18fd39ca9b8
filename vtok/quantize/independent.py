"""Multi-scale vector quantisation without residuals: every scale codes the image itself, as well as it can.

FlexVAR (Jiao et al., arXiv 2502.20313), section 3.1. The map of features, averaged down to each side, is quantised
against one table; the last scale alone is what the decoder gets. So any list of sides will do, and every prefix of
scales ends in a whole, smaller image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vtok.layers.cnn import from_map, to_map
from vtok.layers.resolution import interpolate
from vtok.noise import host_uniforms
from vtok.precision import full
from vtok.quantize.residual import bounds, check_sides
from vtok.quantize.vq import VQ
from vtok.tokenizer import Quantized


class IndependentVQ(VQ):
    """VQ of a square map at several sides.

    sides: of the maps, growing; those of the methods' `sides` where none are given. The other arguments are VQ's.
    """

    scales = "independent"

    def __init__(
        self,
        *,
        vocab_size: int,
        channels: int,
        sides: Sequence[int],
        l2_norm: bool = True,
        beta: float = 0.25,
        ema_decay: float | None = None,
        restart: float = 0.0,
        rotation: bool = False,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            channels=channels,
            l2_norm=l2_norm,
            beta=beta,
            ema_decay=ema_decay,
            restart=restart,
            rotation=rotation,
        )
        self.sides = check_sides(sides)
        self.bounds = bounds(self.sides)

    @property
    def side(self) -> int:
        """Side of the last map."""
        return self.sides[-1]

    @property
    def length(self) -> int:
        """L, tokens of an image."""
        return self.bounds[-1]

    def forward(self, z: Tensor, sides: Sequence[int] | None = None) -> Quantized:
        """z [B, H, W, C] with H = W. Quantized.z is the last scale [B, p, p, C]; codes [B, L, C] have z's gradient too.

        loss: VQ's, the mean over the scales.
        """
        sides = self._sides(sides)
        pooled = self.pooled(z, sides)
        share = torch.cat([torch.full((side**2,), 1 / side**2, device=z.device) for side in sides])
        found = super().forward(pooled, weight=share.expand(len(z), -1))
        return Quantized(self.assemble(found.codes, None, sides), found.codes, found.ids, found.loss, found.stats)

    @torch.no_grad()
    def indices(self, z: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """Ids int64 [B, L] of z [B, H, W, C], scale after scale."""
        return super().indices(self.pooled(z, sides))

    def pooled(self, z: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """z [B, H, W, C] averaged down to every side, float32 [B, L, C]. Raises ValueError unless H = W."""
        if z.dim() != 4 or z.shape[1] != z.shape[2] or z.shape[3] != self.channels:
            raise ValueError(f"z is {tuple(z.shape)}, expected a square map [B, H, H, {self.channels}]")
        with torch.autocast(z.device.type, enabled=False):
            features = to_map(full(z), z.shape[1])
            maps = [interpolate(features, side, mode="area") for side in self._sides(sides)]
        return torch.cat([from_map(scale).flatten(1, 2) for scale in maps], 1)

    def assemble(self, codes: Tensor, keep: int | None = None, sides: Sequence[int] | None = None) -> Tensor:
        """The last of the scales in the first `keep` codes of codes [B, l, C] (default: all given), as [B, p, p, C].

        Raises ValueError unless `keep` is the end of a scale.
        """
        sides = self._sides(sides)
        ends = bounds(sides)
        count = codes.shape[1] if keep is None else keep
        if count not in ends[1:] or count > codes.shape[1]:
            raise ValueError(f"keep={count} of {codes.shape[1]} tokens is no end of a scale: choose from {ends[1:]}")
        step = ends.index(count) - 1
        return codes[:, ends[step] : count].unflatten(1, (sides[step], sides[step]))

    def _sides(self, sides: Sequence[int] | None) -> tuple[int, ...]:
        return self.sides if sides is None else check_sides(sides)


def drawn_sides(
    key: int, stream: int, own: Sequence[int], known: Sequence[int], *, keep_last: bool = False
) -> tuple[int, ...]:
    """The list of scales of one training step, some of `known`, drawn by the key of a sample.

    Section 3.3 and the trainer of FlexVAR's generator, with 16 and 680 replaced by the largest side and the tokens of
    the fixed list `own`: in 5 % that list; else the first two sides, 5 up to 10/16 of the largest, 2 above it, and the
    largest. Up to four inner ones are dropped (10, 5, 2, 1 %), then one of the last four while it is too long: the
    largest may be among these, unless keep_last.
    """
    draws = (min(number, 1 - 2**-23) for number in host_uniforms(np.array([key]), 64, stream)[0].tolist())
    largest, budget = known[-1], sum(side * side for side in own)
    chosen = list(own)
    if next(draws) >= 0.05:
        low = [s for s in known[2:-1] if s <= largest * 10 / 16]
        high = [s for s in known[2:-1] if s > largest * 10 / 16]
        picked = [pool.pop(int(next(draws) * len(pool))) for pool, n in ((low, 5), (high, 2)) for _ in range(n) if pool]
        chosen = sorted({*known[:2], *picked, largest})
    level = next(draws)
    for threshold in (0.9, 0.95, 0.98, 0.99):
        if level > threshold and len(chosen) > 3:
            chosen.pop(2 + int(next(draws) * (len(chosen) - 3)))
    while sum(s * s for s in chosen) > budget and len(chosen) > 2:
        end = len(chosen) - keep_last
        last = min(4, end - 1)  # the first side always stays
        chosen.pop(end - last + int(next(draws) * last))
    return tuple(chosen)
