"""Restartable evaluation: killed passes, shared passes, protocols as data, kernel distance, agreement with others."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import FID_CONFIG, pictures
from torch import Tensor

from eval.blocks import Job, block_size
from eval.features import Activations
from eval.fid import evaluate
from eval.kernel import kernel_distance, squared_discrepancy
from eval.measure import measure
from eval.moments import Moments, frechet_distance
from eval.presets import PRESETS, settle
from eval.sources import Images, from_npz, label_plan

COUNT, DIM = 3000, 12


class Projection:
    """A stand-in for an extractor: fixed random features of the pixels' digits, two places, three classes."""

    dim, spatial_dim, name, hash, resize, classes = DIM, 2, "projection", "p", "none", ["a", "b", "c"]

    def __init__(self, wait: float = 0.0) -> None:
        self.weight = torch.randn(12, DIM, generator=torch.Generator().manual_seed(0))
        self.wait = wait

    def __call__(self, images: Tensor) -> Activations:
        time.sleep(self.wait)
        features = (images.flatten(1).float() / 255) @ self.weight
        return Activations(features, features[:, :3] * 4, features[:, 3:5])


def drawn(count: int = COUNT, unit: int = 10) -> Images:
    """Images that are a function of their index, as a generator's are of their seeds."""

    def span(size: int, first: int, last: int):
        for start in range(first, last, size):
            index = torch.arange(start, min(start + size, last))
            values = (index.view(-1, 1) * torch.arange(3, 15) * 2654435761 >> 7) % 256
            yield values.to(torch.uint8).view(-1, 2, 2, 3)

    labels = label_plan("balanced", count, 3, 0)
    return Images("drawn", count, lambda size: span(size, 0, count), labels, "direct", span, "seed 0", unit)


def job(folder: Path, *, task: tuple[int, int] = (0, 1), wait: float = 0.0, **changes) -> Job:
    options = dict(size=100, batch_size=32, splits=10, class_accuracy=True, keep=True, task=task) | changes
    return Job(drawn(), Projection(wait), folder, about={"seed": 0}, say=lambda text: None, **options)


def bits(found) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in found.arrays().items()}


def merged(folder: Path):
    return job(folder).merge(np.zeros((COUNT, DIM), np.float32))


def test_killed_five_times_ends_with_the_same_bits(tmp_path) -> None:
    """SIGKILL at random moments of a forked process; blocks that were written stay, none is lost or doubled."""
    assert job(tmp_path / "whole").run()
    want = bits(merged(tmp_path / "whole"))
    chance, kills, started = random.Random(0), 0, 0
    while True:
        child = os.fork()
        if child == 0:
            job(tmp_path / "killed", wait=0.01).run()  # longer in all than the five waits below
            os._exit(0)
        started += 1
        if kills < 5:
            time.sleep(chance.uniform(0.05, 0.12))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            break
    assert kills == 5 and started > 5
    found = merged(tmp_path / "killed")
    assert bits(found) == want
    index = np.concatenate([np.load(p)["index"] for p in sorted((tmp_path / "killed").glob("block-*.npz"))])
    assert len(np.unique(index)) == len(index) == COUNT
    assert not [
        p for p in (tmp_path / "killed").iterdir() if p.suffix not in (".npz", ".json") and ".tmp." not in p.name
    ]


@pytest.mark.parametrize("tasks", [2, 4])
def test_shared_among_processes_gives_the_same_bits(tmp_path, tasks) -> None:
    job(tmp_path / "one").run()
    complete = [job(tmp_path / "many", task=(t, tasks)).run() for t in reversed(range(tasks))]
    assert complete == [False] * (tasks - 1) + [True], "the last one to finish sees all blocks"
    assert bits(merged(tmp_path / "many")) == bits(merged(tmp_path / "one"))


def test_blocks_equal_one_pass(tmp_path) -> None:
    job(tmp_path).run()
    found = merged(tmp_path)
    features = np.empty((COUNT, DIM), np.float32)
    whole = measure(drawn(), Projection(), batch_size=64, splits=10, class_accuracy=True, keep=features)
    np.testing.assert_array_equal(found.features, features)
    torch.testing.assert_close(found.moments.outer, whole.moments.outer, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.spatial.outer, whole.spatial.outer, rtol=1e-12, atol=0)
    assert found.score.result() == pytest.approx(whole.score.result(), rel=1e-12)
    assert found.file_order.result() == pytest.approx(whole.file_order.result(), rel=1e-12)
    assert found.hits == whole.hits and found.moments.count == COUNT


