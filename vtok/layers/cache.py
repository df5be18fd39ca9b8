"""Keys and values of finished steps. State that is passed, never hung on a module.

`extend` writes behind the committed length and is provisional until `commit`; the next `extend` overwrites it. That
serves flow-matching steps that re-run the current entity (xAR) and speculative decoding. Lengths differ between rows
after a ragged commit; until then the plain path slices by a host integer and needs no mask.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values [layers, rows, heads, capacity, width], zeros behind the `dim` numbers of a head.

    width: dim where None, but on CUDA rounded up to a multiple of 8, which fused kernels read without a copy.
    length: int64 [rows] on the device, committed positions of every row. bound: host integer >= max(length), so that
    the slice attention reads is static. kept: what passes made of a tensor that they all take, such as a condition
    (Trunk.modulated), by that tensor; whoever overwrites it clears this.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        width: int | None = None,
    ) -> None:
        if width is None:
            width = -(-dim // 8) * 8 if torch.device(device).type == "cuda" else dim
        shape = (layers, rows, heads, capacity, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bound = 0
        self.ragged = False
        self.kept: dict[Tensor, Any] = {}

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def first(self, rows: int) -> KVCache:
        """The first rows alone, in the same memory, to go on with."""
        part = copy.copy(self)
        part.keys, part.values, part.length = self.keys[:, :rows], self.values[:, :rows], self.length[:rows]
        return part

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [rows, heads, n, dim] behind the committed ones; all up to there, [rows, heads, m, width]."""
        stop = self.bound + k.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {stop} are needed; make it larger")
        keys, values, dim = self.keys[layer], self.values[layer], k.shape[-1]
        if self.ragged:
            index = self.length[:, None] + torch.arange(k.shape[2], device=k.device)
            index = index[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        else:
            keys[:, :, self.bound : stop, :dim] = k
            values[:, :, self.bound : stop, :dim] = v
        return keys[:, :, :stop], values[:, :, :stop]

    def mask(self, seen: Tensor | None, new: int) -> Tensor | None:
        """Which keys the `new` queries see, bool [.., new, bound + new]: the committed ones, and `seen` among the new.

        seen: bool [.., new, new], None = all. Returns None where every key is seen.
        """
        if not self.ragged:
            if seen is None:
                return None
            past = torch.ones(*seen.shape[:-1], self.bound, dtype=torch.bool, device=seen.device)
            return torch.cat([past, seen], dim=-1)
        offset = torch.arange(self.bound + new, device=self.length.device) - self.length[:, None]  # [rows, m]
        inside = ((offset >= 0) & (offset < new))[:, None].expand(-1, new, -1)
        if seen is not None:
            index = offset.clamp(0, new - 1)[:, None].expand(-1, new, -1)
            inside = inside & seen.expand(len(offset), -1, -1).gather(2, index)
        return ((offset < 0)[:, None] | inside).unsqueeze(1)

    def commit(self, n: int | Tensor) -> None:
        """Keep the first n of the positions written last; n: int, or int64 [rows]."""
        if isinstance(n, int):
            self.length += n
            self.bound += n
        else:
            self.length += n
            self.bound = int(self.length.max())
            self.ragged = self.ragged or bool((self.length != self.bound).any())

    def truncate(self, n: int | Tensor) -> None:
        """Forget all but the first n committed positions; n: int, or int64 [rows]."""
        self.length = torch.minimum(self.length, torch.as_tensor(n, device=self.length.device).expand_as(self.length))
        self.bound = int(self.length.max())
        self.ragged = bool((self.length != self.bound).any())

    def take(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; in place, so that addresses held by captured graphs stay valid."""
        self.keys.copy_(self.keys[:, rows])
        self.values.copy_(self.values[:, rows])
        self.length.copy_(self.length[rows])
