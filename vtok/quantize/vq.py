"""Vector quantisation with a learned codebook: each vector becomes its nearest code.

VQ-VAE (van den Oord et al., arXiv 1711.00937) and, with `l2_norm`, the low-dimensional cosine codebook of ViT-VQGAN
(Yu et al., arXiv 2110.04627) as LlamaGen (arXiv 2406.06525) trains it.
Everything runs in float32: the nearest code is decided by small differences of large numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.precision import full
from vtok.quantize.codebook import SEARCH_BUDGET, Codebook, nearest
from vtok.quantize.rotation import rotated
from vtok.quantize.statistics import all_mean, code_statistics, shared_mean
from vtok.tokenizer import Quantized, Quantizer


class VQ(Quantizer):
    """Nearest code of a learned table.

    vocab_size V, channels C. l2_norm: compare and emit unit vectors. beta: weight of the commitment loss;
    codebook_weight: of the loss that moves the codes.
    entropy_weight, entropy_temperature: adds weight * (entropy of a vector's soft assignment - entropy of the mean
    assignment); 0 leaves it out (it holds N x V probabilities). ema_decay, restart: see Codebook. rotation: gradients
    by the rotation trick instead of copied ones, see vtok.quantize.rotation. stochastic: temperature at which training
    draws a code by softmax(cosine / temperature), 0.03 in LARP (arXiv 2410.21264, section 3.2); None takes the nearest,
    as evaluation always does here.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        channels: int,
        l2_norm: bool = True,
        beta: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        ema_decay: float | None = None,
        restart: float = 0.0,
        codebook_weight: float = 1.0,
        rotation: bool = False,
        stochastic: float | None = None,
    ) -> None:
        super().__init__()
        if stochastic is not None and not (stochastic > 0 and l2_norm):
            raise ValueError(f"stochastic={stochastic} is a positive temperature of cosines: it needs l2_norm=true")
        self.stochastic = stochastic
        self.vocab_size, self.channels = vocab_size, channels
        self.l2_norm, self.beta, self.codebook_weight = l2_norm, beta, codebook_weight
        self.rotation = rotation
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.codebook = Codebook(
            vocab_size=vocab_size, channels=channels, l2_norm=l2_norm, ema_decay=ema_decay, restart=restart
        )

    def forward(self, z: Tensor, *, weight: Tensor | None = None) -> Quantized:
        """z [B, L, C] or [B, h, w, C], any float dtype. Quantized.z has z's shape, float32.

        weight: of every vector in the commitment and codebook losses, z's shape without C; None counts all alike.
        """
        with torch.autocast(z.device.type, enabled=False):
            z, table = self._prepare(z), self.codebook.table()
            flat = z.flatten(0, -2)
            if self.stochastic is not None and self.training:
                ids = drawn(flat.detach(), table.detach(), self.stochastic)
            else:
                ids = nearest(flat.detach(), table.detach())
            codes = F.embedding(ids, table).view_as(z)
            total = None if weight is None else weight.sum()
            if total is not None and self.training:
                total = all_mean(total)  # the weights of all processes count
            loss = {"commitment": self.beta * _mean((codes.detach() - z).square(), weight, total)}
            if self.codebook.ema_decay is None:
                loss["codebook"] = self.codebook_weight * _mean((codes - z.detach()).square(), weight, total)
            if self.entropy_weight:
                loss["entropy"] = self.entropy_weight * entropy_loss(
                    flat, table, self.entropy_temperature, everywhere=self.training
                )
            if self.training:
                self.codebook.update(flat.detach(), ids)
            out = rotated(z, codes) if self.rotation else codes.detach() + (z - z.detach())
        ids = ids.view(len(z), -1)
        stats = code_statistics(ids, self.vocab_size, everywhere=self.training)
        return Quantized(out, out.flatten(1, -2), ids, loss, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z, without losses, statistics or updates."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._prepare(z)
            return nearest(z.flatten(0, -2), self.codebook.table()).view(len(z), -1)

    @torch.no_grad()
    def near(self, z: Tensor, count: int) -> Tensor:
        """Ids int64 [.., count] of the codes nearest to z [.., C], the nearest first."""
        with torch.autocast(z.device.type, enabled=False):
            table = self.codebook.table()
            distances = 0.5 * table.square().sum(-1) - self._prepare(z) @ table.T  # |z|^2 moves no order
            return distances.topk(count, dim=-1, largest=False).indices

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return F.embedding(ids, self.codebook.table())

    def _prepare(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.channels:
            raise ValueError(f"z has {z.shape[-1]} channels, the quantizer channels={self.channels}")
        return F.normalize(full(z), dim=-1) if self.l2_norm else full(z)


def drawn(vectors: Tensor, table: Tensor, temperature: float) -> Tensor:
    """Ids int64 [N] drawn by softmax(vectors [N, C] . table [V, C] / temperature), from torch's generator."""
    rows = max(1, SEARCH_BUDGET // len(table))
    shares = ((part @ table.T / temperature).softmax(-1) for part in vectors.split(rows))
    return torch.cat([torch.multinomial(part, 1).squeeze(1) for part in shares])


def _mean(errors: Tensor, weight: Tensor | None, total: Tensor | None) -> Tensor:
    """Mean of errors [.., C], vectors weighted by weight [..], whose sum is `total`."""
    if weight is None or total is None:
        return errors.mean()
    return (errors.mean(-1) * weight).sum() / total.clamp(min=1)


def entropy_loss(vectors: Tensor, table: Tensor, temperature: float, *, everywhere: bool = False) -> Tensor:
    """Mean entropy of softmax(-distance^2 / temperature) minus the entropy of its mean (Yu et al., arXiv 2310.05737).

    vectors [N, C], table [V, C], both with gradients. everywhere: the mean is that of all processes.
    """
    distances = vectors.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * vectors @ table.T
    log_shares = F.log_softmax(-distances / temperature, dim=-1)
    shares = log_shares.exp()
    mean = shared_mean(shares.mean(0), everywhere=everywhere)
    return -(shares * log_shares).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()
