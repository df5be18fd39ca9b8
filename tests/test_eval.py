"""The evaluation commands: extractors and names, sources, protocol, pixels, neighbours, likelihood."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval import likelihood, neighbours
from eval.features import INCEPTION_FILE, Activations, CifarJudge, Inception, make_extractor
from eval.fid import evaluate
from eval.judge import Judge, load_judge, save_judge
from eval.manifold import density_coverage, precision_recall
from eval.measure import measure
from eval.pixels import PixelErrors, codebook_use, ssim
from eval.protocol import Protocol, library_versions, metric_name
from eval.references import reference_statistics
from eval.sources import Images, from_data, from_folder, from_npz, from_run, label_plan

FID_CONFIG = {
    "samples": None, "from": None, "reference": None, "images": None, "labels": "balanced", "class_accuracy": False,
    "extractor": "cifar", "weights_path": None, "splits": 4, "permutation": 2020, "batch_size": 16, "device": "cpu",
    "save_reference": None, "out": None, "manifold": False,
}  # fmt: skip


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.delenv("VTOK_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


# --- extractors and names --------------------------------------------------------------------------------------------


def test_only_inception_may_say_fid() -> None:
    assert metric_name("FID", "inception") == "FID"
    assert metric_name("rFID", "inception") == "rFID"
    assert metric_name("FID", "cifar") == "FD[cifar]"
    assert metric_name("rFID", "cifar") == "rFD[cifar]"
    assert metric_name("IS", "cifar") == "IS[cifar]"
    assert metric_name("FID", "inception-12345678") == "FD[inception-12345678]"


def test_missing_inception_weights_say_what_to_do(no_weights) -> None:
    with pytest.raises(ValueError) as caught:
        make_extractor("inception")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    for part in (INCEPTION_FILE, "95 MB", "weights_path=", "VTOK_WEIGHTS", "extractor=cifar"):
        assert part in str(caught.value)


def test_auto_says_that_it_is_not_fid(no_weights) -> None:
    said: list[str] = []
    assert make_extractor("auto", say=said.append).name == "cifar"
    assert len(said) == 1 and "FD[cifar], not FID" in said[0]


def test_auto_does_not_ignore_a_wrong_path(no_weights, tmp_path) -> None:
    with pytest.raises(ValueError, match="not found in"):
        make_extractor("auto", weights_path=tmp_path / "nothing.pth")


def test_pickled_code_is_not_run(tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, tmp_path / INCEPTION_FILE)
    with pytest.raises(ValueError, match="more than weights"):
        Inception(weights_path=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_inception_wiring_equals_torch_fidelity(monkeypatch, tmp_path) -> None:
    """He-initialised weights (with the default ones the outputs vanish), in the network and in a file that we read."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"])
    for parameter in network.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    path = tmp_path / INCEPTION_FILE
    torch.save(network.state_dict(), path)
    images = torch.from_numpy(pictures(3, 40))
    ours = Inception(weights_path=tmp_path)
    found, want = ours(images), network(images.permute(0, 3, 1, 2))
    assert torch.equal(found.features, want[0]) and torch.equal(found.logits, want[1])
    assert found.features.std() > 1e-3, "the random network is dead, so the test proves nothing"
    with torch.no_grad():  # the block before, run again by hand
        given: list[torch.Tensor] = []
        hook = network.Mixed_6d.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        network(images.permute(0, 3, 1, 2))
        hook.remove()
        branch = network.Mixed_6d.branch1x1
        by_hand = torch.relu(branch.bn(branch.conv(given[0])))
    assert found.spatial.shape == (3, ours.spatial_dim) == (3, 2023)
    torch.testing.assert_close(found.spatial.view(3, 17, 17, 7), by_hand.movedim(1, -1)[..., :7], rtol=1e-5, atol=1e-6)
    assert found.spatial.std() > 1e-3
    assert ours.name == f"inception-{ours.hash[:8]}", "weights that are not the published ones must not give FID"


