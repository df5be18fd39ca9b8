"""Our numbers against other implementations on the same features: scipy, torchmetrics, and OpenAI's formulas in NumPy;
and the time and memory that they take.

`Adm` states what OpenAI's evaluator computes (Dhariwal and Nichol 2021, arXiv 2105.05233) from activations, by means
that eval/ does not use: np.cov, scipy's square root of a matrix, all pairs of differences, np.partition.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import FID_CONFIG, pictures
from torch import Tensor, nn

from eval import presets
from eval.features import Activations, CifarJudge
from eval.fid import evaluate
from eval.manifold import precision_recall
from eval.moments import InceptionScore, Moments, frechet_distance
from eval.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def statistics(x: Tensor):
    found = Moments(x.shape[1])
    for part in x.split(500):
        found.add(part)
    return found.statistics()


class Random(nn.Module):
    """Fixed random features of uint8 images [B, 3, H, W], float64. torchmetrics asks for num_features."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.num_features = dim
        drawer = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * side * side, dim, generator=drawer, dtype=torch.float64) / 4)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).double() / 127.5 - 1) @ self.weight


class Adm:
    """Metrics of activations as OpenAI's evaluator defines them."""

    @staticmethod
    def frechet(x: np.ndarray, y: np.ndarray) -> float:
        """FID of pool features, sFID of features with places."""
        linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed (extra dev)")
        (mu, sigma), (other, cov) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
        root = linalg.sqrtm(sigma @ cov)
        assert np.isfinite(root).all() and np.abs(np.diagonal(np.imag(root))).max() < 1e-3
        return float(((mu - other) ** 2).sum() + np.trace(sigma) + np.trace(cov) - 2 * np.trace(np.real(root)))

    @staticmethod
    def distances(x: np.ndarray, y: np.ndarray, dtype: type) -> np.ndarray:
        """Squared distances [n, m], rounded to `dtype`."""
        return ((x[:, None, :].astype(np.float64) - y[None]) ** 2).sum(2).astype(dtype)

    @classmethod
    def precision_recall(cls, real: np.ndarray, made: np.ndarray, dtype: type, k: int = 3) -> tuple[float, float]:
        """Share of `made` inside a ball around a real row, and the other way round; radius: k-th other row."""
        radii = [np.partition(cls.distances(z, z, dtype), k, axis=1)[:, k] for z in (real, made)]
        across = cls.distances(made, real, dtype)
        precision = (across <= radii[0][None]).any(1).mean()
        return float(precision), float((across <= radii[1][:, None]).any(0).mean())

    @staticmethod
    def inception_score(logits: np.ndarray, splits: int) -> float:
        """Mean over consecutive splits of the file."""
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        parts = np.array_split(p, splits)
        return float(np.mean([np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]))


# --- scipy and torchmetrics ------------------------------------------------------------------------------------------


