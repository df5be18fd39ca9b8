"""The transformer trunk that every generator runs, and the one tensor structure that goes into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.counters import count, stored_as
from vtok.layers.attention import SPANNED, Mask, QKNorm, Spans, block_mask, block_mask_of, spans
from vtok.layers.block import Activation, Block, Modulation, Norm, make_norm, scale_and_add
from vtok.layers.cache import KVCache
from vtok.layout import Pattern, behind, visible

# Positions in a step, on average and but for the largest, from which a call a step beats one mask in memory. Measured
# on a CPU with VAR's 680 positions: forward 0.75 of the time, forward and backward 1.05 (every call has gradients for
# all earlier keys), so that training has a mask, in a few calls or FlexAttention's. The latter has no dropout on the
# weights: with it, training on CUDA has a call a block (not measured).
BLOCK = 8


def pays(ends: tuple[int, ...]) -> bool:
    """Whether a call a block is faster than a mask, without gradients, for blocks that end at these places."""
    largest = max(end - start for start, end in zip((0, *ends), ends))
    return ends[-1] - largest >= BLOCK * (len(ends) - 1)


@dataclass
class Inputs:
    """Everything the trunk needs for l positions of R rows.

    x [R, l, D]; rank int64 [l] or [R, l]; pattern: what the ranks say about the positions among themselves, known on
    the host; position: (cos, sin, added to q and k or None), tables [l, E/2] or [R, l, E/2]; vector [R, v, D], each row
    of l / v positions in turn; read: index of the positions that predict (None = all); mask: bool [.., l, keys] where
    ranks cannot tell; at: block -> edit of h [R, l, D] on entry to that block; each: int64 [l], the row of `vector` of
    each position where they are not shared out evenly (a vector for scales of several sizes, say: xAR).
    """

    x: Tensor
    rank: Tensor
    pattern: Pattern = "ranks"
    position: tuple[Tensor, Tensor, Tensor | None] | None = None
    vector: Tensor | None = None
    read: Tensor | None = None
    mask: Mask = None
    at: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    each: Tensor | None = None

    def behind(self, prefix: Tensor) -> Inputs:
        """These positions with prefix [R, P, D] in front of them, which all of them see, and which sees itself alone.
        It stands nowhere (no rope, nothing added), is modulated as the first position is, is not edited and predicts
        nothing. With a cache it goes in with the first step: commit P positions more."""
        count, length = prefix.shape[1], self.x.shape[1]
        position, vector, mask = self.position, self.vector, self.mask
        if position is not None:
            values = zip(position, (1.0, 0.0, 0.0))
            position = tuple(None if t is None else F.pad(t, (0, 0, count, 0), value=v) for t, v in values)
        each = self.shares()
        if mask is not None:
            mask = F.pad(mask.expand(*mask.shape[:-2], length, -1), (count, 0), value=True)
            first = mask.new_ones(*mask.shape[:-2], count, mask.shape[-1])
            first[..., count:] = False
            mask = torch.cat([first, mask], dim=-2)
        own = torch.arange(length, device=prefix.device) if self.read is None else self.read
        return replace(
            self,
            x=torch.cat([prefix.to(self.x.dtype), self.x], dim=1),
            rank=F.pad(self.rank + 1, (count, 0)),
            pattern=behind(self.pattern, length, count),
            position=position,
            vector=vector,
            read=own + count,
            mask=mask,
            at={block: past(edit, count) for block, edit in self.at.items()},
            each=None if each is None else torch.cat([each[:1].expand(count), each]),
        )

    def shares(self) -> Tensor | None:
        """The row of `vector` of each position, int64 [l]; None where there is none, or one for all."""
        if self.each is not None or self.vector is None or self.vector.shape[1] == 1:
            return self.each
        length = self.x.shape[1]
        return torch.arange(length, device=self.x.device) // (length // self.vector.shape[1])

    def window(self, index: Tensor) -> Inputs:
        """The positions index [R, w] of every row, for ragged rows."""
        rows = torch.arange(len(index), device=index.device)[:, None]

        def pick(table: Tensor | None) -> Tensor | None:
            if table is None:
                return None
            return table[index] if table.dim() == 2 else table[rows, index]

        position = None if self.position is None else tuple(pick(table) for table in self.position)
        vector, each = self.vector, self.shares()
        if vector is not None and each is not None:
            vector = vector[rows, each[index]]
        rank = self.rank[index] if self.rank.dim() == 1 else self.rank.gather(1, index)
        return Inputs(self.x[rows, index], rank, "ranks", position, vector, None, None, self.at)


def check_edits(at: dict[int, Callable[[Tensor], Tensor]], blocks: int) -> None:
    """ValueError where an edit is of a block that is not there."""
    if wrong := sorted(set(at) - set(range(blocks))):
        raise ValueError(f"edits of blocks {wrong} (Cond.at), but the model has the blocks 0 .. {blocks - 1}")


def past(edit: Callable[[Tensor], Tensor], count: int) -> Callable[[Tensor], Tensor]:
    """The edit of all but the first `count` positions."""
    return lambda h: torch.cat([h[:, :count], edit(h[:, count:])], dim=1)


class Trunk(nn.Module):
    """`depth` blocks and a final norm, float32-accurate norms, one mask for all of them.

    norm, eps: of every norm. ffn, hidden: feed-forward kind and width. bias: of attention ("qv" as VAR) and, unless
    "none", of the feed-forward. modulation: "none" (affine norms), "own" (each block projects the vector), "shared"
    (one projection plus a learned offset a block, VAR-d36). dropout: after attention and feed-forward. drop_path: rate
    of the last block, rising linearly from 0. checkpointing: recompute blocks in the backward pass. ffn_bias: where it
    is not the attention's. layer_scale: start value of a learned scale on each residual branch (CaiT, arXiv
    2103.17239); only without modulation. final_norm: false leaves it, and its modulation, to the caller.
    modulated_affine: which norms keep weights of their own although they are modulated: "none", those of the "blocks"
    (RAR), or "all" (GigaTok). final_norm="plain": an affine one without modulation (xAR). ffn_dropout: on the hidden
    values of the feed-forward. out_bias: of the attention's last projection, where it is not that of q, k and v.

    `prefixes`, an attribute: whether training too has a call a block instead of a mask, for eval.throughput to compare.
    """

    prefixes = False

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        norm: Norm = "rms",
        eps: float = 1e-5,
        ffn: Activation = "swiglu",
        bias: Literal["none", "qkv", "qv"] = "none",
        qk_norm: QKNorm = "none",
        attention_scale: float | None = None,
        modulation: Modulation = "none",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        ffn_bias: bool | None = None,
        layer_scale: float | None = None,
        final_norm: bool | Literal["plain"] = True,
        modulated_affine: Literal["none", "blocks", "all"] = "none",
        ffn_dropout: float = 0.0,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: a trunk has at least one block")
        self.dim, self.heads, self.checkpointing = dim, heads, checkpointing
        self.attention_dropout = attention_dropout
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                hidden=hidden,
                norm=norm,
                eps=eps,
                ffn=ffn,
                bias=bias,
                qk_norm=qk_norm,
                attention_scale=attention_scale,
                modulation=modulation,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
                ffn_bias=ffn_bias,
                layer_scale=layer_scale,
                affine=modulated_affine != "none",
                ffn_dropout=ffn_dropout,
                out_bias=out_bias,
            )
            for i in range(depth)
        )
        self.shared = nn.Linear(dim, 6 * dim) if modulation == "shared" else None
        plain = modulation == "none" or modulated_affine == "all" or final_norm == "plain"
        self.norm = make_norm(norm, dim, eps, affine=plain) if final_norm else nn.Identity()
        self.final = nn.Linear(dim, 2 * dim) if modulation != "none" and final_norm is True else None  # scale, shift

    def cache(
        self,
        rows: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kind: type[KVCache] = KVCache,
    ) -> KVCache:
        """An empty cache that fits this trunk."""
        return kind(len(self.blocks), rows, self.heads, capacity, self.dim // self.heads, dtype=dtype, device=device)

    def mask(self, inputs: Inputs, cache: KVCache | None) -> Mask:
        """The attention mask of these positions, in the cheapest form that says the same."""
        if inputs.mask is not None:
            return inputs.mask
        fresh = cache is None or (cache.bound == 0 and not cache.ragged)
        if inputs.pattern == "full":
            return None if fresh else cache.mask(None, inputs.x.shape[1])
        if fresh and inputs.pattern == "causal":
            return "causal"
        blocks = inputs.pattern if fresh and isinstance(inputs.pattern, tuple) else ()
        grads, on_cuda = torch.is_grad_enabled(), inputs.x.is_cuda and self.training
        dropped = on_cuda and self.attention_dropout > 0  # FlexAttention has no dropout on the weights
        if blocks and ((grads and self.prefixes) or ((dropped or not grads) and pays(blocks))):
            return blocks
        if blocks and grads and not inputs.x.is_cuda and blocks[-1] >= SPANNED:
            return spans(blocks)
        if fresh and on_cuda and not dropped and inputs.rank.dim() == 1:
            # ranks on the device tell no two masks apart without waiting for it
            return block_mask_of(blocks, inputs.rank.device) if blocks else block_mask(inputs.rank)
        seen = visible(inputs.rank, inputs.rank)
        seen = seen if fresh else cache.mask(seen, inputs.x.shape[1])
        return seen.unsqueeze(1) if seen.dim() == 3 else seen

    def count(self, weight: Tensor, mask: Mask) -> None:
        """Which way this pass goes (vtok/counters.py)."""
        count(stored_as(weight))
        if mask is None or isinstance(mask, str):
            count("attention.full" if mask is None else "attention.causal")
        elif isinstance(mask, (tuple, Spans)):
            count("attention.prefixes" if isinstance(mask, tuple) else "attention.spans")
        else:
            count("attention.mask" if isinstance(mask, Tensor) else "attention.blocks")
        if self.checkpointing and self.training:
            count("block.recomputed")
        if self.blocks[0]._compiled_call_impl is not None:
            count("block.compiled")

    def forward(self, inputs: Inputs, cache: KVCache | None = None) -> Tensor:
        """h [R, l, D] after the final norm. Writes the cache provisionally; the caller commits."""
        # weights in bf16 mean a bf16 residual stream; under autocast the weights are float32 and x stays float32
        weight, mask = self.blocks[0].attention.qkv.weight, self.mask(inputs, cache)
        check_edits(inputs.at, len(self.blocks))
        x = inputs.x.to(weight.dtype)
        self.count(weight, mask)
        vectors, final = self.modulated(inputs.vector, cache, x.dtype)
        settings: dict[str, Any] = {"position": inputs.position, "mask": mask, "cache": cache, "each": inputs.each}
        for i, (block, vector) in enumerate(zip(self.blocks, vectors)):
            if i in inputs.at:
                x = inputs.at[i](x)
            if self.checkpointing and self.training:
                x = checkpoint(block, x, vector=vector, layer=i, use_reentrant=False, **settings)
            else:
                x = block(x, vector=vector, layer=i, **settings)
        if final is None:
            return self.norm(x)
        scale, shift = (v if inputs.each is None else v[:, inputs.each] for v in final.chunk(2, dim=-1))
        return scale_and_add(shift, self.norm(x), 1 + scale)

    def modulated(
        self, vector: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """(what each block takes as `vector`, what scales and shifts the final norm) of the condition [R, v, D].

        A class is the same at every step, and its projections are a third of all weights of such blocks: beside a cache
        one vector for all positions is projected in the first pass, and kept for the next ones that bring the same
        tensor.
        """
        if vector is None:
            return [None] * len(self.blocks), None
        once = cache is not None and vector.shape[1] == 1
        if once and vector in cache.kept:
            count("modulation.kept")
            return cache.kept[vector]
        hidden = F.silu(vector.to(dtype))
        made: list[Tensor | None] = [hidden] * len(self.blocks)
        if self.shared is not None:
            made = [self.shared(hidden).unflatten(-1, (6, -1))] * len(self.blocks)
        elif once:
            made = [block.slots(hidden) for block in self.blocks]
        final = None if self.final is None else self.final(hidden)
        if once:
            cache.kept.clear()
            cache.kept[vector] = made, final
        return made, final
