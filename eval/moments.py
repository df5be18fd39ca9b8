"""Streaming float64 moments of features, the Frechet distance between two sets of them, and the Inception score.

Frechet distance: Heusel et al. 2017, arXiv 1706.08500, equation 6. Its trace term tr (S1 S2)^(1/2) is computed as the
nuclear norm of A^T B with S1 = A A^T and S2 = B B^T, which holds also for fewer samples than dimensions, where the
usual eigenvalues of S1 S2 and matrix square roots are off by 1e-4. Inception score: Salimans et al. 2016, arXiv
1606.03498, from log-softmax in float64, after a fixed permutation (in file order it depends on how classes are sorted).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class Statistics:
    """mu [d] and sigma [d, d] (unbiased), float64 on the CPU; n samples; about: what made them (feature, hash ...).

    n is None for foreign files that do not say it. spatial: the same of the features with places (mu_s, sigma_s).
    """

    mu: Tensor
    sigma: Tensor
    n: int | None
    about: dict[str, str] = field(default_factory=dict)
    spatial: Statistics | None = None

    def save(self, path: str | Path) -> None:
        """Write an npz with mu, sigma, n and one string array per entry of `about`."""
        from vtok.checkpoint import write_atomic

        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy(), "n": np.array(-1 if self.n is None else self.n)}
        arrays |= {key: np.array(value) for key, value in self.about.items()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu.numpy(), "sigma_s": self.spatial.sigma.numpy()}
        write_atomic(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Ours, ADM's reference files or MAR's statistics: anything with mu and sigma. ValueError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name not in ("arr_0", "arr_1")}
        except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as npz ({error})") from None
        missing = {"mu", "sigma"} - set(arrays)
        if missing:
            raise ValueError(f"{path} holds no {', '.join(sorted(missing))}: it is not a file of statistics")
        mu, sigma = (torch.from_numpy(np.asarray(arrays[k], dtype=np.float64)) for k in ("mu", "sigma"))
        n = int(arrays.get("n", -1))
        about = {k: str(v) for k, v in arrays.items() if v.dtype.kind == "U"}
        _check(path, mu, sigma)
        spatial = None
        if {"mu_s", "sigma_s"} <= set(arrays):
            places = [torch.from_numpy(np.asarray(arrays[k], dtype=np.float64)) for k in ("mu_s", "sigma_s")]
            _check(path, *places)
            spatial = cls(*places, None if n < 0 else n)
        return cls(mu, sigma, None if n < 0 else n, about, spatial)


def _check(path: str | Path, mu: Tensor, sigma: Tensor) -> None:
    if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: mu is {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, expected [d] and [d, d]")


class Moments:
    """Count, sum and sum of outer products of feature vectors, in float64 on `device`. Merging is associative."""

    def __init__(self, dim: int, *, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """features [B, d] of any float dtype."""
        x = features.detach().to(self.total)
        if x.dim() != 2 or x.shape[1] != len(self.total):
            raise ValueError(f"features are {tuple(x.shape)}, expected [B, {len(self.total)}]")
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def merge(self, other: Moments) -> None:
        """Take in the samples that `other` has seen."""
        self.count += other.count
        self.total += other.total.to(self.total)
        self.outer += other.outer.to(self.outer)

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """What `restore` takes, bit for bit."""
        return {
            f"{prefix}count": np.array(self.count),
            f"{prefix}total": self.total.cpu().numpy(),
            f"{prefix}outer": self.outer.cpu().numpy(),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Moments:
        found = cls(len(arrays[f"{prefix}total"]))
        found.count = int(arrays[f"{prefix}count"])
        found.total, found.outer = (torch.from_numpy(arrays[f"{prefix}{k}"]) for k in ("total", "outer"))
        return found

    def statistics(self, **about: str) -> Statistics:
        """Mean and unbiased covariance. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return Statistics(mu.cpu(), ((sigma + sigma.T) / 2).cpu(), self.count, about)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)."""
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics of {len(a.mu)} and {len(b.mu)} features: they come from different extractors")
    nuclear = torch.linalg.svdvals(square_root(a.sigma).T @ square_root(b.sigma)).sum()
    difference = a.mu - b.mu
    return float(difference @ difference + a.sigma.trace() + b.sigma.trace() - 2 * nuclear)


def square_root(sigma: Tensor) -> Tensor:
    """A [d, r] with sigma = A A^T, r the numerical rank.

    Eigenvalues below rounding are dropped: their square roots would be 1e-8 where they should be 0, and with fewer
    samples than dimensions there are many of them.
    """
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


class InceptionScore:
    """Streaming Inception score over N images: one accumulator per split, filled by image index in any order.

    The image at place j of the fixed permutation `RandomState(seed).permutation(N)` belongs to the split that holds j,
    as in torch-fidelity (its default: 10 splits, seed 2020). seed None: in file order, as ADM's evaluator has it.
    """

    def __init__(self, images: int, *, splits: int = 10, seed: int | None = 2020) -> None:
        if not 1 <= splits <= images:
            raise ValueError(f"splits={splits} does not fit {images} images: choose 1..{images}")
        place = np.arange(images)
        bounds = np.array([i * images // splits for i in range(1, splits)], dtype=np.int64)
        split = np.empty(images, dtype=np.int64)
        order = place if seed is None else np.random.RandomState(seed).permutation(images)
        split[order] = np.searchsorted(bounds, place, side="right")
        self.split = torch.from_numpy(split)
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.negentropy = torch.zeros(splits, dtype=torch.float64)  # sum over images of sum_c p log p
        self.marginal: Tensor | None = None  # [splits, classes], sum over images of p

    def add(self, index: Tensor, logits: Tensor) -> None:
        """index int64 [B] in 0..N-1, each image once; logits [B, classes]."""
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        if self.marginal is None:
            self.marginal = torch.zeros(len(self.count), p.shape[1], dtype=torch.float64)
        split = self.split[index.cpu()]
        self.count.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self.negentropy.index_add_(0, split, torch.where(p > 0, p * log_p, 0.0).sum(1))
        self.marginal.index_add_(0, split, p)

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """What `take` adds, bit for bit."""
        parts = {"count": self.count, "negentropy": self.negentropy, "marginal": self.marginal}
        return {f"{prefix}{k}": v.numpy() for k, v in parts.items() if v is not None}

    def take(self, arrays: Mapping[str, np.ndarray], prefix: str = "") -> None:
        """Add the sums of other images of the same set."""
        count, negentropy, marginal = (
            torch.from_numpy(arrays[f"{prefix}{k}"]) for k in ("count", "negentropy", "marginal")
        )
        self.count += count
        self.negentropy += negentropy
        self.marginal = marginal.clone() if self.marginal is None else self.marginal + marginal

    def result(self) -> dict[str, float]:
        """mean and std over the splits, and the value of all images as one split."""
        if self.marginal is None or int(self.count.sum()) != len(self.split):
            raise ValueError(f"the score needs all {len(self.split)} images, got {int(self.count.sum())}")
        scores = _score(self.count, self.negentropy, self.marginal)
        one = _score(self.count.sum(0, True), self.negentropy.sum(0, True), self.marginal.sum(0, True))
        return {"mean": float(scores.mean()), "std": float(scores.std(correction=0)), "one_split": float(one)}


def _score(count: Tensor, negentropy: Tensor, marginal: Tensor) -> Tensor:
    """exp(mean_i KL(p_i | mean p)) = exp(mean_i sum p log p - sum_c pbar log pbar), per row."""
    average = marginal / count.unsqueeze(1)
    return (negentropy / count - torch.special.xlogy(average, average).sum(1)).exp()