def test_judge_file_round_trip(tmp_path) -> None:
    torch.manual_seed(1)
    judge = Judge(widths=(8, 8, 12), classes=3)
    judge.set_whitening(torch.rand(20, 3, 32, 32) * 2 - 1)
    judge.half().float().eval()  # what the file can hold
    save_judge(judge, tmp_path / "j.safetensors", classes=["a", "b", "c"], widths=(8, 8, 12))
    first = (tmp_path / "j.safetensors").read_bytes()
    loaded, about = load_judge(tmp_path / "j.safetensors")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(x)[1], judge(x)[1]) and about["classes"] == ["a", "b", "c"]
    save_judge(judge, tmp_path / "j.safetensors", classes=["a", "b", "c"], widths=(8, 8, 12))
    assert (tmp_path / "j.safetensors").read_bytes() == first, "the hash in the docs must not depend on the run"
    (tmp_path / "j.safetensors").write_bytes(first[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_judge(tmp_path / "j.safetensors")


def test_whitening_makes_patches_uncorrelated() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.nn.functional.avg_pool2d(torch.rand(50, 3, 34, 34, generator=generator), 3, 1) * 2 - 1
    judge = Judge()
    judge.set_whitening(images)
    maps = torch.nn.functional.conv2d(images, judge.whiten.weight)[:, :12].transpose(0, 1).reshape(12, -1)
    covariance = torch.cov(maps)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3 * covariance.diag().max()
    assert torch.equal(judge.whiten.weight[12:], -judge.whiten.weight[:12])


def test_committed_judge_is_small_and_independent_of_the_batch() -> None:
    judge, about = load_judge()
    assert sum(p.numel() for p in judge.parameters()) <= 1_000_000
    assert about["classes"][3] == "cat" and about["test_accuracy"] >= 0.85
    extractor = CifarJudge()
    images = torch.from_numpy(pictures(6))
    together, alone = extractor(images), torch.cat([extractor(images[i : i + 1]).features for i in range(6)])
    torch.testing.assert_close(together.features, alone, rtol=1e-5, atol=1e-6)  # kernels differ by batch
    assert together.features.shape == (6, extractor.dim)


def test_judge_resizes_other_sizes() -> None:
    extractor, large = CifarJudge(), torch.from_numpy(smooth(4, 64))
    small = torch.from_numpy(smooth(4, 32))
    near = (extractor(large).features - extractor(small).features).norm(dim=1)
    far = (extractor(large).features - extractor(small.roll(1, 0)).features).norm(dim=1)
    assert bool((near < 0.5 * far).all()), "the same picture at twice the size must look alike"
    with pytest.raises(ValueError, match="expected uint8"):
        extractor(small.float())


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_is_streamed_exactly(tmp_path, write) -> None:
    images, labels = pictures(11, 8), np.arange(11)
    write(tmp_path / "s.npz", arr_0=images, arr_1=labels)
    found = from_npz(tmp_path / "s.npz")
    assert found.count == 11 and torch.equal(found.labels, torch.arange(11)) and found.file_format == "npz"
    for size in (1, 4, 100):
        np.testing.assert_array_equal(torch.cat(list(found.batches(size))), images)
    np.testing.assert_array_equal(torch.cat(list(found.first(5).batches(2))), images[:5])
    with pytest.raises(ValueError, match="fewer than images=12"):
        found.first(12)


def test_wrong_npz_files_are_named(tmp_path) -> None:
    path = tmp_path / "s.npz"
    with pytest.raises(ValueError, match="does not exist"):
        from_npz(path)
    np.savez(path, images=pictures(2, 8))
    with pytest.raises(ValueError, match="no arr_0"):
        from_npz(path)
    np.savez(path, arr_0=pictures(2, 8).astype(np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        from_npz(path)
    np.savez(path, arr_0=pictures(2, 8), arr_1=np.arange(3))
    with pytest.raises(ValueError, match="3 labels"):
        from_npz(path)
    np.savez(path, arr_0=np.array([None, {}], dtype=object))
    with pytest.raises(ValueError, match="pickled"):
        from_npz(path)
    np.savez(path, arr_0=pictures(100, 8))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        from_npz(path)


def test_a_header_that_promises_more_than_the_file_holds(tmp_path) -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="truncated"):
        from_npz(tmp_path / "bomb.npz")


def test_folder_in_sorted_order_with_class_labels(tmp_path) -> None:
    images, exif = pictures(4, 8), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: protocols read pixels as they are stored
    for i, name in enumerate(("b/1.png", "a/2.png", "a/1.png", "b/0.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / name, exif=exif)
    found = from_folder(tmp_path)
    np.testing.assert_array_equal(torch.cat(list(found.batches(3))), images[[2, 1, 3, 0]])
    assert found.labels.tolist() == [0, 0, 1, 1] and found.file_format == "png"
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1028  # 16 bits: 257 of its levels are one of 8 bits
    Image.fromarray(deep).save(tmp_path / "a" / "1.png")
    np.testing.assert_array_equal(next(from_folder(tmp_path).batches(1))[0, :, :, 1], deep // 257)
    Image.fromarray(pictures(1, 9)[0]).save(tmp_path / "b" / "2.png")
    with pytest.raises(ValueError, match=r"2.png is 9 x 9, others 8 x 8"):
        list(from_folder(tmp_path).batches(2))
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*2.png"):
        list(from_folder(tmp_path).batches(2))


def test_empty_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        from_folder(tmp_path)


def test_data_module_gives_unaugmented_images_evenly_spaced() -> None:
    from vtok.data.digits import Digits, enlarge, held_out_digits, read_digits

    digits, labels = read_digits()
    held = held_out_digits(labels)
    data = Digits(image_size=16, batch_size=8, shift=2)
    found = from_data(data, "val")
    np.testing.assert_array_equal(torch.cat(list(found.batches(100))), enlarge(digits[held], 16))
    np.testing.assert_array_equal(found.labels, labels[held])
    few = from_data(data, "train", 50)
    train = np.setdiff1d(np.arange(len(labels)), held)
    chosen = train[[i * len(train) // 50 for i in range(50)]]
    np.testing.assert_array_equal(torch.cat(list(few.batches(7))), enlarge(digits[chosen], 16))
    np.testing.assert_array_equal(few.labels, labels[chosen])


class Dots:
    """A stand-in for a pipeline: the picture is a function of label and seed alone."""

    def __init__(self, classes: int, chunk: int) -> None:
        self.generator, self.chunk = SimpleNamespace(num_classes=classes), chunk

    def chunk_of(self, count: int) -> int:
        return self.chunk

    def __call__(self, labels: Tensor, seeds: Tensor, *, guidance: object, rule: object, chunk: int) -> Tensor:
        assert len(labels) <= chunk == self.chunk
        value = (labels * 7 + seeds) % 256
        return value.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)


@pytest.mark.parametrize("plan", ["balanced", "random"])
def test_drawn_images_do_not_depend_on_batch_or_count(plan: str) -> None:
    def draw(count: int, chunk: int, size: int) -> Tensor:
        run = from_run(Dots(10, chunk), name="r", count=count, plan=plan, seed=5, guidance=1.0, rule=None)
        assert run.file_format == "direct"
        return torch.cat(list(run.batches(size)))

    want = draw(100, 8, 64)
    assert torch.equal(draw(100, 8, 3), want) and torch.equal(draw(100, 100, 100), want)
    assert torch.equal(draw(37, 8, 16), want[:37])


def test_label_plans() -> None:
    assert torch.bincount(label_plan("balanced", 50, 10, 0)).tolist() == [5] * 10
    assert torch.equal(label_plan("random", 1000, 10, 3)[:10], label_plan("random", 10, 10, 3))
    assert label_plan("random", 1000, 10, 3).unique().tolist() == list(range(10))
    assert label_plan("balanced", 3, 0, 0).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="labels=even"):
        label_plan("even", 3, 2, 0)


# --- the Frechet command ---------------------------------------------------------------------------------------------


def protocol(**changes: object) -> Protocol:
    fields = dict(
        name="custom", images=8, source="s", labels="given", seed=None, guidance=None, rule=None, weights=None,
        rounding="nearest", resize="r", file_format="npz", reference="x", reference_images=8, reference_hash="h",
        splits=2, permutation=0, extractor="cifar", extractor_hash="e", batch_size=4, device="cpu",
        versions=library_versions(),
    )  # fmt: skip
    return Protocol(**(fields | changes))


def test_protocol_round_trip_and_comparison() -> None:
    one = protocol()
    assert Protocol.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.differs(protocol(source="t", batch_size=9, seed=3)) == []
    assert one.differs(protocol(images=9, guidance=2.0)) == ["images", "guidance"]
    assert any("images: 8" in line for line in one.lines()) and not any("guidance" in line for line in one.lines())
    data = one.to_json()
    del data["rounding"]
    with pytest.raises(ValueError, match="rounding"):
        Protocol.from_json(data)


def test_only_the_published_protocol_is_comparable() -> None:
    good = dict(extractor="inception", images=50_000, reference="refs/VIRTUAL_imagenet256_labeled.npz")
    assert protocol(**good).adm_reasons() == []
    for change in ({"images": 10_000}, {"extractor": "cifar"}, {"reference": "mine.npz"}, {"file_format": "jpg"}):
        assert len(protocol(**(good | change)).adm_reasons()) == 1


def test_fid_command_on_files(tmp_path, capsys) -> None:
    """The same images score 0; the JSON holds everything; statistics that were saved give the same number."""
    samples, other = pictures(60, 32, 1), (pictures(60, 32, 2) // 2)
    np.savez(tmp_path / "a.npz", arr_0=samples, arr_1=np.arange(60) % 10)
    np.savez(tmp_path / "b.npz", arr_0=other)
    config = FID_CONFIG | {"samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "a.npz")}
    same = evaluate(config)
    scale = same["metrics"]["IS[cifar]"]
    assert same["metrics"]["FD[cifar]"] == pytest.approx(0, abs=1e-9) and 1 <= scale["mean"] <= 10
    assert not any(name.startswith("FID") for name in same["metrics"])
    written = json.loads((tmp_path / "a.fid.json").read_text())
    assert written["adm_comparable"] is False and written["protocol"]["images"] == 60
    assert Protocol.from_json(written["protocol"]).extractor == "cifar"
    printed = capsys.readouterr().out
    assert "FD[cifar]" in printed and "FID" not in printed.replace("FID-50k", "")

    saved = str(tmp_path / "stats.npz")
    far = evaluate(config | {"reference": str(tmp_path / "b.npz"), "save_reference": saved, "class_accuracy": True})
    again = evaluate(config | {"reference": saved})
    assert far["metrics"]["FD[cifar]"] > 1e-3
    assert again["metrics"]["FD[cifar]"] == pytest.approx(far["metrics"]["FD[cifar]"], rel=1e-12)
    assert 0 <= far["metrics"]["class_accuracy[cifar]"] <= 1
    batched = evaluate(config | {"reference": saved, "batch_size": 7})
    assert batched["metrics"]["FD[cifar]"] == pytest.approx(far["metrics"]["FD[cifar]"], rel=1e-5)


def test_fid_command_measures_neighbourhoods(tmp_path, capsys) -> None:
    """Precision and the like from memory-mapped features equal those of features in memory; the file is removed."""
    samples, other = pictures(40, 32, 1), np.concatenate([pictures(30, 32, 1), pictures(20, 32, 2) // 2])
    np.savez(tmp_path / "a.npz", arr_0=samples)
    np.savez(tmp_path / "b.npz", arr_0=other)
    config = FID_CONFIG | {"samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "b.npz"), "manifold": True}
    got = evaluate(config)["metrics"]
    judge = CifarJudge()
    generated, real = (judge(torch.from_numpy(images)).features for images in (samples, other))
    for name, value in (precision_recall(real, generated) | density_coverage(real, generated)).items():
        assert got[f"{name}[cifar]"] == pytest.approx(value, abs=1e-12)
    assert got["manifold_images"] == {"real": 50, "generated": 40} and "MB" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.features"))
    np.savez(tmp_path / "s.npz", mu=np.zeros(judge.dim), sigma=np.eye(judge.dim))
    with pytest.raises(ValueError, match="statistics only"):
        evaluate(config | {"reference": str(tmp_path / "s.npz")})


def test_fid_command_names_mistakes(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(8))
    good = FID_CONFIG | {"samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "a.npz")}
    with pytest.raises(ValueError, match="exactly one of samples"):
        evaluate(good | {"from": "somewhere"})
    with pytest.raises(ValueError, match="exactly one of samples"):
        evaluate(good | {"samples": None})
    with pytest.raises(ValueError, match="choose inception, cifar, dinov2 or auto"):
        evaluate(good | {"extractor": "vgg"})
    with pytest.raises(ValueError, match="add data="):
        evaluate(good | {"reference": "val"})
    with pytest.raises(ValueError, match="needs labels"):
        evaluate(good | {"class_accuracy": True})
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="2048 features, cifar has"):
        evaluate(good | {"reference": str(tmp_path / "wide.npz")})


def test_statistics_of_another_judge_are_refused(tmp_path) -> None:
    extractor = CifarJudge()
    np.savez(
        tmp_path / "s.npz", mu=np.zeros(extractor.dim), sigma=np.eye(extractor.dim), hash=np.array("0" * 64),
        feature=np.array("cifar"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="change reference or extractor"):
        reference_statistics(str(tmp_path / "s.npz"), None, extractor, batch_size=8)


def test_reference_from_a_data_set_equals_its_images(tmp_path) -> None:
    from vtok.data.digits import Digits

    data = Digits(image_size=16, batch_size=8, limit_val=40)
    extractor = CifarJudge()
    direct, name, _ = reference_statistics("val", data, extractor, batch_size=16)
    np.savez(tmp_path / "v.npz", arr_0=np.concatenate([b.numpy() for b in from_data(data, "val").batches(9)]))
    stored, _, _ = reference_statistics(str(tmp_path / "v.npz"), None, extractor, batch_size=16)
    torch.testing.assert_close(direct.mu, stored.mu, rtol=0, atol=0)
    assert direct.n == 40 and name == "Digits val"


def test_accuracy_of_a_pass_counts_the_right_labels(tmp_path) -> None:
    class Oracle:
        dim, spatial_dim, name, hash, resize, classes = 1, 0, "oracle", "0", "none", ["a", "b"]

        def __call__(self, images: Tensor):
            bright = (images.float().mean(dim=(1, 2, 3)) > 127).float()
            return Activations(bright.unsqueeze(1), torch.stack([1 - bright, bright], 1))

    images = np.zeros((10, 4, 4, 3), np.uint8)
    images[5:] = 255
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0]))
    found = measure(from_npz(tmp_path / "s.npz"), Oracle(), batch_size=3, class_accuracy=True)
    assert found.right == pytest.approx(0.8)


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_a_pass_keeps_moments_of_features_with_places() -> None:
    class Corners:
        dim, spatial_dim, name, hash, resize, classes = 3, 4, "corners", "0", "none", None

        def __call__(self, images: Tensor):
            mean, corners = images.float().mean(dim=(1, 2)), images[:, ::7, ::7, 0].flatten(1).float()
            return Activations(mean, mean, corners)

    shown = pictures(20, 8, 5)
    images = Images("x", 20, lambda size: iter(torch.from_numpy(shown).split(size)), None, "npz")
    got = measure(images, Corners(), batch_size=6).spatial.statistics()
    by_hand = shown[:, ::7, ::7, 0].reshape(20, 4).astype(np.float64)
    np.testing.assert_allclose(got.mu, by_hand.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.sigma, np.cov(by_hand, rowvar=False), rtol=1e-10)


def degraded(images: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 20, images.shape)
    return np.clip(images + noise * np.linspace(0.2, 2, len(images))[:, None, None, None], 0, 255).astype(np.uint8)


def smooth(count: int, side: int) -> np.ndarray:
    large = torch.from_numpy(pictures(count, 6)).permute(0, 3, 1, 2).float()
    large = torch.nn.functional.interpolate(large, side, mode="bicubic").clamp(0, 255)
    return large.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_psnr_and_ssim_equal_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a = smooth(7, 37)
    b = degraded(a, 0)
    errors = PixelErrors()
    errors.add(torch.from_numpy(a[:3]), torch.from_numpy(b[:3]))
    errors.add(torch.from_numpy(a[3:]), torch.from_numpy(b[3:]))
    found = errors.result()
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).double() / 255 for z in (a, b))
    each = peak_signal_noise_ratio(y, x, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert found["psnr_mean"] == pytest.approx(float(each.mean()), rel=1e-6)
    assert found["psnr_set"] == pytest.approx(float(peak_signal_noise_ratio(y, x, data_range=1.0)), rel=1e-6)
    assert found["psnr_mean"] - found["psnr_set"] > 0.5, "the two definitions differ on these images"
    # torchmetrics also counts windows over its reflected border; five pixels further in they lie in the image
    _, full = structural_similarity_index_measure(y, x, sigma=1.5, data_range=1.0, return_full_image=True)
    assert found["ssim_gauss11"] == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_equal_images() -> None:
    errors = PixelErrors()
    a = torch.from_numpy(pictures(2, 16))
    errors.add(a, a)
    assert errors.result() == {"psnr_mean": 100.0, "psnr_set": 100.0, "ssim_gauss11": pytest.approx(1.0)}
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_images_below_the_window_have_no_ssim() -> None:
    """PSNR is of all images; SSIM of those that have it, if any and if wanted."""
    small, large = (torch.from_numpy(pictures(2, side)) for side in (8, 16))
    errors, plain = PixelErrors(), PixelErrors(similarity=False)
    for images in (small, large):
        for one in (errors, plain):
            one.add(images, images ^ 1)  # one grey level off everywhere
        assert ("ssim_gauss11" in errors.result()) == (images is large)
    assert (errors.count, errors.windowed, plain.windowed) == (4, 2, 0)
    level = pytest.approx(20 * math.log10(255))
    assert plain.result() == {"psnr_mean": level, "psnr_set": level}
    alone = PixelErrors()
    alone.add(large, large ^ 1)
    assert errors.result() == alone.result() | {"psnr_mean": level, "psnr_set": level}


def test_codebook_use() -> None:
    found = codebook_use(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert found == {"codebook_usage": 0.5, "codebook_perplexity": pytest.approx(4.0), "tokens_counted": 20}


# --- neighbours ------------------------------------------------------------------------------------------------------


def line(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_vectors_are_block_means() -> None:
    images = pictures(3, 16)
    found = neighbours.vectors(images, 8)
    want = images[1, 2:4, 6:8].mean() / 255  # block in row 1, column 3
    assert found.shape == (3, 64) and found[1, 1 * 8 + 3] == pytest.approx(want, abs=1e-15)
    with pytest.raises(ValueError, match="multiples of 8"):
        neighbours.vectors(pictures(1, 20))


def test_coverage_by_hand() -> None:
    """Held-out 0, 1, 3, 7 with k = 2: radii 3, 2, 3, 6. A sample at 5 is within 2, 4, 2, 2 of 3.. of 3 and 7 only."""
    held = line(0, 1, 3, 7)
    assert neighbours.coverage(line(5), held, 2) == pytest.approx(2 / 4)
    assert neighbours.coverage(line(3), held, 2) == 1.0  # on the edge of 0's ball (3), of 1's (2), itself, 7's (6)
    assert neighbours.coverage(line(100), held, 2) == 0.0
    assert neighbours.coverage(held, held, 2) == 1.0
    with pytest.raises(ValueError, match="more than 4"):
        neighbours.coverage(held, held, 4)


def test_equal_digits_are_neighbours_but_a_digit_is_not_its_own() -> None:
    held = line(0, 0, 5, 9)
    assert neighbours.coverage(line(0.5), held, 1) == pytest.approx(0.0)  # radius 0 of the twins, 4 of 5 and 9
    assert neighbours.coverage(line(1.0), held, 1) == pytest.approx(1 / 4)  # 5 - 4 = 1 is on the edge


def test_spread_is_the_mean_over_classes_of_pair_distances() -> None:
    x, labels = line(0, 2, 4, 10, 11), np.array([0, 0, 0, 1, 1])
    assert neighbours.mean_distance(x, labels) == pytest.approx(((2 + 4 + 2) / 3 + 1) / 2)


def test_figures_by_hand() -> None:
    train, train_labels = line(0, 1, 10, 11), np.array([0, 0, 1, 1])
    held, held_labels = line(0.5, 10.5, 12, 13, 14, 15), np.array([0, 1, 1, 1, 1, 1])
    samples, labels = line(0, 2, 9, 13), np.array([0, 0, 1, 0])
    found = neighbours.figures(samples, labels, train, train_labels, held, held_labels, per_class=1)
    assert found["class_accuracy"] == pytest.approx(3 / 4)
    assert found["real_class_accuracy"] == 1.0
    spread_samples = (2 + 13 + 11) / 3  # class 1 has one sample and does not count
    assert found["spread"] == pytest.approx(spread_samples / 1.0)
    assert found["nearest"] == pytest.approx(np.median([0, 1, 1, 2]) / np.median([0.5, 0.5, 1, 2, 3, 4]))


def test_digits_measured_against_themselves() -> None:
    """Held-out digits as samples: as real as can be. Copies of training digits: they recite."""
    from vtok.data.digits import enlarge, held_out_digits, read_digits

    digits, labels = read_digits()
    held = held_out_digits(labels)
    train = np.setdiff1d(np.arange(len(labels)), held)
    copies = train[neighbours.first_of_each(labels[train], 60)]
    found = neighbours.digit_figures(enlarge(digits[copies], 16), labels[copies])
    assert found["class_accuracy"] == 1.0 and found["nearest"] < 0.01  # 8-bit rounding keeps it from 0
    assert found["real_class_accuracy"] >= 0.97
    assert 0.9 < found["spread"] < 1.1
    assert found["coverage"] == found["real_coverage"] >= 0.85
    with pytest.raises(ValueError, match="raise per_class"):
        neighbours.digit_figures(enlarge(digits[copies[:100]], 16), labels[copies[:100]])
    mixed = neighbours.digit_figures(enlarge(digits[copies], 16), (labels[copies] + 1) % 10)
    assert mixed["class_accuracy"] == 0.0


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_step_entropies() -> None:
    tokens = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 1, 2], [0, 3, 4]])
    found = likelihood.step_entropies(tokens, (1, 2))
    assert found.tolist() == pytest.approx([0.0, math.log(4)])


def test_deranged_labels_never_stay_and_keep_their_counts() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    for seed in range(5):
        shuffled = likelihood.deranged(labels, seed)
        assert bool((shuffled != labels).all())
        assert torch.bincount(shuffled).tolist() == [5, 3, 2]
    with pytest.raises(ValueError, match="more than half"):
        likelihood.deranged(torch.tensor([0, 0, 0, 1, 1]), 0)


def test_without_other_labels_there_is_no_label_test_and_the_rest_stands(capsys) -> None:
    one_sided = torch.tensor([0, 0, 0, 1])
    found = likelihood.likelihood(
        ClassTable(4, 3), torch.zeros(8, 3).long(), torch.zeros(4, 3).long(), one_sided, batch_size=4
    )
    assert "labels" not in found and "shuffled" not in found and found["held_out"] > 0
    assert "no test of right against wrong labels" in capsys.readouterr().out
    assert likelihood.other_labels(SimpleNamespace(num_classes=1), torch.zeros(4).long(), 0) is None
    assert capsys.readouterr().out == "", "a model without classes needs no note"


def test_paired_test_against_known_values() -> None:
    gain = torch.tensor([0.3, 0.1, -0.2, 0.4, 0.2, 0.1, 0.3, -0.1]).double()
    found = likelihood.paired_test(torch.zeros(8).double(), gain)
    t = float(gain.mean() / (gain.std() / math.sqrt(8)))
    assert found["t"] == pytest.approx(t) and found["wins"] == 6
    assert found["sign_p_value"] == pytest.approx((28 + 8 + 1) / 256)  # C(8, 6) + C(8, 7) + C(8, 8)
    assert found["p_value"] == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)))
    reverse = likelihood.paired_test(gain, torch.zeros(8).double())
    assert reverse["p_value"] == pytest.approx(1 - found["p_value"])


def test_binomial_tail_of_many_throws() -> None:
    assert likelihood.binomial_tail(0, 1000) == pytest.approx(1.0)
    assert likelihood.binomial_tail(500, 1000) == pytest.approx(0.5 + math.comb(1000, 500) / 2**1001, rel=1e-9)
    assert likelihood.binomial_tail(1000, 1000) == pytest.approx(2.0**-1000, rel=1e-9)


class ClassTable(torch.nn.Module):
    """A generator that knows p(token | label) exactly: token = label with probability 0.9, else uniform."""

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.num_classes, self.layout = classes, SimpleNamespace(sizes=(1,) * length)

    def arrange(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(tokens=tokens)

    def conditioner(self, labels: Tensor, drop: None) -> Tensor:
        return labels

    def log_prob(self, canvas: SimpleNamespace, cond: Tensor) -> Tensor:
        other = 0.1 / (self.num_classes - 1)
        return torch.where(canvas.tokens == cond.unsqueeze(1), 0.9, other).log()


def test_likelihood_figures_of_an_exact_model() -> None:
    generator = torch.Generator().manual_seed(0)

    def data(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 4
        tokens = labels.unsqueeze(1).repeat(1, 3)
        wrong = torch.rand(count, 3, generator=generator) < 0.1
        tokens[wrong] = (tokens[wrong] + torch.randint(1, 4, (int(wrong.sum()),), generator=generator)) % 4
        return tokens, labels

    train, _ = data(4000)
    tokens, labels = data(1000)
    found = likelihood.likelihood(ClassTable(4, 3), train, tokens, labels, batch_size=64)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 3))
    assert found["held_out"] == pytest.approx(entropy, abs=0.05)
    assert found["histogram"] == pytest.approx(math.log(4), abs=0.01)
    assert found["below_histogram"] == pytest.approx(math.log(4) - entropy, abs=0.06)
    assert found["shuffled"] > found["held_out"] and found["labels"]["p_value"] < 1e-6
    blind = likelihood.paired_test(torch.ones(10).double(), torch.ones(10).double())
    assert blind["p_value"] == 0.5 and blind["sign_p_value"] == 1.0, "equal losses are no evidence"


# --- reconstruction --------------------------------------------------------------------------------------------------


class Quadrants(torch.nn.Module):
    """A stand-in for a tokenizer: a token is the brightness of a quadrant in four levels, painted back flat."""

    spec = SimpleNamespace(
        discrete=True, image_size=16, bits=8.0, layout=SimpleNamespace(length=4),
        parts=(SimpleNamespace(count=4, vocab_size=4),),
    )  # fmt: skip

    def encode(self, images: Tensor, *, noise: object = None) -> Tensor:
        level = torch.nn.functional.avg_pool2d(images.mean(1), 8)
        return ((level + 1) * 2).floor().clamp(0, 3).long().flatten(1)

    def decode(self, tokens: Tensor, *, noise: object = None) -> Tensor:
        level = (tokens.view(-1, 1, 2, 2).float() + 0.5) / 2 - 1
        return level.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


def test_reconstruction_figures_by_hand() -> None:
    from eval.reconstruction import run_through, token_figures

    flat = np.full((9, 16, 16, 3), 32, np.uint8)  # level 0 is painted -0.75, which is grey 31.875: 32
    flat[4:, :8, :8] = 224  # level 3 in one quadrant of five images
    images = Images("flat", 9, lambda size: iter(torch.from_numpy(flat).split(size)), None, "direct")
    done = run_through(Quadrants(), images, None, batch_size=4, keep=3, device=torch.device("cpu"))
    found = token_figures(Quadrants.spec, done)
    assert done.counts[0].tolist() == [4 * 9 - 5, 0, 0, 5]
    assert found["codebook_usage"] == 0.5 and found["token_match"] == 1.0
    assert found["bits_per_pixel"] == 8 / 256
    share = np.array([31, 5]) / 36
    assert found["codebook_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    originals, copies = (torch.cat(side) for side in zip(*done.pairs))
    np.testing.assert_array_equal(originals, flat[[0, 4, 8]])  # evenly spaced over the set
    painted = flat.copy()
    painted[4:, :8, :8] = 223  # level 3 is painted 0.75, which is grey 223.125
    np.testing.assert_array_equal(copies, painted[[0, 4, 8]])
    off = -10 * math.log10((1 / 255) ** 2 / 4)  # five images are off by one level in a quarter
    assert done.errors.result()["psnr_mean"] == pytest.approx((4 * 100 + 5 * off) / 9)


@pytest.mark.parametrize("name", ["cnn_kl", "dar", "flextok", "flextok_vae"])
def test_an_image_is_drawn_by_its_place_whatever_the_batch(name) -> None:
    """As alone, with the noise of its place: in eval.reconstruction, and in val/rfd on one process or two."""
    from tokenizers import make

    from eval.callbacks import reconstructed
    from eval.reconstruction import drawn, run_through
    from vtok.data.transforms import to_uint8
    from vtok.noise import SampleNoise, sample_seeds

    tokenizer, cpu = make(name), torch.device("cpu")
    one = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8))
    shown = one.repeat(3, 1, 1, 1)[:8]  # each picture again, three places on
    alone = []
    for i, picture in enumerate(shown):
        noise = SampleNoise(sample_seeds(0, i, i + 1))
        x = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
        alone.append(to_uint8(tokenizer.decode(tokenizer.encode(x, noise=noise), noise=noise)))
    alone = torch.cat(alone).int()
    assert not torch.equal(alone[0], alone[3]), "one picture twice is drawn twice"

    def near(copies: Tensor) -> bool:
        return int((copies.int() - alone).abs().max()) <= 1  # rounding of batches to 8 bits

    def span(size: int, first: int, last: int):
        yield from shown[first:last].split(size)

    images = Images("x", 8, lambda size: span(size, 0, 8), None, "direct", span)
    figures = []
    for size in (3, 5):
        done = run_through(tokenizer, images, None, batch_size=size, keep=8, device=cpu)
        assert near(torch.cat([copies for _, copies in done.pairs]))
        figures.append([*done.errors.result().values(), done.survived])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext))
    copies = reconstructed(images, tokenizer, cpu, trainer)
    assert near(torch.cat(list(copies.batches(3))))
    assert near(torch.cat([batch for a, b in ((0, 5), (5, 8)) for batch in copies.part(4, a, b)]))
    parts = drawn(tokenizer).split(", once an image, keyed by the seed and its place")[0].split(" and ")
    latents, start = "latents of the posterior", "the decoder's noise"
    wanted = {"cnn_kl": [latents], "flextok_vae": [latents, start]}.get(name, [start])
    assert parts == wanted and drawn(make("cnn_vq")) == "nothing"


def test_a_result_says_what_was_drawn(tmp_path) -> None:
    from test_zoo import config_of
    from tokenizers import make

    from eval.reconstruction import evaluate as reconstruction
    from vtok.checkpoint import save_folder
    from vtok.data.fake import Fake

    data, found = Fake(image_size=16, train_images=4, val_images=6, batch_size=4), {}
    for name in ("cnn_kl", "cnn_vq"):
        save_folder(make(name), tmp_path / name, kind="tokenizer")
        words = {"from": str(tmp_path / name), "extractor": "cifar", "lpips": False, "device": "cpu", "seed": 5}
        found[name] = reconstruction(config_of("eval_reconstruction", **words), data)
    protocols = {name: Protocol.from_json(result["protocol"]) for name, result in found.items()}
    said = "latents of the posterior, once an image, keyed by the seed and its place"
    assert (
        found["cnn_kl"]["drawn"] == protocols["cnn_kl"].rule == said
        and found["cnn_kl"]["seed"] == protocols["cnn_kl"].seed == 5
    )
    assert found["cnn_vq"]["ssim"].startswith("Gaussian window 11 x 11")
    assert found["cnn_vq"]["drawn"] == "nothing" and protocols["cnn_vq"].rule is protocols["cnn_vq"].seed is None


def test_tokenizers_of_tiny_images_are_measured_without_ssim(tmp_path) -> None:
    from test_zoo import config_of
    from tokenizers import cnn_vq

    from eval.reconstruction import evaluate as reconstruction
    from vtok.checkpoint import save_folder
    from vtok.data.digits import Digits

    save_folder(cnn_vq(multipliers=(1, 2)).eval(), tmp_path / "tokenizer", kind="tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    config["arguments"]["image_size"] = 8
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps(config))
    words = {"from": str(tmp_path / "tokenizer"), "extractor": "none", "lpips": False, "device": "cpu", "images": 5}
    found = reconstruction(config_of("eval_reconstruction", **words), Digits(image_size=8, batch_size=4))
    assert found["metrics"]["psnr_mean"] > 0 and "ssim_gauss11" not in found["metrics"]
    assert found["ssim"] == "none: its window does not fit 8 px"


def test_pictures_of_training_show_what_is_measured() -> None:
    """Four of 16 held-out images: the copies that eval.reconstruction makes of these among all."""
    from tokenizers import make

    from eval.reconstruction import run_through
    from vtok.callbacks import Reconstructions
    from vtok.data.fake import Fake

    data, tokenizer = Fake(image_size=16, train_images=4, val_images=16, batch_size=4), make("dar")
    trainer = SimpleNamespace(datamodule=data, precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext))
    module = SimpleNamespace(device=torch.device("cpu"), variants=lambda: {"": tokenizer})
    sheet = Reconstructions("nowhere", every=1, count=4).draw(trainer, module)
    done = run_through(tokenizer, from_data(data, "val"), None, batch_size=5, keep=16, device=module.device)
    originals, copies = (torch.cat(side)[[0, 5, 10, 15]].numpy().astype(int) for side in zip(*done.pairs))
    for row, want in enumerate((originals, copies)):
        for column in range(4):
            y, x = 2 + 18 * row, 2 + 18 * column  # gaps of two pixels
            assert np.abs(sheet[y : y + 16, x : x + 16].astype(int) - want[column]).max() <= 1


