"""Cross-entropy of a linear head in pieces, for vocabularies whose logits of a whole batch would not fit.

Logits of B x L x V float32 numbers are the largest tensor of a training step: 17 GB for 64 images of 256 tokens over
262,144 codes, as much again for their gradient. A piece's logits are recomputed in the backward pass, so that only one
piece exists at a time. Where everything fits into one piece, nothing is recomputed and nothing changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtok.counters import count

MOST = 2**27  # logits of a piece: 512 MiB in float32


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, most: int = MOST) -> Tensor:
    """-log softmax(h weight^T + bias)[target], float32 [n], of h [n, D], weight [V, D] and ids int64 [n]."""
    rows = max(1, most // len(weight))
    pieces = [(h[i : i + rows], target[i : i + rows]) for i in range(0, len(h), rows)]
    count("loss.whole" if len(pieces) == 1 else "loss.pieces")
    if len(pieces) == 1 or not torch.is_grad_enabled():
        return torch.cat([_piece(x, weight, bias, ids) for x, ids in pieces])
    return torch.cat([checkpoint(_piece, x, weight, bias, ids, use_reentrant=False) for x, ids in pieces])


def _piece(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):  # float32: bf16 loses small probabilities
        bias = None if bias is None else bias.float()
        return F.cross_entropy(F.linear(h.float(), weight.float(), bias), target, reduction="none")
