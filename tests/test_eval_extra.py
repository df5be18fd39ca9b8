"""DINOv2's extractor, LPIPS of reconstructions, linear probes, published models."""

from __future__ import annotations

import numpy as np
import pytest
import test_zoo
import torch
from safetensors.torch import save_file
from test_eval import FID_CONFIG, pictures
from test_zoo import config_of

from eval import linprobe
from eval.dinov2 import MODEL, SIDE, DinoV2
from eval.drawing import results_folder, sample_size
from eval.features import make_extractor
from eval.fid import evaluate
from eval.reconstruction import perceptual_distance, run_through, write_pairs
from eval.sources import Images, from_npz
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.pipeline import Pipeline
from vgen.sampling import SPEED, sample
from vtok.losses.reconstruction import HEADS_FILE, VGG_FILE


def test_missing_dinov2_weights_say_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError) as caught:
        make_extractor("dinov2", weights_path=tmp_path)
    for part in (f"{MODEL}.safetensors", "1.2 GB", "weights_path=", "VTOK_WEIGHTS"):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_class_tokens_of_a_small_model(tmp_path, monkeypatch) -> None:
    """The same wiring on timm's test model: features are those of timm's own network on pictures resized by torch."""
    import timm

    name = "test_vit.r160_in1k"
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, img_size=SIDE).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / f"{name}.safetensors")
    extractor = DinoV2(model=name, weights_path=tmp_path)
    images = torch.from_numpy(pictures(3, 40))
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    resized = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        want = net.forward_features((resized - mean) / std)[:, 0]
    found = extractor(images)
    assert found.logits is None and extractor.dim == want.shape[1] and extractor.name == name
    torch.testing.assert_close(found.features, want, rtol=1e-4, atol=1e-5)
    np.savez(tmp_path / "a.npz", arr_0=pictures(6, 24))
    monkeypatch.setattr("eval.fid.make_extractor", lambda *_, **__: extractor)
    config = FID_CONFIG | {"samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "a.npz")}
    result = evaluate(config)
    assert list(result["metrics"]) == [f"FD[{name}]"], "no logits, no Inception score"
    assert result["metrics"][f"FD[{name}]"] == pytest.approx(0, abs=1e-6)


def test_lpips_of_reconstructions_is_a_mean_over_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VTOK_WEIGHTS", str(tmp_path))
    assert perceptual_distance(None, None) is None and perceptual_distance(False, None) is None
    with pytest.raises(ValueError, match="pass lpips=false"):
        perceptual_distance(True, None)
    for name in (VGG_FILE, HEADS_FILE):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="damaged"):
        perceptual_distance(None, None, side=16)
    assert perceptual_distance(None, None, side=15) is None
    with pytest.raises(ValueError, match="at least 16 px, these pictures have 15: pass lpips=false"):
        perceptual_distance(True, None, side=15)
    from test_pipeline import parts

    tokenizer = parts("llamagen")[1]
    shown = torch.from_numpy(pictures(5, 32))
    images = Images("x", 5, lambda size: iter(shown.split(size)), None, "npz")
    done = run_through(
        tokenizer, images, None, batch_size=2, keep=5, device=torch.device("cpu"),
        perceptual=lambda a, b: (a - b).square().flatten(1).mean(1),
    )  # fmt: skip
    originals, copies = (torch.cat(side).double() for side in zip(*done.pairs))
    assert done.perceptual / 5 == pytest.approx(float((originals - copies).square().mean()) / 127.5**2, rel=1e-5)


def test_probe_reads_what_is_linear_and_nothing_else() -> None:
    drawer = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (600,), generator=drawer)
    noise = torch.randn(600, 6, generator=drawer)
    clear = torch.nn.functional.one_hot(y, 3).float() @ torch.randn(3, 6, generator=drawer) * 4 + noise
    found = linprobe.probe(clear[:500], y[:500], clear[500:], y[500:])
    assert found["probe_accuracy"] > 0.95 and 0.2 < found["chance"] < 0.5
    assert linprobe.probe(noise[:500], y[:500], noise[500:], y[500:])["probe_accuracy"] < 0.5


def test_probe_is_at_the_minimum() -> None:
    """The gradient of the regularised cross-entropy, by hand, vanishes."""
    drawer = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 4, generator=drawer, dtype=torch.float64), torch.randint(0, 3, (80,), generator=drawer)
    weight, bias = linprobe.fit(x, y, 3, 0.01)
    error = torch.softmax(x @ weight.T + bias, 1) - torch.nn.functional.one_hot(y, 3)
    assert float((error.T @ x / 80 + 0.01 * weight).abs().max()) < 1e-5 and float(error.mean(0).abs().max()) < 1e-5


def test_probe_command(tmp_path) -> None:
    from test_pipeline import parts

    from vtok.checkpoint import save_folder
    from vtok.data.digits import Digits

    save_folder(parts("llamagen")[1], tmp_path / "tokenizer", kind="tokenizer")
    data = Digits(image_size=32, batch_size=8, limit_train=120, limit_val=60)
    config = {
        "from": str(tmp_path / "tokenizer"), "weights": "ema", "device": "cpu", "train_images": None, "images": None,
        "pool": "flat", "batch_size": 32, "seed": 0, "out": None,
    }  # fmt: skip
    found = linprobe.evaluate(config, data)
    assert (tmp_path / "tokenizer" / "eval" / "linprobe.json").is_file()
    assert found["metrics"]["probe_accuracy"] > 2 * found["metrics"]["chance"], "codes of an untrained net keep shapes"
    with pytest.raises(ValueError, match="pool=max"):
        linprobe.evaluate(config | {"pool": "max"}, data)


# --- published models -------------------------------------------------------------------------------------------------