def test_huge_vocabularies_are_not_counted() -> None:
    """Neither in evaluation nor in validation, where a table of 2^40 counts would be asked for."""
    from eval.reconstruction import run_through, token_figures
    from vtok.lit import LitTokenizer
    from vtok.losses.objective import TokenizerObjective
    from vtok.models.cnn import CNNTokenizer
    from vtok.optim import Recipe
    from vtok.quantize.binary import LFQ

    shape = dict(channels=4, multipliers=(1, 1), blocks=1, groups=4, z_channels=4)
    tokenizer = CNNTokenizer(image_size=16, quantizer=LFQ(bits=40, entropy_weight=0.0), **shape).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
    images = Images("noise", 4, lambda size: iter(pixels.split(size)), None, "direct")
    found = token_figures(
        tokenizer.spec, run_through(tokenizer, images, None, batch_size=2, keep=0, device=torch.device("cpu"))
    )
    assert found["bits_per_image"] == 64 * 40 and set(found) == {
        "tokens_per_image",
        "bits_per_image",
        "bits_per_pixel",
        "token_match",
    }
    rates = {"lr": 1e-3}
    lit = LitTokenizer(
        tokenizer, TokenizerObjective(perceptual_weight=0.0), Recipe(rates, {}, 9), discriminator_optimizer=rates
    )
    batch = {"image": pixels.permute(0, 3, 1, 2) / 127.5 - 1, "key": torch.arange(4)}
    assert not any(name.startswith("count") for name in lit.validate_module(tokenizer, batch, ""))
    counts = {f"count_{i}{raw}": torch.tensor([1.0, 0.0, i]) for i in (1, 2) for raw in ("", "_raw")}  # part 0 is huge
    named = lit.finish_validation({}, counts)
    assert {n for n in named if "dead" in n} == {"dead", "dead_raw", "dead_1", "dead_2", "dead_1_raw", "dead_2_raw"}
    share = np.array([1, 2]) / 3
    assert float(named["perplexity_2_raw"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_pair_grid_puts_reconstructions_below_their_originals() -> None:
    from eval.reconstruction import pair_grid

    originals = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(20)])
    picture = np.asarray(pair_grid(originals, 255 - originals, columns=16))
    assert picture[0, 0, 0] == 0 and picture[66, 0, 0] == 255  # twice as large as 32: 64 pixels, and a seam of 2
    second = 2 * 64 + 2 + 8  # the second band begins with image 16
    assert picture[second, 0, 0] == 16 and picture[second + 66, 0, 0] == 239


