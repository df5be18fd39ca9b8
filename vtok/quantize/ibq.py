"""Index backpropagation: a codebook all of whose codes are trained at every step, which lets it be large and wide.

IBQ: Shi et al., arXiv 2412.02692, section 3.2. The straight-through estimate is taken of the one-hot assignment, not of
the code: z_q = (hard - sg p + p) E with p = softmax(z E^T), so p's gradient reaches every code. Codes are chosen by dot
product with unnormalised codes, which is NOT the nearest code. The tests compare with the equation written
out and with the original's recorded outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.precision import full
from vtok.quantize.entropy import mean_entropy
from vtok.quantize.statistics import code_statistics, shared_mean
from vtok.tokenizer import Quantized, Quantizer

# Logits held at once, in floats (128 MB): vectors are taken in parts, whose softmax the backward pass computes again.
BUDGET = 2**25


class IBQ(Quantizer):
    """Code with the largest dot product of a table [V, C] that starts at N(0, 1).

    beta: weight of the loss that moves the chosen code to the vector. entropy_weight: of sample_weight * (mean entropy
    of softmax(z E^T / temperature)) - batch_weight * (entropy of its mean); 0 leaves it out.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        channels: int,
        beta: float = 0.25,
        entropy_weight: float = 0.05,
        sample_weight: float = 1.0,
        batch_weight: float = 1.0,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or channels < 1 or temperature <= 0:
            raise ValueError(
                f"vocab_size, channels and temperature must be positive, got {vocab_size}, {channels}, {temperature}"
            )
        self.vocab_size, self.channels = vocab_size, channels
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        self.sample_weight, self.batch_weight = sample_weight, batch_weight
        self.codebook = nn.Parameter(torch.randn(vocab_size, channels))

    def forward(self, z: Tensor) -> Quantized:
        """z [B, L, C] or [B, h, w, C], any float dtype. Quantized.z has z's shape, float32.

        loss["quantization"] is the paper's double quantization loss: the commitment of z to z_q, whose gradient reaches
        all codes, and to the chosen code, plus beta times the chosen code's own.
        """
        with torch.autocast(z.device.type, enabled=False):
            z, table = self._prepare(z), full(self.codebook)
            flat = z.flatten(0, -2)
            parts = flat.split(self._rows())
            run = self._assign if len(parts) == 1 else self._assign_again
            found = [run(part, table) for part in parts]
            ids = torch.cat([part[0] for part in found])
            chosen = F.embedding(ids, table)
            soft = torch.cat([part[1] for part in found])
            quantized = chosen + (soft - soft.detach())  # bitwise the chosen codes, with the gradient of both
            loss = (quantized - flat).square().mean() + (chosen.detach() - flat).square().mean()
            losses = {"quantization": loss + self.beta * (chosen - flat.detach()).square().mean()}
            out = quantized.view_as(z)
        ids = ids.view(len(z), -1)
        stats = code_statistics(ids, self.vocab_size, everywhere=self.training)
        if self.entropy_weight:
            sample = sum(part[2] for part in found) / len(flat)
            mean = sum(part[3] for part in found) / len(flat)
            batch = mean_entropy(shared_mean(mean, everywhere=self.training))
            losses["entropy"] = self.entropy_weight * (self.sample_weight * sample - self.batch_weight * batch)
            stats |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return Quantized(out, out.flatten(1, -2), ids, losses, stats)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Ids int64 [B, L] of z."""
        with torch.autocast(z.device.type, enabled=False):
            flat, table = self._prepare(z).flatten(0, -2), full(self.codebook)
            return torch.cat([(part @ table.T).argmax(1) for part in flat.split(self._rows())]).view(len(z), -1)

    def lookup(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return F.embedding(ids, full(self.codebook))

    def _assign(self, part: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids [n], p E [n, C] with the gradient of p alone, and the part's sums of entropies and of shares [V]."""
        logits = part @ table.T
        soft = logits.softmax(-1) @ table.detach()
        if not self.entropy_weight:
            return logits.argmax(1), soft, part.new_zeros(()), part.new_zeros(())
        log_shares = F.log_softmax(logits / self.temperature, dim=-1)
        shares = log_shares.exp()
        return logits.argmax(1), soft, -(shares * log_shares).sum(), shares.sum(0)

    def _assign_again(self, part: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return checkpoint(self._assign, part, table, use_reentrant=False)

    def _rows(self) -> int:
        return max(1, BUDGET // self.vocab_size)

    def _prepare(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.channels:
            raise ValueError(f"z has {z.shape[-1]} channels, the quantizer channels={self.channels}")
        return full(z)
