"""The table of mistakes for the commands that read: sampling, evaluation, code extraction, images that do not open."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli_errors import check
from test_pipeline import exported

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, FID, RECONSTRUCTION = "sample.py", "eval.fid", "eval.reconstruction"
CODES, TRAIN = "scripts/cache_codes.py", "train.py"
MINE = ("tokenizer=cnn_vq_small", "data=imagefolder", "data.image_size=32", "run_dir=run")

CACHE = ("from={model}/tokenizer", "data=digits", "out=codes")

# name -> (command, its arguments, what the message must contain); {x} are places made by `places` below
MISTAKES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "sample: unknown key": (SAMPLE, ("from={model}", "clases=[1]"), ("clases",)),
    "sample: no model": (SAMPLE, (), ("from",)),
    "sample: missing run": (SAMPLE, ("from=nowhere",), ("nowhere", "does not exist")),
    "sample: empty folder": (SAMPLE, ("from={empty}",), ("{empty}", "config.json")),
    "sample: truncated weights": (SAMPLE, ("from={broken}",), ("{broken}", "damaged or truncated")),
    "sample: a tokenizer": (SAMPLE, ("from={model}/tokenizer",), ("tokenizer", "generator")),
    "sample: unknown class": (SAMPLE, ("from={model}", "classes=[3,77]"), ("unknown class 77", "0..4")),
    "sample: unknown class name": (SAMPLE, ("from={model}", "classes=[cow]"), ("cow", "ant, bee")),
    "sample: ending": (SAMPLE, ("from={model}", "out=grid.tiff"), ("grid.tiff", ".png")),
    "sample: averaged weights": (SAMPLE, ("from={model}", "weights=best"), ("weights", "ema or raw")),
    "reconstruction: missing run": (RECONSTRUCTION, ("from=nowhere", "extractor=none"), ("nowhere",)),
    "reconstruction: a generator": (RECONSTRUCTION, ("from={model}", "extractor=none"), ("tokenizer",)),
    "reconstruction: image size": (
        RECONSTRUCTION,
        ("from={model}/tokenizer", "data=digits", "data.image_size=40", "extractor=none"),
        ("data.image_size=40", "32"),
    ),
    "reconstruction: seed": (RECONSTRUCTION, ("from={model}/tokenizer", "seed=x"), ("seed=x: give a whole number",)),
    "fid: missing samples": (FID, ("samples=nowhere.npz", "reference=val", "data=digits"), ("nowhere.npz",)),
    "sample: a file for a folder": (SAMPLE, ("from={model}", "out={text}/x.png"), ("out={text}/x.png", "is a file")),
    "sample: a folder for a file": (SAMPLE, ("from={model}", "preview={empty}"), ("preview={empty} is a folder",)),
    "fid: no batch": (
        FID,
        ("samples={samples}", "reference={samples}", "batch_size=0"),
        ("batch_size=0: give a whole",),
    ),
    "fid: half an image": (
        FID,
        ("samples={samples}", "reference={samples}", "images=1.5"),
        ("images=1.5: give a whole",),
    ),
    "reconstruction: no image": (RECONSTRUCTION, ("from={model}/tokenizer", "images=0"), ("images=0: give a whole",)),
    "reconstruction: a file for a folder": (
        RECONSTRUCTION,
        ("from={model}/tokenizer", "npz={text}/x.npz", "extractor=none"),
        ("npz={text}/x.npz", "is a file"),
    ),
    "sweep: a later value": (
        "eval.sweep",
        ("from={model}", "reference={samples}", "sweep.guidance=[1,b]"),
        ("guidance=b: give a number",),
    ),
    "probe: pool": ("eval.linprobe", ("from={model}/tokenizer", "data=digits", "pool=max"), ("pool=max", "flat")),
    "vtbench: a generator": (
        "eval.vtbench",
        ("from={model}", "detail={damaged}"),
        ("give its tokenizer, {model}/tok",),
    ),
    "likelihood: no seed": ("eval.likelihood", ("from={model}", "data=digits", "seed=null"), ("seed=None: give a",)),
    "fid: nothing to measure": (FID, ("reference=val", "data=digits"), ("samples", "from")),
    "fid: a file that is no npz": (FID, ("samples={text}", "reference=val", "data=digits"), ("{text}",)),
    "fid: Inception without its weights": (
        FID,
        ("samples={samples}", "reference=val", "data=digits", "extractor=inception", "weights_path={empty}"),
        ("weights-inception-2015-12-05-6726825d.pth",),
    ),
    "codes: missing tokenizer": (CODES, ("from=nowhere", "data=digits", "out=codes"), ("nowhere",)),
    "codes: crops": (CODES, ("from={model}/tokenizer", "data=digits", "out=codes", "crops=five"), ("crops", "ten")),
    "codes: a word for a number": (CODES, (*CACHE, "shard_size=x"), ("shard_size=x: give a whole number",)),
    "codes: no GPU": (CODES, (*CACHE, "device=cuda"), ("device=cuda", "choose device=cpu or auto")),
    "train: an image that does not open": (TRAIN, (*MINE, "data.folder={damaged}"), ("bad.png", "on_bad_image")),
    "train: an empty folder": (TRAIN, (*MINE, "data.folder={empty}"), ("{empty}",)),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    found = {n: root / n for n in ("empty", "model", "broken", "damaged")}
    found["empty"].mkdir()
    for name in ("model", "broken"):
        exported(found[name])
    weights = found["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    drawer = np.random.default_rng(0)
    (found["damaged"] / "kind").mkdir(parents=True)
    for i in range(8):
        pixels = drawer.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(found["damaged"] / "kind" / f"{i}.png")
    whole = (found["damaged"] / "kind" / "0.png").read_bytes()
    (found["damaged"] / "kind" / "bad.png").write_bytes(whole[: len(whole) // 2])
    found["text"] = root / "text.npz"
    found["text"].write_text("not an archive")
    found["samples"] = root / "samples.npz"
    images = drawer.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(found["samples"], arr_0=images, arr_1=np.arange(4))
    return {k: str(v) for k, v in found.items()}


def invoke(command: str, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    if command.endswith(".py"):
        runpy.run_path(str(ROOT / command), run_name="__main__")
    else:
        monkeypatch.delitem(sys.modules, command, raising=False)
        runpy.run_module(command, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_three_lines(name, places, tmp_path, monkeypatch, capsys):
    if "no GPU" in name and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command, arguments, wanted = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        invoke(command, [a.format(**places) for a in arguments], monkeypatch)
    check(stopped.value.code, capsys.readouterr().err, [w.format(**places) for w in wanted])
    left = [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".npz", ".ckpt", ".npy")]
    assert not left


def test_unreadable_images_are_counted_and_named_when_skipping_is_asked_for(places, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    arguments = ["tokenizer=cnn_vq_small", "data=imagefolder", "data.image_size=32", f"data.folder={places['damaged']}"]
    invoke(TRAIN, [*arguments, "data.on_bad_image=skip", "debug=fast", "run_dir=run"], monkeypatch)
    assert "skipping 1 of" in caplog.text and "bad.png" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