def test_distance_equals_torchmetrics_from_images_on() -> None:
    """Both are given the pictures and one extractor; 4,096 of them, in uneven batches."""
    image = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed (extra dev)")
    side, extractor = 6, Random(32, 6)
    real, made = pictures(4096, side, 1), pictures(4500, side, 2) // 2 + 40
    metric = image.FrechetInceptionDistance(feature=extractor, input_img_size=(3, side, side)).set_dtype(torch.float64)
    ours = [Moments(32), Moments(32)]
    for moments, images, is_real in zip(ours, (real, made), (True, False)):
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(700):
            metric.update(part, real=is_real)
            moments.add(extractor(part))
    want = float(metric.compute())
    assert want > 1 and frechet_distance(*(m.statistics() for m in ours)) == pytest.approx(want, rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torchmetrics: its buffer, the spread of one split
def test_inception_score_equals_torchmetrics_as_one_split() -> None:
    scores = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics is not installed (extra dev)")
    extractor = Random(9, 6)
    metric = scores.InceptionScore(feature=extractor, splits=1)
    ours = InceptionScore(300, splits=1)
    images = torch.from_numpy(pictures(300, 6, 3)).permute(0, 3, 1, 2)
    metric.update(images)
    ours.add(torch.arange(300), extractor(images))
    want, _ = metric.compute()
    assert want > 1.2 and ours.result()["mean"] == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("dim", [32, 256])
def test_distance_equals_scipy(dim: int) -> None:
    drawer = torch.Generator().manual_seed(dim)
    mix = torch.randn(dim, dim, generator=drawer, dtype=torch.float64) / dim**0.5
    x, y = (torch.randn(n, dim, generator=drawer, dtype=torch.float64).relu() @ mix for n in (4096, 5000))
    y = 1.2 * y + 0.1
    found = frechet_distance(statistics(x), statistics(y))
    assert found == pytest.approx(Adm.frechet(x.numpy(), y.numpy()), rel=1e-6)


def test_fewer_images_than_features_against_the_cross_gram() -> None:
    """90 and 140 images in 512 dimensions: tr (S1 S2)^(1/2) is the nuclear norm of Xc Yc^T / sqrt((n-1)(m-1))."""
    drawer = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n, 512, generator=drawer, dtype=torch.float64).relu() + s for n, s in ((90, 0.0), (140, 0.05)))
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    nuclear = torch.linalg.svdvals(a @ b.T).sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * nuclear
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(want), rel=1e-10)


# --- OpenAI's formulas ------------------------------------------------------------------------------------------------


class Recorded:
    """An extractor whose activations are kept, so that both sides compute from the same ones."""

    dim, spatial_dim, name, hash, resize, classes = 24, 4 * 3, "recorded", "r", "none", None

    def __init__(self) -> None:
        drawer = torch.Generator().manual_seed(5)
        self.weight = torch.randn(48, 24, generator=drawer) / 4
        self.head = torch.randn(24, 7, generator=drawer)

    def __call__(self, images: Tensor) -> Activations:
        pixels = images.flatten(1).float() / 255
        features = (pixels @ self.weight).relu() + pixels[:, :24]
        places = images[:, ::2, ::2].float().flatten(1) / 99  # [B, 2, 2, 3], place after place as in TensorFlow
        return Activations(features, features @ self.head, places)


def test_the_adm_protocol_gives_openais_numbers(tmp_path, monkeypatch) -> None:
    """The command on files like theirs against their formulas on the same activations: FID, sFID, IS, both shares."""
    images = 400
    monkeypatch.setattr(presets, "PRESETS", {"adm": replace(PRESETS["adm"], images=images)})
    extractor = Recorded()
    monkeypatch.setattr("eval.fid.make_extractor", lambda *_, **__: extractor)
    real, made = pictures(600, 4, 1), (pictures(images, 4, 2) * 0.97).astype(np.uint8) + 3
    seen, ours = (extractor(torch.from_numpy(side)) for side in (real, made))
    inside = 150  # their file holds statistics of the training set and only some of its images
    sums = {"mu": seen.features, "mu_s": seen.spatial}
    sums = {k: v.double().numpy() for k, v in sums.items()}
    covariances = {k.replace("mu", "sigma"): np.cov(v, rowvar=False) for k, v in sums.items()}
    reference = tmp_path / presets.VIRTUAL.name
    np.savez(reference, arr_0=real[:inside], **{k: v.mean(0) for k, v in sums.items()}, **covariances)
    np.savez(tmp_path / "made.npz", arr_0=made)
    free = dict.fromkeys(("labels", "splits", "permutation", "manifold", "extractor"))
    config = FID_CONFIG | free | {"samples": str(tmp_path / "made.npz"), "reference": str(tmp_path), "protocol": "adm"}
    found = evaluate(config)["metrics"]
    theirs = [x.double().numpy() for x in (ours.features, ours.spatial, ours.logits)]
    assert found["FD[recorded]"] == pytest.approx(Adm.frechet(theirs[0], sums["mu"]), rel=1e-6)
    assert found["sFD[recorded]"] == pytest.approx(Adm.frechet(theirs[1], sums["mu_s"]), rel=1e-6)
    assert found["IS[recorded]"]["mean"] == pytest.approx(Adm.inception_score(theirs[2], 10), rel=1e-9)
    want = Adm.precision_recall(sums["mu"][:inside], theirs[0], np.float64)
    assert (found["precision[recorded]"], found["recall[recorded]"]) == pytest.approx(want, abs=1e-12)
    assert all(0.05 < share < 0.95 for share in want), "shares at the ends would show nothing"


