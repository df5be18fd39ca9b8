"""One door to attention, and the attention layer of every trunk.

`attend` picks the kernel: SDPA everywhere; FlexAttention for a block mask (block-causal training on CUDA, Dong et al.,
arXiv 2412.05496); a naive softmax that the tests compare with. Nothing falls back silently: a block mask on the CPU,
where FlexAttention has no backward pass, is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.counters import count
from vtok.layers.cache import KVCache
from vtok.layers.dropout import dropout as drop
from vtok.layers.linear import Linear, linear
from vtok.layers.rope import rotate
from vtok.layout import ranks_of

# bool [.., q, k], "causal", ends of blocks (see vtok.layout.Pattern), a BlockMask, or None: every key is seen
SPANNED = 256  # positions from which a call a span is faster in training


@dataclass(frozen=True)
class Spans:
    """A mask as calls on spans of the queries: (first, end, what they see of the keys before `end`, bool [end - first,
    end], None = all)."""

    parts: tuple[tuple[int, int, Tensor | None], ...]


Mask = Tensor | Literal["causal"] | tuple[int, ...] | Spans | Any | None
QKNorm = Literal["none", "l2", "rms", "layer", "layer_plain"]
MAX_LOG_SCALE = math.log(100)
TILE, KERNELS, MASKS = 128, 64, 64


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, scale: float | None = None, dropout: float = 0.0):
    """softmax(q k^T * scale) v for q [R, N, q, E], k and v [R, N, k, E]; returns [R, N, q, E].

    mask: None, "causal" (query i sees keys 0..i; as many queries as keys), ends of blocks (queries of a block see keys
    up to its end: a call a block and nothing masked), Spans, bool with true = seen, or a BlockMask.
    scale: 1/sqrt(E) where None. dropout: on the weights; not with a BlockMask.
    """
    if mask is None or isinstance(mask, (str, tuple, Tensor, Spans)):
        causal = isinstance(mask, str)
        if causal and q.shape[-2] != k.shape[-2]:
            raise ValueError(f"a causal mask needs as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}")
        if q.dtype is torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            # The backward pass of the CPU kernel is four times slower in bfloat16 than in float32.
            with torch.autocast("cpu", enabled=False):
                return attend(q.float(), k.float(), v.float(), mask=mask, scale=scale, dropout=dropout).bfloat16()
        if isinstance(mask, (tuple, Spans)):
            parts = mask.parts if isinstance(mask, Spans) else [(a, b, None) for a, b in zip((0, *mask), mask)]
            options = {"scale": scale, "dropout": dropout}
            calls = [attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], mask=seen, **options) for a, b, seen in parts]
            return torch.cat(calls, dim=2)
        if dropout and q.device.type == "cpu" and not torch.compiler.is_compiling():
            if causal and q.shape[-2] >= SPANNED:
                return attend(q, k, v, mask=halves(q.shape[-2]), scale=scale, dropout=dropout)
            count("attention.dropped")
            return attend_naive(q, k, v, mask=mask, scale=scale, dropout=dropout)  # no kernel drops there
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, is_causal=causal, scale=scale)
    if dropout:
        raise ValueError("FlexAttention has no dropout on the weights; set attention dropout to 0 or mask=bool")
    if not q.is_cuda:
        raise ValueError("a BlockMask needs CUDA: FlexAttention on the CPU has no backward pass")
    return attend_blocks(_flex(), q, k, v, mask=mask, scale=scale)


@functools.lru_cache(maxsize=64)
def spans(ends: tuple[int, ...]) -> Spans:
    """The mask of blocks that end at these places: the blocks of the first half in one call, then as many a call as
    have an eighth of the positions. Forward and backward of VAR's 680 positions take 0.78 of the time of one call with
    a mask, and a call a block 0.96: each has gradients for all earlier keys (AMD EPYC with AVX2). For the CPU."""
    length, parts, a, inside = ends[-1], [], 0, []
    for b, following in zip(ends, (*ends[1:], None)):
        inside.append(b)
        full = following is None or (2 * following > length if a == 0 else 8 * (b - a) >= length)
        if full:
            block = torch.bucketize(torch.arange(b), torch.tensor(inside), right=True)
            block[:a] = -1
            parts.append((a, b, block[a:, None] >= block if len(inside) > 1 else None))
            a, inside = b, []
    return Spans(tuple(parts))


@functools.lru_cache(maxsize=16)
def halves(length: int) -> Spans:
    """The causal mask in two calls: a quarter of the products falls away, where no kernel skips them."""
    seen, half = torch.ones(length, length, dtype=torch.bool).tril(), length // 2
    return Spans(((0, half, seen[:half, :half]), (half, length, seen[half:])))


def attend_blocks(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, mask: Any, scale: float | None):
    """FlexAttention of q, k, v [R, N, l, E] under a mask of `block_mask`, whose length is l rounded up: what is added
    sees and is not seen."""
    length, added = q.shape[-2], mask.shape[-1] - q.shape[-2]
    if added:
        q, k, v = (F.pad(x, (0, 0, 0, added)) for x in (q, k, v))
    return kernel(q, k, v, block_mask=mask, scale=scale)[:, :, :length]


def attend_naive(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The same by definition, without a fused kernel: the oracle of the tests, and dropout on the CPU."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if isinstance(mask, str):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if isinstance(mask, tuple):
        block = torch.tensor([i for i, (a, b) in enumerate(zip((0, *mask), mask)) for _ in range(a, b)])
        mask = (block[:, None] >= block).to(q.device)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return drop(logits.softmax(-1), dropout) @ v


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # past dynamo's limit: an error, no slow pass


def padded(length: int) -> int:
    """A whole number of FlexAttention's tiles: kernels are compiled for a length, and FlexVAR draws a new one every
    step. All lists within 680 positions share six."""
    return -(-length // TILE) * TILE


def block_mask(rank: Tensor) -> Any:
    """FlexAttention's block mask of the rule rank(query) >= rank(key), for rank int64 [l] on CUDA, of padded(l)."""
    from torch.nn.attention.flex_attention import create_block_mask

    # a kernel for each length, dtype and head width; dynamo compiles no more than its limit
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    length = padded(len(rank))
    last = 2**31 - 1  # of what is added: no position sees it
    ranks = F.pad(rank, (0, length - len(rank)), value=last)
    return create_block_mask(lambda b, h, q, k: ranks[q] >= ranks[k], None, None, length, length, device=rank.device)


