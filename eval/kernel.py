"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of two clouds of features.

Binkowski et al. 2018, arXiv 1801.01401: kernel (x.y / d + 1)^3, the mean and standard deviation over random subsets. It
has no bias in the number of images, unlike the Frechet distance, and may be a little below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate from x [n, d] and y [m, d], float64."""
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> dict[str, float]:
    """kid and kid_std over `subsets` pairs of random subsets of `size` (of fewer images: as many as there are)."""
    size = min(size, len(real), len(generated))
    if size < 2:
        raise ValueError(f"kid=true needs at least two images a side, got {len(real)} and {len(generated)}")
    drawer = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        picks = [torch.randperm(len(side), generator=drawer)[:size].to(side.device) for side in (real, generated)]
        values.append(squared_discrepancy(real[picks[0]], generated[picks[1]]))
    found = torch.stack(values)
    return {"kid": float(found.mean()), "kid_std": float(found.std(correction=0))}