def test_float16_distances_of_openais_script_move_ties_only() -> None:
    """Their script rounds distances to float16; ours does not. On the same activations few points change sides."""
    drawer = torch.Generator().manual_seed(6)
    real, made = (torch.randn(n, 16, generator=drawer) * s + t for n, s, t in ((300, 1.0, 0.0), (400, 0.9, 0.35)))
    ours = tuple(precision_recall(real, made).values())
    exact, rounded = (Adm.precision_recall(real.numpy(), made.numpy(), d) for d in (np.float64, np.float16))
    assert ours == pytest.approx(exact, abs=1e-12) and ours == pytest.approx(rounded, abs=0.02)
    assert all(0.05 < share < 0.95 for share in exact)


# --- cost -------------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], times: int) -> float:
    """Processor time of a call, in all threads; other processes do not count."""
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def test_sums_and_distance_cost_little_beside_the_extractor() -> None:
    """50,000 images: the sums of the judge's features, both scores and one distance take under 5 % of its time."""
    judge, batches = CifarJudge(), 50_000 // 64
    images = torch.from_numpy(pictures(64, 32, 5))
    found, index = judge(images), torch.arange(64)
    moments, scores = Moments(judge.dim), [InceptionScore(50_000, seed=seed) for seed in (None, 2020)]

    def add() -> None:
        moments.add(found.features)
        for score in scores:
            score.add(index, found.logits)

    sums, network = seconds(add, 50), seconds(lambda: judge(images), 2)
    reference = statistics(torch.randn(4096, judge.dim, generator=torch.Generator().manual_seed(0)))
    distance = seconds(lambda: frechet_distance(reference, reference), 2)
    assert sums * batches + distance < 0.05 * network * batches


MEMORY = """
import resource, sys, tempfile
import torch
from eval.blocks import Job
from eval.features import Activations
from eval.moments import frechet_distance
from eval.sources import Images

class Cheap:
    dim, spatial_dim, name, hash, resize, classes = 384, 96, "cheap", "c", "none", None
    def __call__(self, images):
        features = images.flatten(1)[:, :384].float() / 255
        return Activations(features, features[:, :100] * 4, features[:, 200:296])

base = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)

def images(count):
    def span(size, first, last):
        for start in range(first, last, size):
            index = torch.arange(start, min(start + size, last), dtype=torch.int32).view(-1, 1, 1, 1)
            yield (base * (index % 251 + 1) % 256).to(torch.uint8)
    return Images("made", count, lambda size: span(size, 0, count), None, "direct", span, str(count), 1)

for count in (1000, 50_000):
    with tempfile.TemporaryDirectory() as folder:
        job = Job(images(count), Cheap(), folder, about={}, splits=10, say=lambda text: None)
        assert job.run()
        found = job.merge()
    assert found.images == found.moments.count == found.spatial.count == count
    for moments in (found.moments, found.spatial):
        assert abs(frechet_distance(moments.statistics(), moments.statistics())) < 1e-6
    assert found.score.result()["mean"] >= 1 and found.file_order.result()["mean"] >= 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """FID, sFID and IS of 1,000 and of 50,000 images: the peak grows by less than 100 MB. Kept pictures would be 147 MB
    more and kept features 73 MB."""
    run = [sys.executable, "-c", MEMORY]
    done = subprocess.run(run, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = (float(line) for line in done.stdout.split())  # MB, of a process that did both in this order
    assert large - small < 100, f"{small:.0f} MB after 1,000 images, {large:.0f} MB after 50,000"
