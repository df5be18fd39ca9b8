"""LARP's autoregressive prior: a small causal transformer that predicts a tokenizer's codes, trained along with it.

Wang et al., arXiv 2410.21264, section 3.3. It reads the codes, predicts a vector for the next one, and the logits are
its cosines with the codebook, which gets no gradient; the encoder gets one through the codes that are read. A second
round reads a mixture of codes and of the prior's own draws (scheduled sampling, Bengio et al., arXiv 1506.03099); their
share rises to `mix` in the first `mix_until` of training. Both rounds count alike. What differs: it works with every
discrete quantizer that passes gradients to its codes, and the draws belong to the sample, not to the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.dropout import Dropout
from vtok.layers.trunk import Inputs, Trunk
from vtok.noise import SampleNoise, noise_of
from vtok.tokenizer import Quantized, Quantizer, Reconstruction, Tokenizer

MIXED, DRAWN = 410, 411  # streams of the sample's noise: which codes are replaced, and by which


class ARPrior(nn.Module):
    """A term of the objective: {"prior": weight * mean cross-entropy of codes 1..L-1}, about log V at the start.

    channels: of a code; length: tokens of an image, at most. width, depth, heads, dropout: of the transformer
    (published "GPTC-S": 21.7 M). temperature: of the cosines. rounds: 1 leaves scheduled sampling out. lr_scale: its
    learning rate is this multiple of the tokenizer's. part: which of several vocabularies it predicts.
    """

    needs_codes = True

    def __init__(
        self,
        *,
        channels: int,
        length: int,
        weight: float = 0.06,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        dropout: float = 0.1,
        temperature: float = 1.0,
        rounds: int = 2,
        mix: float = 0.5,
        mix_until: float = 0.3,
        lr_scale: float = 50.0,
        part: int | None = None,
    ) -> None:
        super().__init__()
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: the prior has at least one")
        if not 0 <= mix <= 1 or not 0 < mix_until <= 1:
            raise ValueError(f"mix={mix} is a share in [0, 1], mix_until={mix_until} one in (0, 1]")
        if temperature <= 0 or lr_scale <= 0:
            raise ValueError(f"temperature={temperature} and lr_scale={lr_scale} must be positive")
        self.channels, self.length, self.weight, self.temperature = channels, length, weight, temperature
        self.part = part
        self.rounds, self.mix, self.mix_until, self.lr_scale = rounds, mix, mix_until, lr_scale
        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, channels)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.dropout = Dropout(dropout)
        self.trunk = Trunk(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=4 * width,
            norm="layer",
            ffn="gelu",
            bias="qkv",
            dropout=dropout,
            attention_dropout=dropout,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        recon: Reconstruction,
        images: Tensor,
        *,
        step: int,
        progress: float,
        key: Tensor | None,
        tokenizer: Tokenizer,
    ) -> dict[str, Tensor]:
        ids, codes, quantizer = self._chosen(recon, tokenizer)
        table = codebook(quantizer)
        share = self.mix * min(1.0, progress / self.mix_until)
        noise = noise_of(key, ids) if self.rounds > 1 and share > 0 else None
        read, losses = codes.float(), []
        for index in range(self.rounds):
            logits = self.logits(read[:, :-1], table)
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
            if noise is not None and index < self.rounds - 1:
                read = self._mixed(codes.float(), logits.detach(), table, share, noise, 2 * index)
        return {"prior": self.weight * torch.stack(losses).mean()}

    def logits(self, codes: Tensor, table: Tensor) -> Tensor:
        """Logits float32 [B, l, V] of the code after each of codes [B, l, C], given the table [V, C]."""
        x = self.dropout(self.embed(codes) + self.position[:, : codes.shape[1]])
        h = self.trunk(Inputs(x, torch.arange(x.shape[1], device=x.device), "causal"))
        with torch.autocast(h.device.type, enabled=False):  # cosines over a large vocabulary: not in half precision
            wanted = F.normalize(self.head(h.float()).float(), dim=-1)
            return wanted @ F.normalize(table, dim=-1).T / self.temperature

    def _mixed(
        self, codes: Tensor, logits: Tensor, table: Tensor, share: float, noise: SampleNoise, stream: int
    ) -> Tensor:
        """codes with a share of those after the first replaced by draws from the logits."""
        at = torch.arange(logits.shape[1], device=codes.device)
        replaced = noise.uniform(at, MIXED + stream) <= share
        levels = logits.softmax(-1).cumsum(-1)
        u = noise.uniform(at, DRAWN + stream) * levels[..., -1]
        ids = torch.searchsorted(levels, u[..., None]).squeeze(-1).clamp(max=len(table) - 1)
        later = torch.where(replaced[..., None], F.embedding(ids, table), codes[:, 1:])
        return torch.cat([codes[:, :1], later], 1)

    def _chosen(self, recon: Reconstruction, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Quantizer]:
        """Ids [B, l], codes [B, l, C] and the quantizer of the tokens that the prior predicts."""
        ids, codes, quantizer, parts = recon.tokens, recon.features["codes"], tokenizer.quantizer, tokenizer.spec.parts
        if not tokenizer.spec.discrete:
            raise ValueError("the prior predicts discrete tokens; leave it out of objective.terms for continuous ones")
        if (len(parts) > 1) != (self.part is not None) or (self.part or 0) not in range(len(parts)):
            raise ValueError(
                f"part={self.part}: the tokens have {len(parts)} vocabularies; name one, null if it is one"
            )
        if self.part is not None:
            start = sum(part.count for part in parts[: self.part])
            stop = start + parts[self.part].count
            quantizer = quantizer.parts[self.part]
            ids, codes = ids[:, start:stop], codes[:, start:stop, : quantizer.channels]
        if codes.shape[-1] != self.channels or ids.shape[1] > self.length:
            raise ValueError(
                f"the tokens of an image are {ids.shape[1]} codes of {codes.shape[-1]} channels, the prior is built "
                f"for length={self.length} and channels={self.channels}: change them in objective.terms"
            )
        return ids, codes, quantizer


@torch.no_grad()
def codebook(quantizer: Quantizer) -> Tensor:
    """All codes of a quantizer, float32 [V, C], without gradients."""
    device = next((t.device for t in (*quantizer.parameters(), *quantizer.buffers())), torch.device("cpu"))
    return quantizer.lookup(torch.arange(quantizer.vocab_size, device=device)).float()


@contextmanager
def watch(quantizer: Quantizer) -> Iterator[list[Quantized]]:
    """What the quantizer returns inside the block, pass by pass, whatever its tokenizer makes of it."""
    passes: list[Quantized] = []
    handle = quantizer.register_forward_hook(lambda module, inputs, output: passes.append(output))
    try:
        yield passes
    finally:
        handle.remove()
