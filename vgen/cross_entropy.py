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


def rows_of_a_piece(vocab_size: int) -> int:
    """Of how many tokens the logits exist at once; more are cut into pieces."""
    return max(1, MOST // vocab_size)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """-log softmax(h weight^T + bias)[target], float32 [..], of h [.., D], weight [V, D] and ids int64 [..].

    smoothing: the share of the target that is spread evenly over all V codes.
    """
    rows, flat, ids = rows_of_a_piece(len(weight)), h.flatten(0, -2), target.flatten()
    pieces = list(zip(flat.split(rows), ids.split(rows)))
    count("loss.whole" if len(pieces) == 1 else "loss.pieces")
    if len(pieces) == 1 or not torch.is_grad_enabled():
        found = [_piece(x, weight, bias, given, smoothing) for x, given in pieces]
    else:
        found = [checkpoint(_piece, x, weight, bias, given, smoothing, use_reentrant=False) for x, given in pieces]
    return torch.cat(found).view(target.shape)


def _piece(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):  # float32: bf16 loses small probabilities
        bias = None if bias is None else bias.float()
        logits = F.linear(h.float(), weight.float(), bias)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
