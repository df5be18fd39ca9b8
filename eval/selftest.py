"""`python -m eval.selftest`: every formula of the evaluation against an answer known in closed form, without weights.

Prints, for each, the known value, the value got, and the tolerance; exit code 1 if one is missed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from eval.manifold import density_coverage, precision_recall
from eval.moments import InceptionScore, Moments, Statistics, frechet_distance

Check = tuple[str, float, float, float]  # name, known, got, tolerance


def gaussians() -> list[Check]:
    """Frechet distances of Gaussians with given moments."""
    dim, drawer = 2048, torch.Generator().manual_seed(0)
    mean = torch.randn(dim, generator=drawer, dtype=torch.float64)
    identity, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    scaled = frechet_distance(Statistics(mean, 2.25 * identity, None), Statistics(zero, identity, None))
    small = 64
    a, b = (torch.rand(small, generator=drawer, dtype=torch.float64) + 0.1 for _ in range(2))
    basis = torch.linalg.qr(torch.randn(small, small, generator=drawer, dtype=torch.float64))[0]
    none = torch.zeros(small, dtype=torch.float64)
    turned = [Statistics(none, basis @ torch.diag(x) @ basis.T, None) for x in (a, b)]
    half = torch.cat([torch.ones(small // 2), torch.zeros(small // 2)]).double()  # rank-deficient, disjoint supports
    flat = [Statistics(none, torch.diag(x), None) for x in (half, 1 - half)]
    return [
        ("FID of N(m, 1.5^2 I) and N(0, I), 2048-d", float(mean @ mean) + dim * 0.25, scaled, 1e-7),
        (
            "FID of covariances with common axes",
            float((a.sqrt() - b.sqrt()).square().sum()),
            frechet_distance(*turned),
            1e-9,
        ),
        ("FID of two flat Gaussians on disjoint axes", float(small), frechet_distance(*flat), 1e-9),
        ("FID of a Gaussian with itself", 0.0, frechet_distance(turned[0], turned[0]), 1e-9),
    ]


def few_samples() -> list[Check]:
    """100 samples in 2048 dimensions, where covariances are singular: the trace term from the N x N cross-Gram."""
    drawer = torch.Generator().manual_seed(1)
    x, y = (torch.randn(100, 2048, generator=drawer, dtype=torch.float64) + shift for shift in (0.0, 0.1))
    centred = [z - z.mean(0) for z in (x, y)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 99
    traces = sum(z.square().sum() / 99 for z in centred)
    known = float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * nuclear)
    return [("FID of 100 samples, against the cross-Gram", known, frechet_distance(statistics(x), statistics(y)), 1e-8)]


def statistics(x: Tensor, batch: int = 32) -> Statistics:
    moments = Moments(x.shape[1])
    for part in x.split(batch):
        moments.add(part)
    return moments.statistics()


def streams() -> list[Check]:
    """The same moments in one pass, in batches, and merged from four shards."""
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 3
    whole = statistics(x, 1000)
    merged = Moments(32)
    for part in x.split([100, 1, 399, 500]):
        shard = Moments(32)
        shard.add(part)
        merged.merge(shard)
    sharded, direct = merged.statistics(), torch.cov(x.T)
    return [
        ("covariance in batches of 32", 0.0, float((statistics(x).sigma - whole.sigma).abs().max()), 1e-12),
        ("covariance merged from 4 uneven shards", 0.0, float((sharded.sigma - whole.sigma).abs().max()), 1e-12),
        ("covariance against torch.cov", 0.0, float((whole.sigma - direct).abs().max()), 1e-12),
        ("mean after a permutation", 0.0, float((statistics(x.flip(0)).mu - whole.mu).abs().max()), 1e-13),
    ]


def scores() -> list[Check]:
    """Inception scores of certain and of uniform answers."""
    classes, images = 10, 1000
    certain = InceptionScore(images, splits=1)
    logits = torch.full((images, classes), -1e4, dtype=torch.float64)
    logits[torch.arange(images), torch.arange(images) % classes] = 0
    certain.add(torch.arange(images), logits)
    uniform = InceptionScore(images, splits=10)
    uniform.add(torch.arange(images), torch.zeros(images, classes))
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    mixed = InceptionScore(2, splits=1)
    mixed.add(torch.arange(2), torch.stack([p, p.flip(0)]).log())
    known = math.exp(float((p * (p / 0.5).log()).sum()))
    return [
        ("IS of certain answers, 10 classes", 10.0, certain.result()["mean"], 1e-9),
        ("IS of uniform answers", 1.0, uniform.result()["mean"], 1e-12),
        ("IS of two mirrored answers (3/4, 1/4)", known, mixed.result()["mean"], 1e-12),
    ]


def clouds() -> list[Check]:
    """Precision, recall, density and coverage of sets built by hand."""
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    same, far = precision_recall(x, x), precision_recall(x, x + 100)
    line = precision_recall(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [3.2], [9.0]]), k=1)
    dense = density_coverage(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [3.2], [9.0]]), k=1)
    return [
        ("precision of a set against itself", 1.0, same["precision"], 0.0),
        ("recall of a set against itself", 1.0, same["recall"], 0.0),
        ("precision against a far set", 0.0, far["precision"], 0.0),
        ("recall against a far set", 0.0, far["recall"], 0.0),
        ("precision of three points on a line", 2 / 3, line["precision"], 1e-12),
        ("recall of three points on a line", 1.0, line["recall"], 0.0),
        ("density of three points on a line", 1.0, dense["density"], 1e-12),
        ("coverage of three points on a line", 1.0, dense["coverage"], 0.0),
    ]


GROUPS: tuple[Callable[[], list[Check]], ...] = (gaussians, few_samples, streams, scores, clouds)


def main() -> int:
    missed = 0
    print(f"{'formula':46} {'known':>16} {'got':>20} {'tolerance':>10}")
    for group in GROUPS:
        for name, known, got, tolerance in group():
            fine = abs(got - known) <= tolerance
            missed += not fine
            print(f"{name:46} {known:16.10g} {got:20.14g} {tolerance:10.0e}  {'ok' if fine else 'MISSED'}")
    print("all formulas give their known values" if not missed else f"{missed} formulas miss their known value")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