def test_parts_of_another_job_and_damaged_parts_are_refused(tmp_path) -> None:
    job(tmp_path).run()
    with pytest.raises(ValueError, match=r"batch_size was 32, now 16.*overwrite=true"):
        job(tmp_path, batch_size=16).run()
    path = job(tmp_path).path(7)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"block-00007\.npz is damaged"):
        merged(tmp_path)
    path.write_bytes(job(tmp_path).path(8).read_bytes())
    with pytest.raises(ValueError, match="other images than 700 onwards"):
        merged(tmp_path)
    one = job(tmp_path)  # of the same images, whose files' sizes an earlier version left out
    one.about["source"] = "seed 0 files:abc"
    one.run()
    one.about["source"] = "seed 1 files:abc"
    with pytest.raises(ValueError, match="source was seed 0, now seed 1 files:abc"):
        one.run()


def test_block_sizes_are_whole_chunks() -> None:
    assert block_size(50_000, 64) == 1600 and block_size(1000, 64) == 1024 and block_size(9, 4, 3) == 4
    with pytest.raises(ValueError, match="block=0"):
        block_size(9, 4, 0)


def test_spans_of_files_are_those_images(tmp_path) -> None:
    images = pictures(23, 8)
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "s.npz", arr_0=images)
        found = torch.cat(list(from_npz(tmp_path / "s.npz").part(4, 5, 18)))
        np.testing.assert_array_equal(found, images[5:18])
    bare = Images("x", 23, lambda size: iter(torch.from_numpy(images).split(size)), None, "npz")
    np.testing.assert_array_equal(torch.cat(list(bare.part(4, 5, 18))), images[5:18])


def test_the_command_goes_on_and_cleans_up(tmp_path, capsys) -> None:
    """Two tasks of the command: the first waits, the second writes; the number is that of one process, bit for bit."""
    np.savez(tmp_path / "a.npz", arr_0=pictures(60, 32, 1))
    np.savez(tmp_path / "b.npz", arr_0=pictures(60, 32, 2) // 2)
    config = FID_CONFIG | {
        "samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "b.npz"), "block": 16, "kid": True,
    }  # fmt: skip
    whole = evaluate(config | {"out": str(tmp_path / "whole.json")})
    shared = config | {"out": str(tmp_path / "shared.json"), "num_tasks": 2}
    assert evaluate(shared | {"task_id": 0}) is None and (tmp_path / "shared.parts").is_dir()
    assert "task 0 of 2 has done its share" in capsys.readouterr().out
    found = evaluate(shared | {"task_id": 1})
    assert found["metrics"] == whole["metrics"] and found["protocol"] == whole["protocol"]
    assert json.loads((tmp_path / "shared.json").read_text())["metrics"] == found["metrics"]
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.features"))
    assert {"kid[cifar]", "kid_std[cifar]"} <= set(found["metrics"])
    with pytest.raises(ValueError, match="overwrite=true would drop"):
        evaluate(shared | {"task_id": 1, "overwrite": True})


# --- protocols -------------------------------------------------------------------------------------------------------


def test_presets_fill_and_refuse(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VTOK_WEIGHTS", str(tmp_path))
    for name, preset in PRESETS.items():
        with pytest.raises(ValueError) as caught:
            settle({"protocol": name})
        for part in (preset.reference.name, preset.reference.size, "VTOK_WEIGHTS", "reference=FILE"):
            assert part in str(caught.value)
        (tmp_path / preset.reference.name).touch()
        filled = settle({"protocol": name, "extractor": None, "images": None})
        assert filled["images"] == 50_000 and filled["labels"] == "balanced" and filled["extractor"] == "inception"
        assert Path(filled["reference"]).name == preset.reference.name
        with pytest.raises(ValueError, match="fixes images=50000, got images=100"):
            settle({"protocol": name, "images": 100})
    assert (
        settle({"protocol": "adm"})["order"] == "file" and settle({"protocol": "torch_fidelity"})["manifold"] is False
    )
    with pytest.raises(ValueError, match="choose custom, adm"):
        settle({"protocol": "mine"})
    with pytest.raises(ValueError, match="reference is not given"):
        settle({})
    assert settle({"reference": "x"})["splits"] == 10


def test_order_of_the_score_is_that_of_adm() -> None:
    """Class by class, consecutive splits hold one class each: file order scores far below the permuted one."""
    from eval.moments import InceptionScore

    logits = torch.eye(10).repeat_interleave(50, 0) * 20.0
    scores = []
    for seed in (None, 2020):
        score = InceptionScore(500, splits=10, seed=seed)
        score.add(torch.arange(500), logits)
        scores.append(score.result()["mean"])
    split = torch.softmax(logits.double(), 1).view(10, 50, 10)  # ADM's evaluator: consecutive splits of the file
    by_hand = (split * (split / split.mean(1, keepdim=True)).log()).sum(2).mean(1).exp().mean()
    assert scores[0] == pytest.approx(float(by_hand), rel=1e-9) and scores[1] > 5 * scores[0]


# --- against other implementations ------------------------------------------------------------------------------------


def features(count: int, seed: int, shift: float = 0.0, dim: int = 24) -> Tensor:
    drawer = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=drawer, dtype=torch.float64).relu() + shift


def statistics(x: Tensor):
    found = Moments(x.shape[1])
    found.add(x)
    return found.statistics()


def test_frechet_distance_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    x, y = features(4096, 0), features(4096, 1, 0.2)
    a, b = statistics(x), statistics(y)
    theirs = fid._compute_fid(a.mu, torch.cov(x.T), b.mu, torch.cov(y.T))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-6)


