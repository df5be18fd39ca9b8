"""Precision, recall, density and coverage: how two clouds of features lie inside each other's neighbourhoods.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991, k = 3, as ADM's evaluator takes them (arXiv
2105.05233); density and coverage: Naeem et al. 2020, arXiv 2002.09797, k = 5. Values depend on both sizes (ADM: 10,000
real against 50,000 generated), so the sizes stand beside them. Distances are float64 and squared; ADM's script rounds
them to float16, which moves ties. Blocks keep memory at rows x BLOCK numbers whatever the sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """float64 [n, m] of features a [n, d] and b [m, d]; never negative."""
    a, b = a.double(), b.double()
    product = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return product.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of every row of features [N, d] to its k-th nearest other row, float64 [N]."""
    if not 1 <= k < len(features):
        raise ValueError(f"k={k} neighbours need more than {k} images, got {len(features)}")
    found = []
    for start in range(0, len(features), BLOCK):
        rows = features[start : start + BLOCK]
        nearest = torch.full((len(rows), 0), 0.0, dtype=torch.float64, device=features.device)
        for other in range(0, len(features), BLOCK):
            block = squared_distances(rows, features[other : other + BLOCK])
            own = torch.arange(start, start + len(rows), device=block.device) - other
            inside = (own >= 0) & (own < block.shape[1])
            block[inside.nonzero()[:, 0], own[inside]] = float("inf")  # a row is not its own neighbour
            nearest = torch.cat([nearest, block], dim=1).topk(min(k, nearest.shape[1] + block.shape[1]), largest=False)[
                0
            ]
        found.append(nearest[:, k - 1])
    return torch.cat(found)


def inside(points: Tensor, centres: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [P], bool [C]): in how many balls each point lies, and which balls hold a point. Borders belong to a ball.

    points [P, d]; centres [C, d] with squared radii [C].
    """
    count = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    holds = torch.zeros(len(centres), dtype=torch.bool, device=points.device)
    for start in range(0, len(points), BLOCK):
        rows = points[start : start + BLOCK]
        for other in range(0, len(centres), BLOCK):
            block = slice(other, other + BLOCK)
            within = squared_distances(rows, centres[block]) <= squares[block]
            count[start : start + BLOCK] += within.sum(1)
            holds[block] |= within.any(0)
    return count, holds


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> dict[str, float]:
    """precision: share of generated [N, d] within the ball of a real one; recall: the other way round."""
    precise, _ = inside(generated, real, radii(real, k))
    recalled, _ = inside(real, generated, radii(generated, k))
    return {"precision": float((precise > 0).double().mean()), "recall": float((recalled > 0).double().mean())}


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> dict[str, float]:
    """density: real balls that a generated image lies in, over k; coverage: share of real balls that hold one."""
    count, holds = inside(generated, real, radii(real, k))
    return {"density": float(count.double().mean() / k), "coverage": float(holds.double().mean())}
