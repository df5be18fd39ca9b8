"""A table of codes: nearest-code search in float32, and the two ways to keep it alive, moving averages and restarts.

The table is learned by gradients, or, with `ema_decay`, follows the mean of the vectors assigned to each code (van den
Oord et al., arXiv 1711.00937, appendix A.1). `restart` replaces codes that hardly occur by vectors of the batch (as in
Jukebox, Dhariwal et al., arXiv 2005.00341, section 3.1). Both count over all processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from vtok.precision import full
from vtok.quantize.statistics import all_sum, count_ids

# Distances held at once, in floats (128 MB): bounds the memory of the search, not its result.
SEARCH_BUDGET = 2**25


class Codebook(nn.Module):
    """weight [V, C]: a parameter, or a buffer with `ema_decay`.

    l2_norm: codes live on the unit sphere; initialised there, and `update` expects normalised vectors.
    ema_decay: of the counts and sums. restart: a code whose average count falls below this share of the mean count is
    replaced; 0 never. Counts are averaged with `ema_decay`, or 0.99.
    """

    def __init__(
        self, *, vocab_size: int, channels: int, l2_norm: bool, ema_decay: float | None = None, restart: float = 0.0
    ) -> None:
        super().__init__()
        if vocab_size < 1 or channels < 1:
            raise ValueError(f"vocab_size and channels must be positive, got {vocab_size} and {channels}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1 (or be null), got {ema_decay}")
        if not 0 <= restart < 1:
            raise ValueError(f"restart is a share of the mean count in [0, 1), got {restart}")
        self.l2_norm, self.ema_decay, self.restart = l2_norm, ema_decay, restart
        weight = torch.empty(vocab_size, channels).uniform_(-1 / vocab_size, 1 / vocab_size)
        weight = F.normalize(weight, dim=-1) if l2_norm else weight
        if ema_decay is None:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        if self.tracks:
            # with restarts nothing counts as used yet: the first batch replaces the codes that it does not use, which
            # starts the table at data
            self.register_buffer("counts", torch.full((vocab_size,), 0.0 if restart else 1.0))
        if ema_decay is not None:
            self.register_buffer("sums", weight * self.counts.unsqueeze(1))

    @property
    def tracks(self) -> bool:
        """Whether `update` has anything to do."""
        return self.ema_decay is not None or self.restart > 0

    def table(self) -> Tensor:
        """Codes, float32 [V, C], of unit length with `l2_norm`. Look up here only: a row alone may round otherwise."""
        weight = full(self.weight)
        if self.training and self.tracks:
            weight = weight.clone()  # `update` writes into weight before the backward pass has read the table
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Take a training batch into account: vectors float32 [N, C] and the codes int64 [N] they were given.

        A vector that is not finite is left out: the step of it may be dropped (on_nan=skip), the table stays.
        """
        if not self.tracks:
            return
        decay = 0.99 if self.ema_decay is None else self.ema_decay
        good = vectors.isfinite().all(-1)
        counts = count_ids(ids.where(good, len(self.counts)), len(self.counts) + 1)[:-1]
        self.counts.lerp_(counts, 1 - decay)
        if self.ema_decay is not None:
            counted = vectors.where(good.unsqueeze(1), 0).to(self.sums.dtype)
            sums = torch.zeros_like(self.sums).index_add_(0, ids, counted)
            self.sums.lerp_(all_sum(sums), 1 - decay)
            used = self.counts.unsqueeze(1) > 1e-5
            self.weight.copy_(torch.where(used, self.sums / self.counts.clamp(min=1e-5).unsqueeze(1), self.weight))
        if self.restart:
            self._restart(vectors)

    def _restart(self, vectors: Tensor) -> None:
        threshold = self.restart * self.counts.mean()
        candidates = vectors[torch.randperm(len(vectors), device=vectors.device)[: len(self.counts)]].contiguous()
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(candidates, 0)  # every process must restart a code at the same vector
        # the rank of each dead code among the dead; codes beyond the number of candidates wait for the next batch
        dead = self.counts < threshold
        rank = dead.long().cumsum(0) - 1
        dead &= rank < len(candidates)
        fresh = candidates[rank.clamp(0, len(candidates) - 1)]
        dead &= fresh.isfinite().all(-1)
        self.weight.copy_(torch.where(dead.unsqueeze(1), fresh, self.weight))
        # twice the threshold: a new code has log(2) / (1 - decay) batches to find users
        self.counts.copy_(torch.where(dead, 2 * threshold, self.counts))
        if self.ema_decay is not None:
            self.sums.copy_(torch.where(dead.unsqueeze(1), fresh * 2 * threshold, self.sums))


@torch.no_grad()
def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Index int64 [N] of the row of `table` [V, C] nearest to each of `vectors` [N, C] (Euclidean), the first on ties.

    For unit vectors this is the largest cosine. |vector|^2 is left out: it moves no minimum and costs digits.
    """
    half_squares = 0.5 * table.square().sum(-1)
    rows = max(1, SEARCH_BUDGET // len(table))
    found = [torch.addmm(half_squares, part, table.T, alpha=-1).argmin(1) for part in vectors.split(rows)]
    return found[0] if len(found) == 1 else torch.cat(found)
