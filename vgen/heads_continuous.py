"""What heads for continuous tokens share: the residual MLP over one token, and losses on keyed times and noise.

The network is MAR's (Li et al., "Autoregressive image generation without vector quantization", arXiv 2406.11838): every
token on its own, a few residual blocks modulated by its hidden state plus a time embedding (adaLN, arXiv 2212.09748).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.gaussian import velocity_network
from vtok.acceleration import linear_parameters
from vtok.layers.linear import Linear
from vtok.layers.time import TimeEmbedding
from vtok.noise import SampleNoise

Network = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSS_STREAM = 7200  # of the times and noises in training: one stream a repeat for the times, one for the noise


class ResidualBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), with shift, scale, gate = linear(vector)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up, self.down = Linear(dim, dim), Linear(dim, dim)
        self.modulation = Linear(dim, 3 * dim)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vector).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.down(F.silu(self.up(h))))


class TokenMLP(nn.Module):
    """[.., outputs] of noisy tokens x [.., C], times t [..] in [0, 1], hidden states h [.., D]; zero at the start."""

    def __init__(self, *, dim: int, channels: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(dim=width)
        self.condition = nn.Linear(dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, outputs)
        self.reset()

    def reset(self) -> None:
        """MAR's start: Xavier, and zero for every modulation and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time.up, self.time.down):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.output):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return self.predict(x, t, self.condition(h))

    def at(self, x: Tensor, time: float, condition: Tensor) -> Tensor:
        """The same at one time for all tokens, of condition(h): a solver computes it once for all of its steps."""
        return self.predict(x, x.new_full((1,) * (x.dim() - 1), time), condition)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        vector = F.silu(self.time(t) + condition)
        x = self.input(x)
        for block in self.blocks:
            x = block(x, vector)
        shift, scale = self.modulation(vector).chunk(2, dim=-1)
        return self.output(torch.addcmul(shift, self.norm(x), 1 + scale))


class ContinuousHead(nn.Module):
    """A head whose loss compares a noised token with what made it. A family writes `denoising_loss`, `times`, `draw`.

    repeats: draws of (time, noise) a token and training step; the hidden state is computed once (MAR: 4).
    """

    operations_formula = "6 parameters of the head x tokens x repeats (of its layer that takes the state in: once)"

    def __init__(self, *, channels: int, repeats: int) -> None:
        super().__init__()
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: a token is noised at least once")
        self.channels, self.repeats = channels, repeats

    def times(self, uniform: Tensor) -> Tensor:
        """Training times of uniform numbers in (0, 1]."""
        raise NotImplementedError

    def denoising_loss(
        self, h: Tensor, target: Tensor, t: Tensor, noise: Tensor, network: Network | None = None
    ) -> Tensor:
        """Loss float32 [..] of targets [.., C] noised to times t [..] by `noise` [.., C], given h [.., D]; targets and
        h may be broadcast."""
        raise NotImplementedError

    def operations(self, tokens: Tensor | float) -> Tensor | float:
        """Operations of a training step of that many tokens (vtok/acceleration.py): each passes the network `repeats`
        times, its hidden state the layer that takes it in once."""
        again = linear_parameters(self) - self.mlp.condition.weight.numel()
        return 6.0 * (linear_parameters(self) + (self.repeats - 1) * again) * tokens

    def gaussian(self) -> Network:
        """What predicts best where h is [mean, variance] of a Gaussian, in the network's place."""
        return velocity_network

    def loss(
        self,
        h: Tensor,
        target: Tensor,
        sizes: Sequence[int],
        *,
        noise: SampleNoise,
        position: Tensor | None = None,
        network: Network | None = None,
    ) -> Tensor:
        """float32 [B, n], the mean over `repeats`, of h [B, n, D] and latents [B, n, C].

        noise: of the samples' keys; position int64 [n] or [B, n]: what tells tokens apart (their cells; 0 .. n - 1).
        network: of (noisy tokens, times, h), in the place of the head's own.
        """
        index = torch.arange(h.shape[1], device=h.device) if position is None else position
        streams = [LOSS_STREAM + 2 * repeat for repeat in range(self.repeats)]
        with torch.autocast(h.device.type, enabled=False):  # float32: errors of a few percent decide what is learnt
            t = self.times(torch.stack([noise.uniform(index, stream) for stream in streams]))
            e = torch.stack([noise.normal(index, self.channels, stream + 1) for stream in streams])
            # all repeats in one pass: products of more rows, of one projection of the hidden states
            return self.denoising_loss(h.float().unsqueeze(0), target.float().unsqueeze(0), t, e, network).mean(0)

    def log_prob(self, h: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no likelihood in closed form; compare its loss instead")
