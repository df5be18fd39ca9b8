"""Q-Former blocks: queries see each other by self-attention and read a context by cross-attention.

The layer is that of DETR (Carion et al., arXiv 2005.12872) with norms in front; encoder and decoder are placed as in
GigaTok (Xiong et al., arXiv 2504.08736, section 3), between a grid and a sequence. Positions are added in every layer
to what becomes queries and keys, never to values. The encoder's queries are means of the grid over a pyramid of cells;
the decoder's are the first token, the same one for every cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.layers.attention import Mask, attend
from vtok.layers.block import FeedForward
from vtok.layers.vit import cell_means, initialise, table


class PositionedAttention(nn.Module):
    """Multi-head attention from x to a context, each with its positions."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, position: Tensor, place: Tensor, mask: Mask = None) -> Tensor:
        """x [B, l, D] with position [l, D], context [B, m, D] with place [m, D]; mask bool [.., l, m]. -> [B, l, D]."""
        parts = self.q(x + position), self.k(context + place), self.v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """x + self-attention, then + cross-attention, then + feed-forward (GELU, four times the width)."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.own = PositionedAttention(dim=dim, heads=heads)
        self.cross = PositionedAttention(dim=dim, heads=heads)
        self.ffn = FeedForward(dim=dim, hidden=4 * dim, kind="gelu", bias=True)

    def forward(self, x: Tensor, context: Tensor, position: Tensor, place: Tensor, mask: Mask = None) -> Tensor:
        """As PositionedAttention; mask: of the context only, the queries all see each other."""
        h = self.norm1(x)
        x = x + self.own(h, h, position, position)
        x = x + self.cross(self.norm2(x), context, position, place, mask)
        return x + self.ffn(self.norm3(x))


class QFormer(nn.Module):
    """What encoder and decoder share: norm and projection of the context, position tables, layers, norm.

    channels: of the context. queries, places: how many queries and context positions have a learned position.
    checkpointing: recompute the layers in the backward pass.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        queries: int,
        places: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm_in, self.embed = nn.LayerNorm(channels), nn.Linear(channels, dim)
        self.position, self.place = table(queries, dim), table(places, dim)
        self.layers = nn.ModuleList(QFormerLayer(dim=dim, heads=heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def initialise(self) -> None:
        """Published start: truncated normal 0.02; queries, keys and values uniform as torch's MultiheadAttention."""
        initialise(self, width=self.embed.out_features)
        for part in self.modules():
            if isinstance(part, PositionedAttention):
                bound = math.sqrt(6 / (4 * part.q.in_features))  # Xavier over the three of them as one [3D, D] matrix
                for projection in (part.q, part.k, part.v):
                    nn.init.uniform_(projection.weight, -bound, bound)

    def read(self, x: Tensor, context: Tensor, mask: Mask = None, tap: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalised queries after the last layer and plain ones after layer `tap` (1-based; None: the last)."""
        position, place = self.position, self.place[: context.shape[1]]
        tapped = x
        for i, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, context, position, place, mask, use_reentrant=False)
            else:
                x = layer(x, context, position, place, mask)
            tapped = x if tap is None or i < tap else tapped
        return self.norm(x), tapped


class QFormerEncoder(QFormer):
    """A grid [B, side, side, channels] to [B, tokens + redundant, channels].

    tokens: a power of two whose pyramid fits the grid. redundant: the last so many queries are repeated behind them,
    with positions of their own (ReToK, arXiv 2601.01535).
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        side: int,
        tokens: int,
        redundant: int = 0,
        checkpointing: bool = False,
    ) -> None:
        if not 0 <= redundant < tokens:
            raise ValueError(f"redundant={redundant} must lie between 0 and tokens={tokens}, the first one excluded")
        pyramid(tokens, side)
        shape = dict(channels=channels, dim=dim, depth=depth, heads=heads, checkpointing=checkpointing)
        super().__init__(queries=tokens + redundant, places=side * side, **shape)
        self.tokens, self.redundant = tokens, redundant
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, channels)
        self.initialise()

    def forward(self, grid: Tensor) -> Tensor:
        grid = self.embed(self.norm_in(grid))
        queries = self.query(pooled(grid, self.tokens))
        queries = torch.cat([queries, queries[:, self.tokens - self.redundant :]], 1)
        return self.out(self.read(queries, grid.flatten(1, 2))[0])


class QFormerDecoder(QFormer):
    """Tokens [B, L, channels], L at most `tokens`, to a map [B, channels, side, side].

    The last layer is a 3 x 3 convolution on the grid of the queries.
    """

    def __init__(
        self, *, channels: int, dim: int, depth: int, heads: int, side: int, tokens: int, checkpointing: bool = False
    ) -> None:
        shape = dict(channels=channels, dim=dim, depth=depth, heads=heads, checkpointing=checkpointing)
        super().__init__(queries=side * side, places=tokens, **shape)
        self.side = side
        self.out = nn.Conv2d(dim, channels, 3, padding=1)
        self.initialise()

    def forward(self, tokens: Tensor, seen: Tensor | None = None, tap: int | None = None) -> tuple[Tensor, Tensor]:
        """The map, and the queries [B, side * side, D] after layer `tap`. seen: bool [B, L], None = all tokens."""
        context = self.embed(self.norm_in(tokens))
        queries = context[:, :1].expand(-1, self.side**2, -1)
        mask = None if seen is None else seen[:, None, None]
        x, tapped = self.read(queries, context, mask, tap)
        return self.out(x.transpose(1, 2).unflatten(2, (self.side, self.side))), tapped


def pyramid(tokens: int, side: int) -> list[tuple[int, int]]:
    """(rows, columns) of the cells that a side x side grid is averaged over: 1, 1, 2, 4, .., tokens / 2 of them.

    Columns are halved first. Raises ValueError where `tokens` is no power of two or the grid has fewer cells a side.
    """
    levels = tokens.bit_length() - 1
    if tokens != 2**levels:
        raise ValueError(f"tokens={tokens} must be a power of two: queries are the cells of a pyramid")
    sizes = [(1, 1), *((2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in range(levels))]
    rows, columns = sizes[-1]
    if side < max(rows, columns):
        raise ValueError(
            f"tokens={tokens} are {rows} x {columns} cells of a grid that has {side} x {side}: take fewer tokens, or a "
            "larger image_size"
        )
    return sizes


def pooled(grid: Tensor, tokens: int) -> Tensor:
    """Means [B, tokens, D] of a grid [B, side, side, D] over the cells of its pyramid, coarse ones first. Cells of
    published sizes divide the grid; see `cell_means` for others."""
    maps = grid.permute(0, 3, 1, 2)
    means = [cell_means(maps, *cells) for cells in pyramid(tokens, grid.shape[1])]
    return torch.cat([mean.flatten(2) for mean in means], 2).transpose(1, 2)
