"""Vector quantisation with a learned codebook: each vector becomes its nearest code.

VQ-VAE (van den Oord et al., arXiv 1711.00937) and, with `l2_norm`, the low-dimensional cosine codebook of ViT-VQGAN
(Yu et al., arXiv 2110.04627) as LlamaGen (arXiv 2406.06525) trains it.
Everything runs in float32: the nearest code is decided by small differences of large numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.quantize.codebook import Codebook, nearest
from vtok.quantize.statistics import code_statistics
from vtok.tokenizer import Quantized, Quantizer


class VQ(Quantizer):
    """Nearest code of a learned table.

    vocab_size V, channels C. l2_norm: compare and emit unit vectors. beta: weight of the commitment loss.
    entropy_weight, entropy_temperature: adds weight * (entropy of a vector's soft assignment - entropy of the mean
    assignment); 0 leaves it out (it holds N x V probabilities). ema_decay, restart: see Codebook.
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
    ) -> None:
        super().__init__()
        self.vocab_size, self.channels = vocab_size, channels
        self.l2_norm, self.beta = l2_norm, beta
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.codebook = Codebook(
            vocab_size=vocab_size, channels=channels, l2_norm=l2_norm, ema_decay=ema_decay, restart=restart
        )

    def forward(self, z: Tensor) -> Quantized:
        """z [B, L, C] or [B, h, w, C], any float dtype. Quantized.z has z's shape, float32."""
        with torch.autocast(z.device.type, enabled=False):
            z, table = self._prepare(z), self.codebook.table()
            flat = z.flatten(0, -2)
            ids = nearest(flat.detach(), table.detach())
            codes = F.embedding(ids, table).view_as(z)
            loss = {"commitment": self.beta * (codes.detach() - z).square().mean()}
            if self.codebook.ema_decay is None:
                loss["codebook"] = (codes - z.detach()).square().mean()
            if self.entropy_weight:
                loss["entropy"] = self.entropy_weight * entropy_loss(flat, table, self.entropy_temperature)
            if self.training:
                self.codebook.update(flat.detach(), ids)
            out = codes.detach() + (z - z.detach())
        ids = ids.view(len(z), -1)
        stats = code_statistics(ids, self.vocab_size, everywhere=self.training)
        return Quantized(out, out.flatten(1, -2), ids, loss, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z, without losses, statistics or updates."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._prepare(z)
            return nearest(z.flatten(0, -2), self.codebook.table()).view(len(z), -1)

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return F.embedding(ids, self.codebook.table())

    def _prepare(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.channels:
            raise ValueError(f"z has {z.shape[-1]} channels, the quantizer channels={self.channels}")
        return F.normalize(z.float(), dim=-1) if self.l2_norm else z.float()


def entropy_loss(vectors: Tensor, table: Tensor, temperature: float) -> Tensor:
    """Mean entropy of softmax(-distance^2 / temperature) minus the entropy of its mean (Yu et al., arXiv 2310.05737).

    vectors [N, C], table [V, C], both with gradients.
    """
    distances = vectors.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * vectors @ table.T
    log_shares = F.log_softmax(-distances / temperature, dim=-1)
    shares = log_shares.exp()
    mean = shares.mean(0)
    return -(shares * log_shares).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()
