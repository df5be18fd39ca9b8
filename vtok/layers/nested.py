"""Nested dropout: keep only a random prefix of a sample's tokens, so that every prefix learns to stand alone.

Rippel, Gelbart and Adams, arXiv 1402.0915. Published distributions of the number of kept tokens: uniform; powers of two
(FlexTok, arXiv 2502.13967, also a uniform number rounded up to a power of two); a list of weights (ResTok). Draws are
keyed: the number of a sample does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vtok.noise import SampleNoise

Distribution = Literal["all", "uniform", "power_of_two", "uniform_power_of_two"] | Mapping[int, float]


def keep_probabilities(distribution: Distribution, length: int) -> Tensor:
    """float64 [length]: probability of keeping 1, 2, .., length tokens.

    "all": no dropout. "uniform": 1..length. "power_of_two": 1, 2, 4, .. and `length`, equally likely.
    "uniform_power_of_two": a uniform number, rounded up to the next of these. A mapping gives {count: weight}; weights
    need not sum to one. Raises ValueError for an unknown name and for counts or weights out of range.
    """
    weights = _weights(distribution, length)
    table = torch.zeros(length, dtype=torch.float64)
    for count, weight in weights.items():
        table[count - 1] = weight
    return table / table.sum()


def _weights(distribution: Distribution, length: int) -> dict[int, float]:
    """Number of kept tokens -> weight, not normalised."""
    powers = sorted({min(2**i, length) for i in range(length.bit_length() + 1)})
    if isinstance(distribution, Mapping) or hasattr(distribution, "items"):
        weights = {int(count): float(weight) for count, weight in distribution.items()}
        if not weights or min(weights) < 1 or max(weights) > length:
            raise ValueError(f"nested dropout keeps between 1 and {length} tokens, got counts {sorted(weights)}")
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"nested dropout needs weights >= 0, not all zero, got {weights}")
    elif distribution == "all":
        weights = {length: 1.0}
    elif distribution == "uniform":
        weights = dict.fromkeys(range(1, length + 1), 1.0)
    elif distribution == "power_of_two":
        weights = dict.fromkeys(powers, 1.0)
    elif distribution == "uniform_power_of_two":
        weights = {high: float(high - low) for low, high in zip([0, *powers], powers)}
    else:
        raise ValueError(
            f"nested={distribution!r}: choose all, uniform, power_of_two, uniform_power_of_two or {{count: weight}}"
        )
    return weights


def keep_sums(distribution: Distribution, length: int) -> Tensor:
    """float32 [length]: probability of keeping at most 1, 2, .., length tokens, for `keep_counts`. A buffer of the
    module that draws: a table made in every step would be copied to the device, which waits.

    Rounded down, so that a float32 number is above it where it is above the exact one. ValueError as in
    `keep_probabilities`.
    """
    exact = keep_probabilities(distribution, length).cumsum(0)
    sums = exact.float()
    sums = torch.where(sums.double() > exact, torch.nextafter(sums, torch.zeros_like(sums)), sums)
    # rounding may leave the last sum below 1: the largest count of the support, not `length`, is the last one
    last = max(count for count, weight in _weights(distribution, length).items() if weight > 0)
    sums[last - 1 :] = 2.0
    return sums


def keep_counts(sums: Tensor, noise: SampleNoise, *, stream: int = 0) -> Tensor:
    """How many tokens each sample keeps, int64 [B], by inversion of the distribution of `keep_sums`, on its device."""
    uniform = noise.uniform(torch.zeros(1, dtype=torch.int64, device=sums.device), stream)
    return 1 + (sums < uniform).sum(1)


def check_keep(keep: int | Tensor | None, tokens: int) -> int | Tensor | None:
    """`keep` itself; ValueError unless it lies between 1 and `tokens`."""
    if keep is not None:
        low, high = (int(keep.min()), int(keep.max())) if isinstance(keep, Tensor) else (keep, keep)
        if not 1 <= low <= high <= tokens:
            raise ValueError(f"keep={low}..{high} must lie between 1 and {tokens}")
    return keep


def kept(counts: int | Tensor, length: int, device: torch.device | None = None) -> Tensor:
    """bool [B, length] (or [1, length] for one number): which tokens are among the first `counts` ones."""
    counts = torch.as_tensor(counts, device=device).reshape(-1, 1)
    return torch.arange(length, device=counts.device) < counts


def replace_dropped(tokens: Tensor, counts: int | Tensor | None, fill: Tensor) -> Tensor:
    """tokens [B, L, C] with `fill` [C] (broadcast) in place of those that are not kept; all are kept where None."""
    if counts is None:
        return tokens
    seen = kept(counts, tokens.shape[1], tokens.device).unsqueeze(-1)
    return torch.where(seen, tokens, fill.to(tokens.dtype))
