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
    table = torch.zeros(length, dtype=torch.float64)
    for count, weight in weights.items():
        table[count - 1] = weight
    return table / table.sum()


def keep_counts(distribution: Distribution, noise: SampleNoise, length: int, *, stream: int = 0) -> Tensor:
    """How many of `length` tokens each sample keeps, int64 [B], drawn from `distribution` by inversion."""
    table = keep_probabilities(distribution, length).to(noise.seeds.device)
    uniform = noise.uniform(torch.zeros(1, dtype=torch.int64, device=table.device), stream).double()
    below = (table.cumsum(0) < uniform).sum(1)
    # rounding may leave the last sum below 1: the largest count of the support, not `length`, is the last one
    return 1 + below.clamp(max=int(table.nonzero().max()))


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
