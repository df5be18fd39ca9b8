"""MaskGIT: all open tokens are predicted at once, the surest are kept, the rest is asked again (arXiv 2202.04200).

The two generators of TiTok (Yu et al., "An image is worth 32 tokens", arXiv 2406.07550): a BERT encoder, with norms
after the residual sums, and U-ViT (Bao et al., arXiv 2209.12152), whose later half also reads the states of the earlier
one. A canvas says in `known` which tokens are decided; every other cell reads the mask token. What a step decides
depends on how sure it is, so the `refine` sampler writes the canvas, and there is neither a cache nor a likelihood in
closed form. Differs from the original: masks are keyed by the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.conditioning import ClassConditioner, Cond
from vgen.cross_entropy import linear_cross_entropy
from vgen.generator import Canvas, Generator, placed, require_ids
from vgen.heads import CategoricalHead
from vgen.masking import masked_layout, random_order, ratio_uniform
from vtok.acceleration import linear_parameters
from vtok.layers.attention import Attention
from vtok.layers.block import FeedForward
from vtok.layers.cache import KVCache
from vtok.layers.dropout import Dropout
from vtok.layers.trunk import check_edits, past
from vtok.noise import SampleNoise
from vtok.quantize.statistics import all_mean
from vtok.tokenizer import TokenSpec

Arch = Literal["bert", "uvit"]


class MaskGIT(Generator):
    """Published: arch=bert, 24 x 768, 16 heads, for 32 or 64 tokens; arch=uvit, 20 x 1024, 16 heads, for 128.

    spec: discrete tokens of one vocabulary. hidden: width of the feed-forward. steps: of sampling. smoothing: of the
    labels in the loss; unmasked_weight: of the loss on tokens that were not hidden. dropout, attention_dropout: of
    BERT; U-ViT has none.
    """

    caches = closed = False

    def __init__(
        self,
        spec: TokenSpec | Mapping[str, Any],
        num_classes: int,
        *,
        depth: int,
        width: int,
        heads: int,
        hidden: int | None = None,
        arch: Arch = "bert",
        steps: int = 8,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_drop: float = 0.1,
        smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
    ) -> None:
        super().__init__()
        spec = TokenSpec.from_config(spec)
        self.accepts(spec)
        if arch not in ("bert", "uvit"):
            raise ValueError(f"arch={arch!r}: choose bert or uvit")
        self.spec, self.num_classes, self.label_drop = spec, num_classes, label_drop
        self.smoothing, self.unmasked_weight = smoothing, unmasked_weight
        self.layout = masked_layout(spec.layout, steps, "arccos")
        length, vocab_size = spec.layout.length, spec.parts[0].vocab_size
        self.conditioner = ClassConditioner(num_classes=num_classes, dim=width)
        self.tokens = nn.Embedding(vocab_size + 1, width)  # the last row is the mask token
        self.position = nn.Parameter(torch.empty(1 + length, width))
        # BERT's kinds of text: the second row is never read, but published files and counts have it
        self.segment = nn.Parameter(torch.empty(2, width)) if arch == "bert" else None
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12) if arch == "bert" else nn.Identity()
        self.embedding_dropout = Dropout(dropout if arch == "bert" else 0.0)
        make = PostNormTrunk if arch == "bert" else SkipTrunk
        self.trunk = make(
            dim=width,
            depth=depth,
            heads=heads,
            hidden=hidden or 4 * width,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        self.head = CategoricalHead(dim=width, vocab_size=vocab_size, bias=True)
        self._init()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        require_ids(spec, "MaskGIT")

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.position, self.segment):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def undecayed(self) -> list[nn.Parameter]:
        """All embeddings, as published."""
        tables = [self.tokens.weight, self.conditioner.table.weight, self.position]
        return tables if self.segment is None else [*tables, self.segment]

    def set_steps(self, steps: int) -> None:
        self.layout = masked_layout(self.spec.layout, steps, "arccos")

    @property
    def sampler(self) -> Callable[..., Canvas]:
        from vgen.samplers.refine import refine

        return refine

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [R, n, D] of ids [R, n], or of distributions over the vocabulary [R, n, V]."""
        return tokens @ self.tokens.weight[:-1] if tokens.is_floating_point() else self.tokens(tokens)

    def forward(
        self, canvas: Canvas, cond: Cond, start: int = 0, stop: int | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states of ALL cells, [R, L, D], given the tokens that are `known`: sets are chosen from all of them.

        Where the canvas says nothing about it, those of the first `start` steps are known, in the layout's order.
        """
        known = canvas.known
        if known is None:
            known = torch.arange(canvas.layout.length, device=canvas.tokens.device) < canvas.layout.written(0, start)[1]
        x = torch.where(known.unsqueeze(-1), self.embed(canvas.tokens), self.tokens.weight[-1])
        x = torch.cat([cond.start, x], dim=1) + self.position
        if self.segment is not None:
            x = x + self.segment[0]
        return self.trunk(self.embedding_dropout(self.embedding_norm(x)), cond)[:, 1:]

    @property
    def operations_formula(self) -> str:
        return "6 matmul parameters x positions + 12 width x blocks x positions^2"

    def operations(self, key: Tensor | None = None) -> float:
        """All cells and the class are read, and every cell is predicted."""
        positions, length = len(self.position), self.layout.length
        seen = 12.0 * self.position.shape[1] * len(self.trunk.blocks) * positions**2
        return 6.0 * linear_parameters(self.trunk) * positions + seen + self.head.operations(length)

    def hide(self, batch: Mapping[str, Any]) -> Tensor:
        """Which tokens training hides, bool [B, L]: round(L r) of them, r = arccos(u) 2 / pi, at least one."""
        noise, length = SampleNoise(batch["key"]), self.layout.length
        ratio = torch.acos(ratio_uniform(noise)) * 2 / math.pi
        count = (length * ratio.clamp(1e-6, 1)).round().clamp(min=1)
        return random_order(noise, length) < count.unsqueeze(1)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 0.0) -> dict[str, Tensor]:
        """Smoothed cross-entropy, weighted over the batch (accumulate above 1: over each batch of the step). "nats"
        [B, 1]: plain, mean over a sample's hidden tokens."""
        hidden, target = self.hide(batch), batch["tokens"]
        canvas = Canvas(batch.get("context", target), self.layout, known=~hidden)
        h = self(canvas, self.conditioner(batch["label"], self.dropped(batch)))
        linear = self.head.linear
        smooth = linear_cross_entropy(h, linear.weight, linear.bias, target, smoothing=self.smoothing)
        weight = torch.where(hidden, 1.0, self.unmasked_weight)
        with torch.no_grad():
            plain = smooth - self.smoothing * self.lead(h, target)
            nats = (plain * hidden).sum(1, keepdim=True) / hidden.sum(1, keepdim=True)
        count = weight.sum()  # of all processes, as their gradients are averaged: the whole batch has one weight
        count = all_mean(count) if self.training else count
        return {"loss": (smooth * weight).sum() / count, "nats": nats}

    def lead(self, h: Tensor, target: Tensor) -> Tensor:
        """The target's logit minus the mean of all logits, float32 [B, L], without computing those. Times s it is what
        smoothing by s adds to -log p(target): log sum exp - (1 - s) target's - s mean, for log sum exp - target's."""
        weight, bias = self.head.linear.weight.float(), self.head.linear.bias.float()
        apart, offset = weight[target] - weight.mean(0), bias[target] - bias.mean()
        return (h.float() * apart).sum(-1) + offset


class MaskedBlock(nn.Module):
    """Attention and feed-forward with exact GELU; norms before them (pre) or after the residual sums (post)."""

    def __init__(
        self, *, dim: int, heads: int, hidden: int, post: bool, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        eps, bias = (1e-12, "qkv") if post else (1e-5, "none")
        self.post = post
        self.attention = Attention(dim=dim, heads=heads, bias=bias, out_bias=True, dropout=attention_dropout)
        self.ffn = FeedForward(dim=dim, hidden=hidden, kind="gelu", bias=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.dropout(self.attention(x)))
            return self.norm2(x + self.dropout(self.ffn(x)))
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PostNormTrunk(nn.Module):
    """BERT's encoder (Devlin et al., arXiv 1810.04805)."""

    def __init__(self, *, depth: int, **block: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MaskedBlock(post=True, **block) for _ in range(depth))

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        """[R, l, D] of positions x [R, l, D], with prefix and edits of `cond`."""
        x, edits = opened(x.to(self.blocks[0].attention.qkv.weight.dtype), cond, len(self.blocks))
        for i, block in enumerate(self.blocks):
            x = block(edits[i](x))
        return x[:, cond.ahead(0) :]


class SkipTrunk(nn.Module):
    """U-ViT: `depth` blocks around one in the middle; each of the later half reads its mirror image's output too."""

    def __init__(
        self, *, dim: int, depth: int, heads: int, hidden: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth={depth}: arch=uvit needs an even number of blocks beside the middle one")
        self.blocks = nn.ModuleList(
            MaskedBlock(dim=dim, heads=heads, hidden=hidden, post=False) for _ in range(depth + 1)
        )
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        """[R, l, D] of positions x [R, l, D], with prefix and edits of `cond`."""
        x, edits = opened(x.to(self.blocks[0].attention.qkv.weight.dtype), cond, len(self.blocks))
        half, kept = len(self.skips), []
        for i, block in enumerate(self.blocks):
            if i > half:
                x = self.skips[i - half - 1](torch.cat([x, kept.pop()], dim=-1))
            x = block(edits[i](x))
            if i < half:
                kept.append(x)
        return self.norm(x[:, cond.ahead(0) :])


def opened(x: Tensor, cond: Cond, blocks: int) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
    """Positions x [R, l, D] behind the prefix of `cond`, and what changes them on entry to each block."""
    check_edits(cond.at, blocks)
    count = cond.ahead(0)
    if count:
        x = torch.cat([cond.prefix.to(x.dtype), x], dim=1)
    place = torch.arange(-1, x.shape[1] - count - 1, device=x.device)  # of the class, then the cells
    plain = [placed(cond.at.get(i, lambda h, place: h), place) for i in range(blocks)]
    return x, [past(edit, count) for edit in plain] if count else plain
