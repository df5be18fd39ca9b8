"""Precision, recall, density and coverage: constructed sets, brute force, and independence of the block size."""

import pytest
import torch

from eval import manifold
from eval.manifold import density_coverage, inside, precision_recall, radii


def brute(real, generated, k):
    """The definitions, one pair at a time."""

    def ball(points, i):
        return sorted(float((points[i] - points[j]).square().sum()) for j in range(len(points)) if j != i)[k - 1]

    def contained(point, points):
        return sum(float((point - points[i]).square().sum()) <= ball(points, i) for i in range(len(points)))

    precision = sum(contained(x, real) > 0 for x in generated) / len(generated)
    recall = sum(contained(x, generated) > 0 for x in real) / len(real)
    density = sum(contained(x, real) for x in generated) / len(generated) / k
    coverage = sum(
        any(float((x - real[i]).square().sum()) <= ball(real, i) for x in generated) for i in range(len(real))
    ) / len(real)
    return precision, recall, density, coverage


def test_equal_the_definitions_by_brute_force_in_any_block_size(monkeypatch):
    torch.manual_seed(0)
    real, generated = torch.randn(23, 4, dtype=torch.float64), 0.7 * torch.randn(31, 4, dtype=torch.float64) + 0.6
    for block in (4096, 7, 5):
        monkeypatch.setattr(manifold, "BLOCK", block)
        for k in (1, 3, 5):
            got = precision_recall(real, generated, k=k) | density_coverage(real, generated, k=k)
            assert tuple(got.values()) == pytest.approx(brute(real, generated, k), abs=1e-12)


def test_a_set_against_itself_and_against_a_far_one():
    real = torch.randn(50, 3)
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}
    assert density_coverage(real, real)["coverage"] == 1.0
    far = real + 1000.0
    assert precision_recall(real, far) == {"precision": 0.0, "recall": 0.0}
    assert density_coverage(real, far) == {"density": 0.0, "coverage": 0.0}


def test_six_points_on_a_line():
    """real 0, 1, 3; generated 0.5, 3.2, 9: with k = 1 the real radii are 1, 1, 2, the generated ones 2.7, 2.7, 5.8."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [3.2], [9.0]])
    assert radii(real, 1).tolist() == [1.0, 1.0, 4.0]
    got = precision_recall(real, generated, k=1)
    assert got["precision"] == pytest.approx(2 / 3) and got["recall"] == 1.0
    # 0.5 lies in the balls of 0 and 1 only (3 - 0.5 > 2), 3.2 in that of 3: density (2 + 1 + 0) / 3, all real covered
    assert density_coverage(real, generated, k=1) == {"density": 1.0, "coverage": 1.0}


def test_borders_belong_to_a_ball_and_duplicates_are_neighbours():
    count, holds = inside(torch.tensor([[2.0]]), torch.tensor([[0.0], [5.0]]), torch.tensor([4.0, 8.9]))
    assert count.tolist() == [1] and holds.tolist() == [True, False]
    assert radii(torch.tensor([[0.0], [0.0], [1.0]]), 1).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="neighbours"):
        radii(torch.randn(3, 2), 3)
