"""Training on continuous tokens: online and from cached latents, validated by hand, resumed exactly, sampled."""

from __future__ import annotations

import csv

import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import CONFIGS, GENERATOR, everything, losses, run, tokenizer_folder

from vgen.guidance import guidance
from vgen.models import FAMILIES
from vgen.models.mar import MAR as MARModel
from vgen.pipeline import Pipeline
from vgen.training import build_data
from vtok.checkpoint import load_folder, load_module, save_folder
from vtok.data.extract import extract
from vtok.data.module import float_images
from vtok.models.cnn import CNNTokenizer
from vtok.noise import SampleNoise, key, sample_seeds
from vtok.quantize.kl import KL

SIZES = ("depth=1", "width=32", "heads=2", "buffer=2", "steps=3", "head_depth=1", "head_width=16", "solver_steps=4")
MAR = (*GENERATOR, "model=mar_small", *(f"model.{item}" for item in SIZES), "ema=0.5")


def latent_folder(folder):
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2, 2), blocks=1, groups=4, attention=False, mid_attention=False)
    quantizer = KL(channels=4, scale=2.0)
    return save_folder(CNNTokenizer(image_size=16, quantizer=quantizer, z_channels=None, **shape), folder)


def batches(*overrides, images=False):
    """The held-out set in one batch as the run sees it: tokens, or the images before they are encoded."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=list(overrides))
    data = build_data(config, ())
    dataset = getattr(data, "data", data).val_dataset()
    items = [dataset[0, i] for i in range(len(dataset))]
    joined = {k: torch.stack([torch.as_tensor(item[k]) for item in items]) for k in items[0]}
    return data.encode(joined) if "image" in joined and not images else float_images(joined)


@pytest.fixture
def folder(tmp_path):
    return latent_folder(tmp_path / "tokenizer")


def cached(folder, out, dtype):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[*MAR, f"tokenizer_from={folder}"])
    images = build_data(config, ()).data
    extract(images, load_folder(folder, FAMILIES).eval(), out, batch=8, dtype=dtype, say=lambda line: None)
    return ("data=codes", f"data.folder={out}")


@pytest.mark.parametrize("source", ["online", "float16", "bfloat16"])
def test_the_validated_loss_by_hand(tmp_path, folder, source, capsys, monkeypatch):
    """And the MFU of its training, where a peak is known: of what these very samples show and hide."""
    monkeypatch.setattr("vtok.callbacks.peak_rate", lambda device: 1e12)
    counted, loss = [], MARModel.loss

    def watched(model, batch, **options):
        if model.training:
            counted.append(model.operations(batch["key"]))
        return loss(model, batch, **options)

    monkeypatch.setattr(MARModel, "loss", watched)
    if source == "online":
        settings = (*MAR, f"tokenizer_from={folder}")
    else:
        keep = [item for item in MAR if not item.startswith("data")]
        settings = (*keep, *cached(folder, tmp_path / "codes", source))
    out = tmp_path / "run"
    value = run(*settings, "steps=4", f"run_dir={out}")
    said = capsys.readouterr().out
    assert "vocabulary continuous, 4 channels an image" in said and "decoder parameters x (buffer + tokens)" in said
    with open(out / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["speed/mfu"]]
    work = [float(r["speed/mfu"]) * 1e12 / float(r["speed/images_per_second"]) for r in rows]
    assert len(set(counted)) > 1 and work == pytest.approx(counted, rel=1e-4), "a line and a batch a step"
    row, batch = losses(out)[-1], batches(*settings)
    assert batch["tokens"].shape[1:] == (16, 4) and batch["tokens"].dtype == torch.float32
    for weights, suffix in (("ema", ""), ("raw", "_raw")):
        model = load_module(out, FAMILIES, weights).eval()
        with torch.no_grad():
            found = model.loss(batch)["nats"]
        assert float(row[f"val/loss{suffix}"]) == pytest.approx(float(found.mean()), rel=1e-4)
    assert value == pytest.approx(float(row["val/loss"]), rel=1e-5)


@pytest.mark.parametrize("dtype, precision", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_cached_latents_are_keyed_draws_of_the_posterior(tmp_path, folder, dtype, precision):
    """Rounded to the precision in which they are stored; the key is that of (seed, epoch 0, image, crop 0)."""
    keep = [item for item in MAR if not item.startswith("data")]
    stored = batches(*keep, *cached(folder, tmp_path / "codes", dtype))
    images = batches(*MAR, f"tokenizer_from={folder}", images=True)["image"]
    keys = torch.tensor([key(0, 0, i, 0) for i in range(len(images))])
    exact = load_folder(folder, FAMILIES).eval().encode(images, noise=SampleNoise(keys))
    torch.testing.assert_close(stored["tokens"], exact, rtol=precision, atol=1e-5)


def test_a_resumed_run_is_the_run_and_its_samples_are_drawn(tmp_path, folder):
    base = (*MAR, f"tokenizer_from={folder}", "steps=4")
    run(*base, f"run_dir={tmp_path / 'whole'}", "picture_every=4")
    run(*base, f"run_dir={tmp_path / 'parts'}", "stop_after=2", "picture_every=4")
    run(*base, f"run_dir={tmp_path / 'parts'}", "resume=last", "picture_every=4")
    assert everything(tmp_path / "whole") == everything(tmp_path / "parts")
    assert list((tmp_path / "whole" / "pictures").glob("*.png"))
    pipeline = Pipeline.load(tmp_path / "whole", chunk=3)
    images = pipeline(torch.arange(4), sample_seeds(0, 0, 4), guidance=2.0)
    assert images.shape == (4, 16, 16, 3) and images.dtype == torch.uint8
    assert torch.equal(pipeline(torch.arange(4), sample_seeds(0, 0, 4), guidance=2.0), images)
    part = pipeline(torch.arange(3), sample_seeds(0, 0, 3), guidance=guidance(2.0))
    assert torch.equal(part, images[:3])


def test_ids_are_refused_with_the_reason(tmp_path):
    folder = tokenizer_folder(tmp_path / "ids")
    with pytest.raises(ValueError, match="these are ids"):
        run(*MAR, f"tokenizer_from={folder}", "steps=1", f"run_dir={tmp_path / 'run'}")


def test_noise_of_the_encoder_is_keyed(folder):
    """Two epochs see two draws of the posterior, two runs the same."""
    tokenizer = load_folder(folder, FAMILIES).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    one, two = (tokenizer.encode(images, noise=SampleNoise(sample_seeds(seed, 0, 2))) for seed in (0, 1))
    assert torch.equal(tokenizer.encode(images, noise=SampleNoise(sample_seeds(0, 0, 2))), one)
    assert not torch.allclose(one, two) and not torch.allclose(one, tokenizer.encode(images))
