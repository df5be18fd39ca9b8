"""The best Gaussian for each place, as a predictor: what a continuous generator must beat.

If the data of a place are N(mean, variance), independent of everything else, the velocity or the noise that minimises a
family's loss is linear in what the network is shown, in closed form. A loss with this predictor in the network's place,
at the same times and noises, is the counterpart of the histogram of codes (eval/likelihood.py): it knows how latents
are spread at each place, and neither neighbours nor classes.

x = (1 - u) end + u start and v = start - end give E[v | x] = E[v] + Cov(v, x) / Var(x) (x - E[x]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.flow import spread


@dataclass(frozen=True)
class Moments:
    """Of both ends of the paths of every place, each [L, C]; start None: standard normal noise, independent of the
    data at the other end."""

    mean: Tensor
    variance: Tensor
    start_mean: Tensor | None = None
    start_variance: Tensor | None = None
    covariance: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, starts: Tensor | None = None) -> Moments:
        """Moments over the samples of values [N, L, C], and of where their paths start."""
        if len(values) < 2:
            raise ValueError(f"train_images={len(values)}: a variance needs at least two")
        wide = values.double()
        mean, variance = wide.mean(0), wide.var(0, correction=0)
        if starts is None:
            return cls(mean.float(), variance.float())
        begin = starts.double()
        covariance = ((wide - mean) * (begin - begin.mean(0))).mean(0)
        found = (mean, variance, begin.mean(0), begin.var(0, correction=0), covariance)
        return cls(*(part.float() for part in found))

    def velocity(self, x: Tensor, u: Tensor) -> Tensor:
        """E[start - end | x] of x [B, L, C] at shares u [B, L] of the path."""
        zero = torch.zeros_like(self.mean)
        started = self.start_mean is not None
        begin, wide, both = (
            (self.start_mean, self.start_variance, self.covariance) if started else (zero, zero + 1, zero)
        )
        return path_velocity(x, spread(u, x), self.mean, self.variance, begin, wide, both)

    def hidden(self, like: Tensor) -> Tensor:
        """Mean and variance side by side, [B, L, 2 C]: the state that `velocity_network` and `noise_network` read."""
        return torch.cat([self.mean, self.variance], dim=-1).expand(len(like), -1, -1)


def path_velocity(
    x: Tensor, u: Tensor, mean: Tensor, variance: Tensor, begin: Tensor, wide: Tensor, both: Tensor
) -> Tensor:
    """E[v | x] from the moments of the end (mean, variance), the start (begin, wide) and their covariance `both`."""
    covariance = u * wide - (1 - u) * variance + (1 - 2 * u) * both
    total = (1 - u) ** 2 * variance + u**2 * wide + 2 * u * (1 - u) * both
    slope = covariance / total.clamp(min=1e-12)
    return begin - mean + slope * (x - (1 - u) * mean - u * begin)


def velocity_network(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """In the place of a flow head's network: x [.., C] at times t, data N(mean, variance) with h = [mean, variance]."""
    mean, variance = h.chunk(2, dim=-1)
    zero = torch.zeros_like(mean)
    return path_velocity(x, spread(t, x), mean, variance, zero, zero + 1, zero)


def noise_network(tables: Tensor, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """In the place of a diffusion head's network (vgen/heads_diffusion.py): [eps, fraction] of x at times t in [0, 1).

    tables: the six of the chain, [6, T]. The variance is that which minimises the expected bound: the posterior's own
    and that of the mean's error (at the last step the error's alone).
    """
    mean, variance = h.chunk(2, dim=-1)
    step = (t * tables.shape[1]).round().long()
    signal, noise, mean_data, _, low, high = tables[:, step].unsqueeze(-1)
    total = signal**2 * variance + noise**2
    eps = noise / total * (x - signal * mean)
    error = mean_data**2 * variance * noise**2 / total
    best = torch.where(step.unsqueeze(-1) == 0, error, low.exp() + error).clamp(min=math.exp(-30)).log()
    return torch.cat([eps, (2 * best - high - low) / (high - low).clamp(min=1e-6)], dim=-1)


def posterior(mean: Tensor, variance: Tensor, seen: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """(mean, variance) of data N(mean, variance) given `seen` = share * data + (1 - share) * noise."""
    total = share**2 * variance + (1 - share) ** 2
    gain = share * variance / total
    return mean + gain * (seen - share * mean), (variance * (1 - share) ** 2 / total).expand_as(seen)
