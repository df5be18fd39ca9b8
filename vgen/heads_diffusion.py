"""Token diffusion head: each continuous token is drawn by a small diffusion model given its hidden state (MAR).

Li et al., "Autoregressive image generation without vector quantization", arXiv 2406.11838: eps prediction on the cosine
schedule of 1,000 steps with a learned variance between the two bounds (Nichol & Dhariwal, "Improved denoising
diffusion probabilistic models", arXiv 2102.09672, eq. 15 to 17), of which a few are walked when sampling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vgen.gaussian import noise_network
from vgen.guidance import Guidance, Progress
from vgen.heads import DrawRule
from vgen.heads_continuous import ContinuousHead, Network, TokenMLP
from vtok.noise import SampleNoise

STEPS = 1000


class Chain(NamedTuple):
    """Tables of a chain of T noisings, float64 [T]: x_t = signal x_0 + spread e, and q(x_(t-1) | x_t, x_0)."""

    signal: Tensor
    spread: Tensor
    mean_data: Tensor  # mean of the posterior = mean_data x_0 + mean_noisy x_t
    mean_noisy: Tensor
    low: Tensor  # log of the posterior's variance
    high: Tensor  # log of the step's variance beta


@functools.lru_cache(maxsize=16)
def chain(kept: tuple[int, ...] | None = None) -> Chain:
    """The cosine schedule, or its marginals at the steps `kept` (ascending) joined by coarser noisings."""
    alpha = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
    beta = [min(1 - alpha[i + 1] / alpha[i], 0.999) for i in range(STEPS)]
    beta = torch.tensor(beta, dtype=torch.float64, device="cpu")
    total = (1 - beta).cumprod(0)
    if kept is not None:
        total = total[list(kept)]
    before = torch.cat([total.new_ones(1), total[:-1]])
    beta = 1 - total / before
    variance = beta * (1 - before) / (1 - total)
    floor = variance[1:2] if len(variance) > 1 else beta[:1]  # the first posterior has variance 0
    return Chain(
        total.sqrt(),
        (1 - total).sqrt(),
        beta * before.sqrt() / (1 - total),
        (1 - before) * (1 - beta).sqrt() / (1 - total),
        torch.cat([floor, variance[1:]]).log(),
        beta.log(),
    )


def spaced(steps: int) -> list[int]:
    """`steps` of the thousand, evenly spaced and both ends included."""
    if not 1 <= steps <= STEPS:
        raise ValueError(f"solver_steps={steps}: choose 1 .. {STEPS} diffusion steps")
    stride = (STEPS - 1) / (steps - 1) if steps > 1 else 1.0
    at, kept = 0.0, []
    for _ in range(steps):
        kept.append(round(at))
        at += stride
    return kept


class DiffusionHead(ContinuousHead):
    """depth x width of the MLP: B 6 x 1024, L 8 x 1280, H 12 x 1536. solver_steps: diffusion steps when sampling.

    clip: bound on the latents that a sampling step may point to, None as published. The first steps magnify errors of
    eps by hundreds (their signal is 1e-4 or less), which a network that was trained for long corrects and another not.
    """

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        width: int = 1024,
        depth: int = 6,
        solver_steps: int = 100,
        repeats: int = 4,
        clip: float | None = None,
    ) -> None:
        super().__init__(channels=channels, repeats=repeats)
        spaced(solver_steps)
        self.solver_steps, self.clip, self.measuring = solver_steps, clip, False
        self.register_buffer("tables", torch.stack(chain()).float(), persistent=False)
        self.mlp = TokenMLP(dim=dim, channels=channels, outputs=2 * channels, width=width, depth=depth)

    def kept(self, rule: DrawRule) -> list[int]:
        """The steps that a rule asks to walk. Raises ValueError where there are none."""
        rule.require_continuous()
        if rule.solver is not None:
            raise ValueError(f"solver={rule.solver}: a diffusion head walks its chain; leave solver away")
        return spaced(self.solver_steps if rule.solver_steps is None else rule.solver_steps)

    def check_rule(self, rule: DrawRule) -> None:
        self.kept(rule)

    def times(self, uniform: Tensor) -> Tensor:
        return (uniform * STEPS).long().clamp(max=STEPS - 1)

    def gaussian(self) -> Network:
        return functools.partial(noise_network, self.tables)

    @contextmanager
    def in_nats(self) -> Iterator[None]:
        """Inside, the loss is the variational bound on -log p of a token's latents in bins of 2 / 255, in nats, of all
        steps as `draw` walks them, clip included; the distance of the last noise from a normal one, about 0, is left
        out. Each token and draw of a time is an unbiased estimate."""
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False

    def denoising_loss(
        self, h: Tensor, target: Tensor, t: Tensor, noise: Tensor, network: Network | None = None
    ) -> Tensor:
        """Squared error of eps plus the variational bound in bits, which trains the variance alone; t int64 [..].
        `in_nats`: the bound alone."""
        signal, spread, mean_data, mean_noisy, low, high = self.tables[:, t].unsqueeze(-1)
        noisy = signal * target + spread * noise
        eps, fraction = (network or self.mlp)(noisy, t / STEPS, h).float().chunk(2, dim=-1)
        log_variance = _between(fraction, low, high)
        data = (noisy - spread * eps.detach()) / signal
        if self.measuring and self.clip is not None and network is None:
            data = data.clamp(-self.clip, self.clip)
        gap = mean_data * (target - data)  # between the true and the predicted posterior mean
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap**2 * (-log_variance).exp())
        mean = mean_data * data + mean_noisy * noisy
        bound = torch.where(t.unsqueeze(-1) == 0, -_binned_log_prob(target, mean, 0.5 * log_variance), kl)
        if self.measuring:
            return STEPS * bound.sum(-1)
        return ((noise - eps) ** 2).mean(-1) + bound.mean(-1) / math.log(2)

    def draw(
        self,
        h: Tensor,
        sizes: tuple[int, ...],
        *,
        guide: Guidance,
        noise: SampleNoise,
        position: Tensor,
        rule: DrawRule,
        progress: Progress,
    ) -> Tensor:
        """Tokens float32 [B, n, C] from h [S * B, n, D]. Guidance is on eps; the variance is the first stream's.

        rule.temperature multiplies the noise that a step injects; noise stream 0 is the start, 1 + i that of step i.
        """
        kept = self.kept(rule)
        rows = torch.stack(chain(tuple(kept))).tolist()
        with torch.autocast(h.device.type, enabled=False):
            condition, x = self.mlp.condition(h.float()), noise.normal(position, self.channels, 0)
            for i, t in enumerate(reversed(range(len(kept)))):
                signal, spread, mean_data, mean_noisy, low, high = (table[t] for table in rows)
                time = kept[t] / STEPS
                both = x.repeat(guide.streams, 1, 1)
                out = self.mlp.at(both, time, condition)
                eps, fraction = out.unflatten(0, (guide.streams, -1)).chunk(2, dim=-1)
                data = (x - spread * guide(eps, replace(progress, time=time))) / signal
                if self.clip is not None:
                    data = data.clamp(-self.clip, self.clip)
                x = mean_data * data + mean_noisy * x
                if t > 0:
                    spread_out = (0.5 * _between(fraction[0], low, high)).exp() * rule.temperature
                    x = x + spread_out * noise.normal(position, self.channels, 1 + i)
        return x


def _between(fraction: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Log-variance at a fraction in about [-1, 1] of the way from `low` to `high`."""
    return (fraction + 1) / 2 * high + (1 - fraction) / 2 * low


def _binned_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass of x's bin of width 2 / 255 under a Gaussian (the last step of the bound), with a tanh cdf."""

    def cdf(edge: Tensor) -> Tensor:
        z = (x - mean + edge) * (-log_scale).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above, below = cdf(1 / 255), cdf(-1 / 255)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