recorded_var = test_zoo.tiny  # a fixture: the recorded VAR under the name of the published one


def test_a_zoo_model_is_judged_with_its_papers_settings(recorded_var, tmp_path, capsys) -> None:
    """The images are those of sample.py from the same name, so the sums are equal bit for bit."""
    folder, _ = recorded_var
    np.savez(tmp_path / "ref.npz", arr_0=pictures(12, 32))
    common = {"from": "zoo:var-d16", "weights": str(folder), "chunk": 2, "device": "cpu", "seed": 3}
    sample(config_of("sample", **common, num_images=5, out=str(tmp_path / "s.npz")))
    judged = {"reference": str(tmp_path / "ref.npz"), "extractor": "cifar", "splits": 2, "batch_size": 2}
    files = {"samples": str(tmp_path / "s.npz"), "out": str(tmp_path / "files.json"), "device": "cpu"}
    want = evaluate(config_of("eval_fid", **judged, **files))
    config = config_of("eval_fid", **judged, **common, images=5, out=str(tmp_path / "zoo.json"))
    capsys.readouterr()
    found, said = evaluate(config), capsys.readouterr().out
    assert "guidance=2.5, schedule=linear" in said and "(the paper's settings)" in said
    assert "reported: FID 3.55" in said and "published" not in want and found["published"]["fid"] == 3.55
    assert found["moments_sha256"] == want["moments_sha256"]
    drawn = found["protocol"]
    assert drawn["guidance"] == "linear 2.5" and drawn["rule"].startswith("temperature 1, top_k 900, top_p 0.96")
    assert drawn["weights"] == "published" and drawn["rounding"] == "nearest"
    config["guidance"], config["out"] = 1.5, str(tmp_path / "mine.json")
    mine = evaluate(config)
    assert mine["protocol"]["guidance"] == "linear 1.5" and "yours: guidance" in capsys.readouterr().out
    assert mine["protocol"]["rule"] == drawn["rule"] and mine["moments_sha256"] != found["moments_sha256"]


def test_a_run_is_judged_as_sample_py_stores_and_runs_its_weights(recorded_var, tmp_path, monkeypatch) -> None:
    """The sums are those of its images under the same keys, and a killed job does not go on under others."""
    assert all({k: config_of(name)[k] for k in SPEED} == SPEED for name in ("sample", "eval_fid"))
    folder, _ = recorded_var
    np.savez(tmp_path / "ref.npz", arr_0=pictures(12, 32))
    common = {"from": "zoo:var-d16", "weights": str(folder), "chunk": 2, "device": "cpu", "seed": 3}
    speed = {"packed": False, "decoder_dtype": "bfloat16", "decode_chunk": 1}
    sample(config_of("sample", **common, **speed, num_images=5, out=str(tmp_path / "s.npz")))
    judged = {"reference": str(tmp_path / "ref.npz"), "extractor": "cifar", "splits": 2, "batch_size": 2}
    files = {"samples": str(tmp_path / "s.npz"), "out": str(tmp_path / "files.json"), "device": "cpu"}
    want = evaluate(config_of("eval_fid", **judged, **files))
    drawn = config_of("eval_fid", **judged, **common, images=5, out=str(tmp_path / "drawn.json"))
    plain = evaluate(drawn)
    for key, value in speed.items():
        drawn[key] = value
    found = evaluate(drawn)
    assert found["moments_sha256"] == want["moments_sha256"] != plain["moments_sha256"]
    said = ", packed False, decoder_dtype bfloat16, decode_chunk 1"
    assert found["protocol"]["rule"] == plain["protocol"]["rule"] + said

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.fid.finish", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(drawn)
    drawn["decoder_dtype"] = "float32"
    with pytest.raises(ValueError, match=r"parts of another job .*rule was .*decoder_dtype bfloat16"):
        evaluate(drawn)


def test_pictures_are_brought_to_the_size_that_the_paper_evaluates(recorded_var, capsys) -> None:
    folder, _ = recorded_var
    assert sample_size({"from": "zoo:llamagen-xl-384"}) == 256 and "drawn at 384 px" in capsys.readouterr().out
    assert sample_size({"from": "zoo:llamagen-l-256"}) is None and sample_size({"from": "outputs/run"}) is None
    assert sample_size({"from": "zoo:llamagen-xl-384", "sample_size": 128}) == 128
    pipeline = Pipeline.load("zoo:var-d16", weights=folder, chunk=2)
    labels, seeds = torch.tensor([0, 1]), torch.tensor([5, 6])
    tokens = pipeline.tokens(labels, seeds, guide=guidance(1.0), rule=DrawRule())
    with torch.no_grad():
        decoded = pipeline.tokenizer.decode(tokens)
    want = torch.nn.functional.interpolate(decoded, (20, 20), mode="bicubic")
    want = (want.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(pipeline(labels, seeds, size=20), want)


def test_results_of_named_models_have_a_folder_of_their_own(tmp_path) -> None:
    assert results_folder("zoo:var-d16").as_posix() == "outputs/eval/var-d16"
    assert results_folder("hf:someone/model").as_posix() == "outputs/eval/someone+model"
    assert results_folder(str(tmp_path)) == tmp_path / "eval" == results_folder(str(tmp_path / "a.ckpt"))


def test_copies_are_written_as_samples_for_the_frechet_command(tmp_path) -> None:
    originals, copies = (torch.from_numpy(pictures(5, 16, seed)) for seed in (0, 1))
    pairs = [(originals[:3], copies[:3]), (originals[3:], copies[3:])]
    write_pairs(pairs, None, None, str(tmp_path / "copies.npz"))
    assert torch.equal(torch.cat(list(from_npz(tmp_path / "copies.npz").batches(2))), copies)
