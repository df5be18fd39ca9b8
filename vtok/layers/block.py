"""The transformer block: pre-norm attention and feed-forward, optionally modulated by a condition vector.

Modulation is adaptive layer norm with gates (adaLN, Peebles & Xie, arXiv 2212.09748) in VAR's slot order: gate of
attention, gate of feed-forward, scale 1, scale 2, shift 1, shift 2. Converters of other orders permute rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vtok.counters import count
from vtok.layers.attention import Attention, Mask, QKNorm
from vtok.layers.cache import KVCache
from vtok.layers.dropout import Dropout, dropout
from vtok.layers.linear import Linear

Norm = Literal["rms", "layer", "layer_plain"]
Activation = Literal["swiglu", "geglu", "silu", "gelu", "gelu_tanh"]
Modulation = Literal["none", "own", "shared"]


def make_norm(kind: Norm, dim: int, eps: float, affine: bool = True) -> nn.Module:
    """RMSNorm or LayerNorm over the last dimension; statistics are float32 inside either. layer_plain: never affine."""
    if kind == "rms":
        return nn.RMSNorm(dim, eps=eps, elementwise_affine=affine)
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)
    if kind == "layer_plain":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
    raise ValueError(f"norm={kind!r}: choose rms, layer or layer_plain")


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202), down(silu(gate) * value) with one fused projection; GEGLU, whose gate is
    a gelu; or a plain activation. dropout: on the hidden values."""

    def __init__(self, *, dim: int, hidden: int, kind: Activation, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if kind not in ("swiglu", "geglu", "silu", "gelu", "gelu_tanh"):
            raise ValueError(f"ffn={kind!r}: choose swiglu, geglu, silu, gelu or gelu_tanh")
        self.kind, self.gated, self.dropout = kind, kind in ("swiglu", "geglu"), dropout
        self.up = Linear(dim, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
                x = Gated.apply(x, self.kind)
            else:
                gate, value = x.chunk(2, dim=-1)
                x = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * value
        elif self.kind == "silu":
            x = F.silu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(dropout(x, self.dropout, self.training))


def scale_and_add(base: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """base + x * scale [R, l, D]; x is [R, l, D], the others may have v rows that stand for l / v positions each."""
    length, rows = x.shape[1], scale.shape[1]
    if not 1 < rows < length:
        return torch.addcmul(base, x, scale)
    base, x, scale = (t.unflatten(1, (rows, -1)) for t in (base, x, scale))  # nothing is repeated in memory
    return torch.addcmul(base, x, scale).flatten(1, 2)


class Gated(torch.autograd.Function):
    """silu(gate) * value, or gelu(gate) * value, of both side by side [.., 2 H], with the gradients of both written
    where they belong: PyTorch's own makes two tensors and puts them together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Activation) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        opened = F.silu(gate) if kind == "swiglu" else F.gelu(gate)
        ctx.save_for_backward(x, opened)
        ctx.kind = kind
        return opened * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, opened = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        made = torch.empty_like(x)
        of_gate, of_value = made.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_value)
        change = torch.ops.aten.silu_backward if ctx.kind == "swiglu" else torch.ops.aten.gelu_backward
        change(gradient * value, gate, grad_input=of_gate)
        return made, None


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drops a residual branch per row, rescaling what is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1 - self.rate))


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); see Trunk for the options."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        norm: Norm,
        eps: float,
        ffn: Activation,
        bias: Literal["none", "qkv", "qv"],
        qk_norm: QKNorm,
        attention_scale: float | None,
        modulation: Modulation,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        ffn_bias: bool | None = None,
        layer_scale: float | None = None,
        affine: bool = False,
        ffn_dropout: float = 0.0,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        plain = modulation == "none" or affine
        biased = bias != "none"
        self.norm1, self.norm2 = make_norm(norm, dim, eps, plain), make_norm(norm, dim, eps, plain)
        self.attention = Attention(
            dim=dim,
            heads=heads,
            bias=bias,
            out_bias=biased if out_bias is None else out_bias,
            qk_norm=qk_norm,
            eps=eps,
            scale=attention_scale,
            dropout=attention_dropout,
        )
        self.ffn = FeedForward(
            dim=dim,
            hidden=hidden,
            kind=ffn,
            bias=biased if ffn_bias is None else ffn_bias,
            dropout=ffn_dropout,
        )
        scaled = layer_scale is not None
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        self.modulation = Linear(dim, 6 * dim) if modulation == "own" else None
        self.offset = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5) if modulation == "shared" else None
        self.dropout, self.drop_path = Dropout(dropout), DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        *,
        vector: Tensor | None,
        position: tuple[Tensor, Tensor, Tensor | None] | None,
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        each: Tensor | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x [R, l, D]; vector: SiLU of the condition [R, v, D], or its projection [R, v, 6, D], shared or of
        `slots`; v divides l, and each of its rows modulates l / v positions in turn.

        each: int64 [l], the row of `vector` that modulates each position, where they are otherwise.
        between: what happens to x after the attention, of a block without `vector`.
        """
        if not torch.compiler.is_compiling() and self._compiled_call_impl is not None:
            count("block.plain")  # dynamo gave up, without a word
        if vector is None:
            attended = self.attention(self.norm1(x), position=position, mask=mask, cache=cache, layer=layer)
            changed = self.dropout(attended)
            x = x + self.drop_path(changed if self.scale1 is None else changed * self.scale1)
            x = x if between is None else between(x)
            changed = self.dropout(self.ffn(self.norm2(x)))
            return x + self.drop_path(changed if self.scale2 is None else changed * self.scale2)
        slots = vector if self.offset is None else vector + self.offset
        if slots.dim() == 3:
            slots = self.slots(slots)
        if each is not None:
            slots = slots[:, each]
        gate1, gate2, scale1, scale2, shift1, shift2 = slots.unbind(-2)
        h = scale_and_add(shift1, self.norm1(x), 1 + scale1)
        attended = self.attention(h, position=position, mask=mask, cache=cache, layer=layer)
        x = scale_and_add(x, self.dropout(attended), self.drop_path(gate1))
        h = scale_and_add(shift2, self.norm2(x), 1 + scale2)
        return scale_and_add(x, self.dropout(self.ffn(h)), self.drop_path(gate2))

    def slots(self, vector: Tensor) -> Tensor:
        """Gates, scales and shifts [R, v, 6, D] of a block with a projection of its own, of SiLU of the condition."""
        return self.modulation(vector).unflatten(-1, (6, -1))
