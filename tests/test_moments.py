"""Frechet distance and Inception score against closed forms and against torch-fidelity's algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.moments import InceptionScore, Moments, Statistics, frechet_distance, square_root


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def statistics(x: Tensor) -> Statistics:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments.statistics()


def exact(mu: Tensor, sigma: Tensor) -> Statistics:
    return Statistics(mu, sigma, None)


# --- moments ---------------------------------------------------------------------------------------------------------


def test_moments_equal_numpy() -> None:
    x = features(500, 12, 0, shift=3.0)
    found = statistics(x)
    np.testing.assert_allclose(found.mu, x.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-12)
    assert found.n == 500


def test_merging_uneven_shards_equals_one_pass() -> None:
    x = features(701, 9, 1)
    whole, merged = statistics(x), Moments(9)
    for part in x.split([1, 2, 3, 95, 100, 200, 300]):
        shard = Moments(9)
        shard.add(part)
        merged.merge(shard)
    assert merged.count == 701
    torch.testing.assert_close(merged.statistics().sigma, whole.sigma, rtol=0, atol=4e-14)
    torch.testing.assert_close(merged.statistics().mu, whole.mu, rtol=0, atol=4e-14)


def test_float32_features_are_summed_in_float64() -> None:
    x = (features(4096, 6, 2) + 1000).float()
    np.testing.assert_allclose(statistics(x).sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-7)


def test_statistics_file_round_trip(tmp_path) -> None:
    found = statistics(features(50, 5, 3))
    found.about = {"feature": "cifar", "hash": "abc"}
    found.save(tmp_path / "s.npz")
    back = Statistics.load(tmp_path / "s.npz")
    assert torch.equal(back.mu, found.mu) and torch.equal(back.sigma, found.sigma)
    assert back.n == 50 and back.about == found.about and back.spatial is None
    found.spatial = statistics(features(50, 3, 4))
    found.save(tmp_path / "s.npz")
    back = Statistics.load(tmp_path / "s.npz")
    assert torch.equal(back.spatial.mu, found.spatial.mu) and torch.equal(back.spatial.sigma, found.spatial.sigma)


def test_foreign_statistics_of_float32_without_count(tmp_path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), mu_s=np.zeros(2))
    back = Statistics.load(tmp_path / "adm.npz")
    assert back.n is None and back.mu.dtype == torch.float64


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_broken_statistics_are_named(tmp_path, content: bytes) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.npz"):
        Statistics.load(tmp_path / "s.npz")


def test_pickled_statistics_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError):
        Statistics.load(tmp_path / "s.npz")


def test_a_covariance_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="two images"):
        statistics(features(1, 3, 0))


# --- Frechet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_scaled_gaussians(dim: int) -> None:
    """N(m, s^2 I) against N(0, I): |m|^2 + d (1 - s)^2."""
    m, s = torch.linspace(-1, 2, dim, dtype=torch.float64), 1.7
    one = torch.eye(dim, dtype=torch.float64)
    value = frechet_distance(exact(m, s**2 * one), exact(torch.zeros_like(m), one))
    assert value == pytest.approx(float(m @ m) + dim * (1 - s) ** 2, abs=1e-10)


def test_commuting_diagonal_covariances() -> None:
    a = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    b = torch.linspace(2, 0.01, 20, dtype=torch.float64)
    zero = torch.zeros(20, dtype=torch.float64)
    value = frechet_distance(exact(zero, a.diag()), exact(zero, b.diag()))
    assert value == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-10)


def test_rank_deficient_covariances_in_crossed_planes() -> None:
    """Supports that meet in one direction only: the trace term is sqrt(2 * 3) of that direction."""
    zero = torch.zeros(5, dtype=torch.float64)
    a, b = (torch.tensor(v, dtype=torch.float64).diag() for v in ([1, 2, 0, 0, 0], [0, 3, 4, 0, 0]))
    assert frechet_distance(exact(zero, a), exact(zero, b)) == pytest.approx(3 + 7 - 2 * math.sqrt(6), abs=1e-12)


def test_full_width_with_a_hundred_samples_against_the_gram_matrix() -> None:
    """2048 features, 100 samples: the nuclear norm of the N x N cross-Gram matrix is exact."""
    x = features(100, 2048, 4).float().double()
    y = (features(100, 2048, 5, shift=0.1) * 1.3).float().double()
    a, b = (z - z.mean(0) for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum() / 99
    difference = x.mean(0) - y.mean(0)
    want = difference @ difference + a.square().sum() / 99 + b.square().sum() / 99 - 2 * cross
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(want), rel=1e-10)


def test_invariances() -> None:
    x, y = features(300, 24, 6), features(200, 24, 7, shift=0.3)
    want = frechet_distance(statistics(x), statistics(y))
    rotation = torch.linalg.qr(features(24, 24, 8))[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(statistics(y), statistics(x)) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(statistics(x @ rotation), statistics(y @ rotation)) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(statistics(x[:, order]), statistics(y[:, order])) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(statistics(x.flip(0)), statistics(y)) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-10)


def test_agrees_with_torch_fidelity_above_the_dimension() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(4096, 48, 9), features(4096, 48, 10, shift=0.2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    value = frechet_distance(statistics(x), statistics(y))
    assert value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_square_root_drops_what_is_rounding() -> None:
    x = features(10, 40, 11)
    root = square_root(statistics(x).sigma)
    assert root.shape[1] == 9  # ten samples span nine directions around their mean
    torch.testing.assert_close(root @ root.T, statistics(x).sigma, rtol=0, atol=1e-12)


def test_other_extractors_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different extractors"):
        frechet_distance(statistics(features(9, 3, 0)), statistics(features(9, 4, 0)))


# --- Inception score -------------------------------------------------------------------------------------------------


def score(logits: Tensor, splits: int, order: Tensor | None = None, seed: int = 2020) -> dict[str, float]:
    order = torch.arange(len(logits)) if order is None else order
    found = InceptionScore(len(logits), splits=splits, seed=seed)
    for index in order.split(37):
        found.add(index, logits[index])
    return found.result()


def test_one_hot_uniform_classes_score_their_number() -> None:
    logits = torch.eye(10).repeat(30, 1) * 1e4
    assert score(logits, 1)["mean"] == pytest.approx(10, abs=1e-12)


def test_constant_rows_score_one() -> None:
    logits = torch.tensor([[0.3, -2.0, 5.0]]).repeat(100, 1)
    assert score(logits, 10)["mean"] == pytest.approx(1, abs=1e-12)
    assert score(logits, 10)["std"] == pytest.approx(0, abs=1e-12)


def test_score_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features(1003, 17, 12).float() * 3  # ten uneven splits
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    ours = score(logits, 10)
    assert ours["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    whole = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert ours["one_split"] == pytest.approx(whole["inception_score_mean"], rel=1e-12)


def test_score_does_not_depend_on_the_order_of_arrival() -> None:
    logits = features(500, 9, 13)
    mixed = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert score(logits, 10, mixed)["mean"] == pytest.approx(score(logits, 10)["mean"], rel=1e-12)


def test_an_incomplete_score_is_refused() -> None:
    found = InceptionScore(10, splits=2)
    found.add(torch.arange(9), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="all 10 images, got 9"):
        found.result()
    with pytest.raises(ValueError, match="splits=11"):
        InceptionScore(10, splits=11)
