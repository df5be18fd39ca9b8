"""Cross-entropy of a linear head in pieces, for vocabularies whose logits of a whole batch would not fit.

Logits of B x L x V float32 numbers are the largest tensor of a training step: 17 GB for 64 images of 256 tokens over
262,144 codes, as much again for their gradient. A piece's logits are recomputed in the backward pass, so that only one
piece exists at a time. Where everything fits into one piece, nothing is recomputed and nothing changes.

The product with the head's weights is float32, but for training on CUDA under autocast to bfloat16: there h and the
weights are rounded, as every other layer's are, and the sums, the logits and the softmax stay float32 (`LightProduct`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtok.counters import count
from vtok.layers.linear import linear
from vtok.precision import summed_in_float32

MOST = 2**27  # logits of a piece: 512 MiB in float32


class LightProduct(torch.autograd.Function):
    """x weight^T, float32 [n, V], of x [n, D] and weight [V, D] rounded to bfloat16, but summed and kept in float32. In
    the backward pass the gradient of the logits is rounded too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        kept = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(*kept)
        ctx.dtypes = x.dtype, weight.dtype
        return summed_in_float32(kept[0], kept[1].T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        of_x, of_weight = summed_in_float32(gradient, weight), summed_in_float32(gradient.T, x)
        return of_x.to(ctx.dtypes[0]), of_weight.to(ctx.dtypes[1])


def light(h: Tensor) -> bool:
    """Whether the product with the head's weights takes bfloat16."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.bfloat16
    return h.is_cuda and torch.is_grad_enabled() and autocast


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
    rounded = light(h)
    count("head.bfloat16" if rounded else "head.float32")
    if len(pieces) == 1 or not torch.is_grad_enabled():
        found = [_piece(x, weight, bias, given, smoothing, rounded) for x, given in pieces]
    else:
        found = [
            checkpoint(_piece, x, weight, bias, given, smoothing, rounded, use_reentrant=False) for x, given in pieces
        ]
    return torch.cat(found).view(target.shape)


def _piece(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float, rounded: bool) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):  # logits in bf16 would lose small probabilities
        bias = None if bias is None else bias.float()
        if rounded:
            logits = LightProduct.apply(h, weight)
            logits = logits if bias is None else logits + bias
        else:
            logits = linear(h.float(), weight.float(), bias)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