# --- the walks' bookkeeping ------------------------------------------------------------------------------------------


def test_verdicts_never_hide_a_miss(capsys) -> None:
    from scripts.stages import verdicts

    figures = {"a": 0.5, "b": 2.0, "c": 1.0, "d": math.nan}
    wanted = {"a": (0.9, None), "b": (None, 1.0), "c": (0.9, 1.1), "d": (0.0, None)}
    assert verdicts(figures, wanted) == ["a", "b", "d"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("MISSED") for line in lines] == [True, True, False, True]


def test_columns_of_a_metrics_file_skip_empty_cells(tmp_path) -> None:
    from scripts.stages import column

    (tmp_path / "m.csv").write_text("step,train/loss,val/loss\n1,3.0,\n2,2.0,2.5\n3,,2.25\n")
    assert column(tmp_path / "m.csv", "train/loss") == ([1, 2], [3.0, 2.0])
    assert column(tmp_path / "m.csv", "val/loss") == ([2, 3], [2.5, 2.25])
    assert column(tmp_path / "m.csv", "speed") == ([], [])


def test_selftest_meets_every_known_value(capsys, monkeypatch) -> None:
    """It passes as it is, and fails when a formula is broken."""
    from eval import selftest

    assert selftest.main() == 0 and "all formulas" in capsys.readouterr().out
    monkeypatch.setattr(selftest, "GROUPS", (lambda: [("broken", 1.0, 1.1, 1e-3)],))
    assert selftest.main() == 1 and "MISSED" in capsys.readouterr().out


def test_a_result_is_a_run_of_its_own_at_wandb(tmp_path, monkeypatch) -> None:
    import wandb

    from eval.fid import log_wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    start, seen = wandb.init, {}

    def init(**options):
        run = start(**options)
        finish = run.finish

        def note_and_finish():
            seen.update(summary=dict(run.summary), config=dict(run.config), kind=run.job_type)
            finish()

        monkeypatch.setattr(run, "finish", note_and_finish)
        return run

    monkeypatch.setattr(wandb, "init", init)
    metrics = {"FID": 2.5, "IS": {"mean": 200.0, "std": 3.0}, "images": 50, "order": "fixed"}
    log_wandb("numbers", {"protocol": {"name": "adm"}, "metrics": metrics, "command": "python -m eval.fid"})
    logged = {k: v for k, v in seen["summary"].items() if k.startswith("eval/")}
    assert logged == {"eval/FID": 2.5, "eval/IS": 200.0, "eval/images": 50}
    assert seen["config"] == {"protocol": {"name": "adm"}, "command": "python -m eval.fid"} and seen["kind"] == "eval"
    assert list(tmp_path.rglob("*.wandb")), "an offline run, to be sent by wandb sync"
    wandb.teardown()
