"""Quantisation to signs: every channel becomes one bit of the id, and there is no table of codes.

LFQ (lookup-free): Yu et al., arXiv 2310.05737, section 3.1, as Open-MAGVIT2 (arXiv 2409.04410) trains it. BSQ (binary
spherical): Zhao et al., arXiv 2406.07548, where vectors and codes lie on the unit sphere. No reference available for
BSQ: no recorded output of an original exists here, so the tests compare with the defining equations by enumeration.
The entropy terms are exact, and cheap at 2^18 codes: see vtok.quantize.entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.precision import full
from vtok.quantize.entropy import bit_entropy, mean_entropy, mean_of_products
from vtok.quantize.fsq import check_groups
from vtok.quantize.statistics import code_statistics, shared_mean
from vtok.tokenizer import Quantized, Quantizer

LARGEST = 20  # bits of which a table over all codes is kept, 4 MB, for the entropy of the mean


class LFQ(Quantizer):
    """Codes of +1 and -1; bit i of the id is 1 where channel i is above 0 (0 counts as -1).

    bits: channels, V = 2^bits. beta: weight of the commitment loss. entropy_weight: of sample_weight * (mean entropy of
    a vector's soft assignment) - batch_weight * (entropy of the mean assignment); 0 leaves it out. The assignment is
    softmax(2 z c / temperature) over the codes c. groups: bits of each sub-code of `split`, low bits first, [6, 12] for
    Open-MAGVIT2's generators. entropy_groups: bits of the groups whose entropies of the mean are added up, an upper
    bound of the whole; None: one group of all bits, exact.
    """

    def __init__(
        self,
        *,
        bits: int,
        beta: float = 0.25,
        entropy_weight: float = 0.1,
        sample_weight: float = 1.0,
        batch_weight: float = 1.0,
        temperature: float = 0.01,
        groups: Sequence[int] | None = None,
        entropy_groups: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ValueError(f"bits must lie in 1..62, got {bits}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.channels, self.vocab_size = bits, 2**bits
        self.groups, self.entropy_groups = check_groups(groups, bits), check_groups(entropy_groups, bits)
        if entropy_weight and max(self.entropy_groups) > LARGEST:
            raise ValueError(
                f"the entropy over 2^{max(self.entropy_groups)} codes does not fit: give entropy_groups of at most "
                f"{LARGEST} bits, or entropy_weight=0"
            )
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        self.sample_weight, self.batch_weight = sample_weight, batch_weight

    @property
    def size(self) -> float:
        """Absolute value of a code's channels."""
        return 1.0

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(2**count for count in self.groups)

    def forward(self, z: Tensor) -> Quantized:
        """z [B, L, C] or [B, h, w, C], any float dtype. Quantized.z has z's shape, float32."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._prepare(z)
            signs = self._codes(z.detach() > 0)
            loss = {"commitment": self.beta * F.mse_loss(z, signs)}
            ids = self._ids(z.detach() > 0).flatten(1)
            stats = code_statistics(ids, self.vocab_size, everywhere=self.training)
            if self.entropy_weight:
                sample, batch = self.entropies(z)
                loss["entropy"] = self.entropy_weight * (self.sample_weight * sample - self.batch_weight * batch)
                stats |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
            codes = signs + (z - z.detach())
        return Quantized(codes, codes.flatten(1, -2), ids, loss, stats)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mean entropy of the soft assignments, entropy of their mean) of z [.., C], in nats; in training the mean is
        that of all processes.

        softmax(2 z c / temperature) is a product over the channels, with log odds 4 size z_i / temperature.
        """
        log_odds = 4 * self.size / self.temperature * z.flatten(0, -2)
        parts = log_odds.split(self.entropy_groups, dim=1)
        return bit_entropy(log_odds).mean(), sum(
            mean_entropy(shared_mean(mean_of_products(part), everywhere=self.training)) for part in parts
        )

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z."""
        with torch.autocast(z.device.type, enabled=False):
            return self._ids(self._prepare(z) > 0).flatten(1)

    def lookup(self, ids: Tensor) -> Tensor:
        return self._codes((ids.unsqueeze(-1) >> torch.arange(self.channels, device=ids.device)) & 1 > 0)

    def _prepare(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.channels:
            raise ValueError(f"z has {z.shape[-1]} channels, the quantizer bits={self.channels}")
        return full(z)

    def _codes(self, bits: Tensor) -> Tensor:
        return (2 * bits.float() - 1) * self.size

    def _ids(self, bits: Tensor) -> Tensor:
        return (bits.long() << torch.arange(self.channels, device=bits.device)).sum(-1)


class BSQ(LFQ):
    """LFQ on the unit sphere: z is normalised, and codes are +-1 / sqrt(C), so both have length 1."""

    @property
    def size(self) -> float:
        return self.channels**-0.5

    def _prepare(self, z: Tensor) -> Tensor:
        return F.normalize(super()._prepare(z), dim=-1)