@functools.lru_cache(maxsize=MASKS)  # a run has one, or as many as VAR has stages; FlexVAR draws a list every step
def block_mask_of(ends: tuple[int, ...], device: torch.device) -> Any:
    """`block_mask` of blocks that end at these places (see vtok.layout.Pattern), on that device: built once."""
    with torch.inference_mode(False):  # a mask kept from inference could not be trained with
        return block_mask(ranks_of(ends, ends[-1], device))


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection (order q, k, v; heads contiguous inside each).

    bias: "none"; "qkv"; "qv": k's bias is fixed at zero, as in VAR. qk_norm: "l2" normalises q and k and multiplies q
    by a learned scale per head, exp(min(s, ln 100)), s starting at ln 4 (Liu et al., Swin v2, arXiv 2111.09883; VAR),
    with softmax scale 1; "rms" and "layer" are affine norms over the head's channels, "layer_plain" a bare one.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        bias: Literal["none", "qkv", "qv"] = "none",
        out_bias: bool = False,
        qk_norm: QKNorm = "none",
        eps: float = 1e-6,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of heads {heads}")
        self.heads, self.scale, self.dropout, self.qk_norm = heads, scale, dropout, qk_norm
        self.qkv = Linear(dim, 3 * dim, bias=bias == "qkv")
        self.out = Linear(dim, dim, bias=out_bias)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        if qk_norm == "l2":
            self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
            self.scale = 1.0
        elif qk_norm in ("rms", "layer"):
            make = nn.RMSNorm if qk_norm == "rms" else nn.LayerNorm
            self.q_norm, self.k_norm = make(dim // heads, eps=eps), make(dim // heads, eps=eps)
        elif qk_norm == "layer_plain":
            self.q_norm = self.k_norm = nn.LayerNorm(dim // heads, eps=eps, elementwise_affine=False)
        elif qk_norm != "none":
            raise ValueError(f"qk_norm={qk_norm!r}: choose none, l2, rms, layer or layer_plain")

    def joint_bias(self) -> Tensor | None:
        """The bias of the joint projection [3 D]; with "qv" that of k is zero."""
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(
        self,
        x: Tensor,
        *,
        position: tuple[Tensor, Tensor, Tensor | None] | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x [R, l, D] to [R, l, D]; position: (cos, sin, added to q and k) of the l positions; see Inputs."""
        rows, length, dim = x.shape
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            qkv = linear(x, self.qkv.weight, self.joint_bias())
        qkv = qkv.view(rows, length, 3 * self.heads, dim // self.heads).transpose(1, 2)
        together = self.qk_norm == "none" and position is not None
        if together:  # one call turns queries and keys: half the kernels of a decode step
            turned = rotate(qkv[:, : 2 * self.heads], *position[:2])
            q, k, v = turned[:, : self.heads], turned[:, self.heads :], qkv[:, 2 * self.heads :]
        else:
            q, k, v = qkv.chunk(3, dim=1)
        if self.qk_norm == "l2":
            q = F.normalize(q, dim=-1) * self.log_scale.clamp_max(MAX_LOG_SCALE).exp().to(q.dtype)
            k = F.normalize(k, dim=-1)
        elif self.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if position is not None:
            cos, sin, added = position
            count("attention.turned" if together else "attention.turned_apart")
            if not together:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if added is not None:
                added = added.to(q.dtype).view(*added.shape[:-1], self.heads, -1).transpose(-2, -3)
                q, k = q + added, k + added
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms leave float32 under autocast, FlexAttention wants one dtype
        scale, width = self.scale, q.shape[-1]
        if k.shape[-1] > width:  # the cache's width: zeros add nothing to the products
            scale, q = width**-0.5 if scale is None else scale, F.pad(q, (0, k.shape[-1] - width))
        y = attend(q, k, v, mask=mask, scale=scale, dropout=self.dropout if self.training else 0.0)[..., :width]
        return self.out(y.transpose(1, 2).reshape(rows, length, dim).to(qkv.dtype))