def test_frechet_distance_equals_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed: its 1.18 broke sqrtm(disp=)")
    x, y = features(4096, 2), features(4096, 3, 0.1)
    a, b = statistics(x), statistics(y)
    root = np.trace(linalg.sqrtm((a.sigma @ b.sigma).numpy()).real)
    want = float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    from eval.manifold import precision_recall

    real, made = features(400, 4).float(), features(300, 5, 0.15).float()
    theirs = calculate_precision_recall_full(made, real, 3)
    ours = precision_recall(real, made)
    assert ours["precision"] == pytest.approx(theirs[0], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs[1], abs=1e-6)


def test_kernel_distance_by_brute_force_and_torch_fidelity() -> None:
    x, y = features(9, 6, dim=5), features(7, 7, 0.3, dim=5)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    same = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    want = same[0] + same[1] - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert float(squared_discrepancy(x, y)) == pytest.approx(want, rel=1e-12)
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(300, 8), features(300, 9, 0.1)
    theirs = kid_features_to_metric(a, b, kid_subsets=50, kid_subset_size=300, verbose=False)
    ours = kernel_distance(a, b, subsets=3, size=300)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert kernel_distance(a, features(300, 8))["kid"] < ours["kid"]


def test_adm_from_start_to_finish(tmp_path, monkeypatch) -> None:
    """A file like OpenAI's: statistics of all, of features with places too, and some of the images."""
    from dataclasses import replace

    from eval import presets
    from eval.manifold import precision_recall

    monkeypatch.setattr(presets, "PRESETS", {"adm": replace(PRESETS["adm"], images=60)})
    extractor = Projection()
    monkeypatch.setattr("eval.fid.make_extractor", lambda *_, **__: extractor)
    real, made = pictures(200, 2, 1), pictures(60, 2, 2) // 2
    seen, ours = (extractor(torch.from_numpy(side)) for side in (real, made))
    sides = [statistics(x.double()) for x in (seen.features, seen.spatial, ours.features, ours.spatial)]
    file = tmp_path / presets.VIRTUAL.name
    a, b = sides[:2]
    np.savez(file, arr_0=real[:50], mu=a.mu, sigma=a.sigma, mu_s=b.mu, sigma_s=b.sigma)
    np.savez(tmp_path / "made.npz", arr_0=made)
    free = dict.fromkeys(("labels", "splits", "permutation", "manifold", "extractor"))
    config = FID_CONFIG | free | {"samples": str(tmp_path / "made.npz"), "reference": str(tmp_path), "protocol": "adm"}
    result = evaluate(config)
    found = result["metrics"]
    assert found["FD[projection]"] == pytest.approx(frechet_distance(sides[2], a), rel=1e-9)
    assert found["sFD[projection]"] == pytest.approx(frechet_distance(sides[3], b), rel=1e-9)
    for name, value in precision_recall(seen.features[:50], ours.features).items():
        assert found[f"{name}[projection]"] == pytest.approx(value, abs=1e-12)
    assert found["manifold_images"] == {"real": 50, "generated": 60}
    assert "permuted" in found["IS[projection]"] and result["protocol"]["score_order"] == "file"
    assert result["protocol"]["name"] == "adm" and any("60 images" in r for r in result["not_comparable_because"])


def test_a_pass_shared_by_training_processes(monkeypatch) -> None:
    """Ranks look at whole chunks without overlap, and the gathered sums are those of one process."""
    from types import SimpleNamespace

    from eval import callbacks

    images, extractor = drawn(205, unit=10), Projection()
    whole = callbacks.share(images, extractor, SimpleNamespace(world_size=1, global_rank=0), splits=5)
    sent: list[dict] = []
    monkeypatch.setattr(callbacks.dist, "all_gather_object", lambda parts, own: sent.append(own))
    for rank in range(4):
        callbacks_trainer = SimpleNamespace(world_size=4, global_rank=rank)
        with pytest.raises(TypeError):  # nothing was gathered yet
            callbacks.share(images, extractor, callbacks_trainer, splits=5)
    assert sum(int(part["moments_count"]) for part in sent) == 205
    monkeypatch.setattr(callbacks.dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), sent))
    found = callbacks.share(images, extractor, SimpleNamespace(world_size=4, global_rank=2), splits=5)
    torch.testing.assert_close(found.moments.outer, whole.moments.outer, rtol=1e-12, atol=0)
    assert found.score.result() == pytest.approx(whole.score.result(), rel=1e-12)
