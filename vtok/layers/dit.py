"""What a flow network adds to the trunk: attention to a condition, modulation by parts of the sequence, an output norm.

Adaptive norms as in DiT (Peebles & Xie, arXiv 2212.09748).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.attention import Mask, attend
from vtok.layers.block import make_norm
from vtok.layers.rope import rotate


class ConditionAttention(nn.Module):
    """Multi-head attention from x [B, l, D] to a condition [B, m, D]; rope, where given, turns the queries only.

    qk_norm: "none", or affine "layer" or "rms" norms over a head's channels.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        bias: bool = True,
        qk_norm: Literal["none", "layer", "rms"] = "layer",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        normed = qk_norm != "none"
        self.q_norm = make_norm(qk_norm, dim // heads, eps) if normed else nn.Identity()
        self.k_norm = make_norm(qk_norm, dim // heads, eps) if normed else nn.Identity()

    def keys(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, m, dim / heads] of a condition, for many x to attend to."""
        k, v = self.kv(condition).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.k_norm(k), v

    def forward(
        self,
        x: Tensor,
        condition: Tensor | tuple[Tensor, Tensor],
        *,
        position: tuple[Tensor, Tensor] | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """condition: [B, m, D], or its `keys`."""
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        k, v = self.keys(condition) if isinstance(condition, Tensor) else condition
        if position is not None:
            q = rotate(q, *position)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms leave float32 under autocast
        return self.out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))


class ModulatedNorm(nn.Module):
    """Layer norm without weights of its own, scaled by 1 + scale and shifted by a projection of SiLU(vector).

    Rows of the projection: scale, then shift. Starts at zero, i.e. as the plain norm.
    """

    def __init__(self, *, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.projection = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x [B, l, D], vector [B, v, D] with v = 1 or l."""
        scale, shift = self.projection(F.silu(vector)).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale)


class SplitModulation(nn.Module):
    """Modulation that differs between `parts` of a sequence (patches and registers, in FlexTok): [R, 1, D] to
    [R, parts, 6 D]. Stands in for a block's own; Inputs.each then says which part a position is of. Starts at zero.
    """

    def __init__(self, *, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.projection = nn.Linear(dim, parts * 6 * dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, vector: Tensor) -> Tensor:
        return self.projection(vector).unflatten(-1, (self.parts, -1)).squeeze(1)


def repa_head(dim: int, width: int, hidden: int = 2048) -> nn.Sequential:
    """Projection of hidden states that are aligned with a pretrained network (REPA, Yu et al., arXiv 2410.06940)."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
    )
