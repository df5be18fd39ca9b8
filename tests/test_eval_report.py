"""Sweeps, comparisons, the report page, and distances during training."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from runs import GENERATOR, TOKENIZER, run, state, tokenizer_folder
from test_eval import FID_CONFIG, pictures, protocol
from test_pipeline import exported

from eval import compare, fid, report, sweep
from eval.features import CifarJudge
from eval.moments import Moments, frechet_distance
from eval.sources import Images, from_data, same_images
from vgen.models import FAMILIES
from vgen.sampling import SPEED
from vtok.checkpoint import load_module, write_atomic
from vtok.data.fake import Fake
from vtok.data.files import FileSource
from vtok.data.imagefolder import ImageFolder
from vtok.data.packed import Tars
from vtok.data.transforms import to_uint8

SWEEP_CONFIG = FID_CONFIG | {
    "images": 12, "splits": 2, "weights": "ema", "tokenizer_from": None, "guidance": 1.0, "schedule": "constant",
    "schedule_options": {}, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "chunk": 4, "dtype": "float32", "seed": 0,
}  # fmt: skip


def test_sweep_measures_every_combination_once(tmp_path, capsys, monkeypatch) -> None:
    exported(tmp_path / "model")
    np.savez(tmp_path / "ref.npz", arr_0=pictures(20))
    config = SWEEP_CONFIG | {
        "from": str(tmp_path / "model"), "reference": str(tmp_path / "ref.npz"), "out": str(tmp_path / "sweep"),
    }  # fmt: skip
    axes = {"guidance": [1.0, 3.0], "top_k": [0, 2], "temperature": None}
    sweep.run(config, None, axes, (1, 2))
    found = sweep.run(config, None, axes, (0, 2))
    want = [(1.0, 0), (1.0, 2), (3.0, 0), (3.0, 2)]
    assert [(r["setting"]["guidance"], r["setting"]["top_k"]) for r in found] == want
    assert "guidance" in found[2]["protocol"] and found[2]["protocol"]["guidance"] == "constant 3"
    values = [r["metrics"]["FD[cifar]"] for r in found]
    assert len(set(values)) == 4
    capsys.readouterr()
    monkeypatch.setattr(sweep, "evaluate", None)  # nothing is measured again
    again = sweep.run(config, None, axes, (0, 1))
    assert again == found and capsys.readouterr().out.count("  done earlier") == 4
    text = list(sweep.lines(found))
    assert f"best FD[cifar] {min(values):.4f}" in text[-2] and text[1 + int(np.argmin(values))].endswith("best")
    sweep.plot(found, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    for path in (tmp_path / "sweep").glob("*.json"):  # of a version that noted the section, whatever the reference
        result = json.loads(path.read_text())
        kept = {k: v for k, v in result["asked"].items() if k not in SPEED}  # and did not know these keys
        path.write_text(json.dumps(result | {"asked": kept | {"data": {"folder": "x", "workers": 2}}}))
    assert sweep.run(config, None, axes, (0, 1)) == found
    with pytest.raises(ValueError, match="has decoder_dtype=float32, now bfloat16"):
        sweep.run(config | {"decoder_dtype": "bfloat16"}, None, axes, (0, 1))
    with pytest.raises(ValueError, match="has images=12, now 13"):
        sweep.run(config | {"images": 13}, None, axes, (0, 1))
    with pytest.raises(ValueError, match=r"has reference=.*ref\.npz, now .*other\.npz; pass another out"):
        sweep.run(config | {"reference": str(tmp_path / "other.npz")}, None, axes, (0, 1))
    with pytest.raises(ValueError, match=r"sweep\.scale"):
        sweep.settings({"scale": [1]}, config)


def test_a_sweep_measures_its_reference_once(tmp_path, monkeypatch) -> None:
    """Also where it is killed on the way, and with what neighbours need. Figures are those of eval.fid alone."""
    exported(tmp_path / "model")
    real, seen, judge = pictures(20), Counter(), CifarJudge.__call__
    np.savez(tmp_path / "ref.npz", arr_0=real)
    place = {image.tobytes(): i for i, image in enumerate(real)}
    config = SWEEP_CONFIG | {"from": str(tmp_path / "model"), "reference": str(tmp_path / "ref.npz"), "block": 8}
    config |= {"manifold": True, "out": str(tmp_path / "sweep")}
    axes, measured = {"guidance": [1.0, 3.0], "top_k": [0, 2]}, []

    def spied(self, images):
        seen.update(place.get(image.numpy().tobytes(), "drawn") for image in images)
        return judge(self, images)

    def once(*given, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(fid.evaluate(*given, **options))

    monkeypatch.setattr(CifarJudge, "__call__", spied)
    monkeypatch.setattr(sweep, "evaluate", once)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, None, axes, (0, 1))
    monkeypatch.setattr(sweep, "evaluate", fid.evaluate)
    found = sweep.run(config, None, axes, (0, 1))
    assert seen == {**dict.fromkeys(range(20), 1), "drawn": 4 * 12}
    assert {path.suffix for path in (tmp_path / "sweep").iterdir()} == {".json"}  # no parts are left
    for record in found:
        alone = fid.evaluate({**config, **record["setting"], "out": str(tmp_path / "one.json")})
        assert alone["metrics"] == record["metrics"] and alone["protocol"] == record["protocol"]


def test_sweep_goes_by_the_images_of_the_reference_not_by_their_place(tmp_path, capsys, monkeypatch) -> None:
    exported(tmp_path / "model")
    (tmp_path / "here" / "ant").mkdir(parents=True)
    for i, pixels in enumerate(pictures(20)):
        Image.fromarray(pixels).save(tmp_path / "here" / "ant" / f"{i}.png")
    config = SWEEP_CONFIG | {"from": str(tmp_path / "model"), "reference": "train", "out": str(tmp_path / "sweep")}

    def section(folder: str, **options) -> dict:
        return {"folder": str(tmp_path / folder), "image_size": 32, "cache_dir": str(tmp_path / "cache")} | options

    def data(folder: str, **options) -> ImageFolder:
        return ImageFolder(**section(folder, **options))

    def go(folder: str, **options) -> int:
        """How many settings were there already."""
        capsys.readouterr()
        asked = config | {"data": section(folder, **options)}
        sweep.run(asked, data(folder, **options), {"guidance": [1.0, 3.0]}, (0, 1))
        return capsys.readouterr().out.count("  done earlier")

    written: list[str] = []

    def write(path, *options, **rest) -> None:
        written.append(path.name)
        write_atomic(path, *options, **rest)

    looks: Counter = Counter()
    size = FileSource.file_size
    with monkeypatch.context() as patch:
        patch.setattr("vtok.checkpoint.write_atomic", write)
        patch.setattr(FileSource, "file_size", lambda self, i: looks.update([i]) or size(self, i))
        assert go("here") == 0
    assert set(looks.values()) == {1}, "the files are looked at once, not for every setting"
    for path in (tmp_path / "sweep").glob("*.json"):
        assert written.count(path.name) == 1 and "ImageFolder train 32" in json.loads(path.read_text())["asked"]["data"]
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(sweep, "evaluate", None)  # nothing is measured again
    assert go("there", workers=2, batch_size=8) == 2
    shutil.copytree(tmp_path / "there", tmp_path / "other")
    Image.new("RGB", (32, 32)).save(tmp_path / "other" / "ant" / "7.png")  # under a name that was there
    for changed in ({"image_size": 16}, {"crop": "var"}, {"upright": True}, {"limit_train": 9}, {"folder": "other"}):
        with pytest.raises(ValueError, match=r"has data=ImageFolder train 32 .*, now ImageFolder train .*another out"):
            go(**{"folder": "there"} | changed)

    def older(data: object) -> None:
        """The results as earlier versions kept `data`."""
        for path in (tmp_path / "sweep").glob("*.json"):
            result = json.loads(path.read_text())
            path.write_text(json.dumps(result | {"asked": result["asked"] | {"data": data}}))

    older(from_data(data("there"), "train").identity.partition(" files:")[0])
    assert go("there") == 2
    with pytest.raises(ValueError, match="has data="):
        go("there", upright=True)
    older({"folder": str(tmp_path / "there"), "image_size": 32, "cache_dir": str(tmp_path / "cache"), "workers": 4})
    assert go("there", workers=2, batch_size=8, flip=False, seed=3, upright=False) == 2
    for name, value, words in (("upright", True, "False, now True"), ("image_size", 16, "32, now 16")):
        with pytest.raises(ValueError, match=rf"has data\.{name}={words}; pass another out"):
            go("there", **{name: value})


def test_the_same_names_over_other_files_are_other_images(tmp_path) -> None:
    """Where there are files: also behind a cache, a limit, in a tar."""
    for name in ("a", "b"):
        (tmp_path / name / "ant").mkdir(parents=True)
        for i, pixels in enumerate(pictures(12)):
            Image.fromarray(pixels if name == "a" else pixels // 64 * 64).save(tmp_path / name / "ant" / f"{i}.png")
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / name / "ant", "ant")
        (tmp_path / f"{name}s").mkdir()
        (tmp_path / f"{name}.tar").rename(tmp_path / f"{name}s" / "x.tar")
    plain = {"image_size": 32, "cache_dir": str(tmp_path / "cache")}

    def identity(kind: type, folder: str, count: int | None = None, **options) -> str:
        return from_data(kind(folder=str(tmp_path / folder), **(plain | options)), "train", count).identity

    for options in ({}, {"cache": True}, {"limit_train": 5}):
        one, same, other = (identity(ImageFolder, folder, **options) for folder in ("a", "a", "b"))
        assert one == same != other and same_images(one.partition(" files:")[0], other)
    assert identity(ImageFolder, "a") == identity(ImageFolder, "a", cache=True)
    assert identity(ImageFolder, "a", 3) != identity(ImageFolder, "b", 3)
    packed = {"train": "*.tar", "val": "*.tar", "batch_size": 4, "num_classes": 0}
    assert identity(Tars, "as", **packed) == identity(Tars, "as", **packed) != identity(Tars, "bs", **packed)
    assert "files" not in from_data(Fake(image_size=16, batch_size=4), "train").identity


def test_a_process_asks_the_hub_once_for_a_model(tmp_path, monkeypatch) -> None:
    exported(tmp_path / "model")
    np.savez(tmp_path / "ref.npz", arr_0=pictures(20))
    asked = []
    monkeypatch.setattr("vgen.hub.snapshot_download", lambda name, **options: asked.append(name) or tmp_path / "model")
    config = SWEEP_CONFIG | {"from": "hf:somebody/swept", "reference": str(tmp_path / "ref.npz")}
    sweep.run(config | {"out": str(tmp_path / "sweep")}, None, {"guidance": [1.0, 3.0]}, (0, 1))
    assert asked == ["somebody/swept"]


def test_a_sweep_without_an_inception_score_has_its_table_and_plot(tmp_path) -> None:
    """dinov2 classifies nothing."""
    setting = dict.fromkeys(sweep.AXES)
    found = [
        {"setting": setting | {"guidance": g}, "metrics": {"FD[dinov2]": fd}, "protocol": {"images": 9}}
        for g, fd in ((1.0, 5.0), (2.0, 3.0))
    ]
    text = list(sweep.lines(found))
    assert text[0].split() == ["guidance", "FD[dinov2]"] and text[2].split() == ["2.0", "3.0000", "best"]
    sweep.plot(found, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def fake_run(folder, name: str, fd: float, **changes) -> str:
    place = folder / name
    (place / "eval").mkdir(parents=True)
    result = {
        "metrics": {"FD[cifar]": fd, "IS[cifar]": {"mean": 3.0, "std": 0.1}},
        "protocol": protocol(**changes).to_json(), "command": f"python -m eval.fid from={name} <b>",
    }  # fmt: skip
    (place / "eval" / "fid.json").write_text(json.dumps(result))
    (place / "metrics.csv").write_text("step,train/loss,val/loss\n1,2.5,\n2,2.0,1.9\n3,1.5,\n")
    (place / "pictures").mkdir()
    for step in (1, 20):
        Image.fromarray(pictures(1, 32, step)[0]).save(place / "pictures" / f"samples_{step:07d}.png")
    return str(place)


def test_numbers_under_other_protocols_are_marked(tmp_path, capsys) -> None:
    places = [
        fake_run(tmp_path, "a", 1.25),
        fake_run(tmp_path, "b", 2.5, seed=4),
        fake_run(tmp_path, "c", 0.5, images=9),
    ]
    found = compare.compare(places, tmp_path / "out")
    assert found["rows"][1] == ["a", "1.2500", "3.0000"] and found["rows"][2][1] == "2.5000"
    assert found["rows"][3][1] == "0.5000*"
    assert found["notes"][0] == "* not comparable with the first FD[cifar]: images 9, not 8"
    assert "0.5000*" in capsys.readouterr().out and (tmp_path / "out" / "table.txt").is_file()
    runs = [compare.read_run(place) for place in places]
    assert runs[0].curves["train/loss"] == [(1, 2.5), (2, 2.0), (3, 1.5)] and runs[0].curves["val/loss"] == [(2, 1.9)]
    assert runs[0].picture.name == "samples_0000020.png"
    assert Image.open(tmp_path / "out" / "grid.png").height == 3 * (32 + 16)
    likelihood = {"held_out": 4.5, "histogram": 6.5, "metrics": {"loss[held_out]": 4.5, "loss[histogram]": 6.5}}
    (tmp_path / "likelihood.json").write_text(json.dumps(likelihood))
    rows, _ = compare.table([compare.read_run(tmp_path / "likelihood.json")])
    assert rows == [["run", "loss[held_out]", "loss[histogram]"], ["likelihood", "4.5000", "6.5000"]]
    with pytest.raises(ValueError, match="does not exist"):
        compare.read_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no results"):
        compare.read_run(tmp_path / "empty")


def test_jobs_of_a_sweep_are_named_by_what_they_vary(tmp_path, capsys) -> None:
    sweep, other = tmp_path / "sweeps" / "lr", tmp_path / "sweeps" / "width"
    for folder, number, words in (
        (sweep, 0, ["model=var_small", "optimizer.lr=1e-4", "seed=0"]),
        (sweep, 1, ["model=var_small", "optimizer.lr=3e-4", "seed=0"]),
        (sweep, 2, ["model=var_small", "optimizer.lr=3e-4", "seed=1"]),
        (other, 0, ["model=var_small", "model.width=64"]),
    ):
        fake_run(folder, str(number), 2.0 + number)
        (folder / str(number) / "overrides.txt").write_text("\n".join(words) + "\n")
    fake_run(tmp_path, "baseline", 3.0)
    given = [str(sweep / "0"), str(sweep / "1"), str(sweep / "2"), str(other / "0"), str(tmp_path / "baseline")]
    names = [row[0] for row in compare.compare(given, tmp_path / "out")["rows"][1:]]
    assert names == [
        "optimizer.lr=1e-4 seed=0", "optimizer.lr=3e-4 seed=0", "optimizer.lr=3e-4 seed=1", "width/0", "baseline"
    ]  # fmt: skip
    shutil.copytree(sweep / "0", sweep / "3")  # the same once more
    names = [row[0] for row in compare.compare([*given[:2], str(sweep / "3")], tmp_path / "out")["rows"][1:]]
    assert names == [str(sweep / "0"), str(sweep / "1"), str(sweep / "3")]


def stored(images: np.ndarray, name: str) -> Images:
    data = torch.from_numpy(images)

    def span(size: int, first: int, last: int):
        return iter(data[first:last].split(size))

    return Images(name, len(images), lambda size: span(size, 0, len(images)), None, "npz", span)


def test_page_holds_everything_and_needs_nothing(tmp_path) -> None:
    places = [fake_run(tmp_path, "a", 1.25), fake_run(tmp_path, "b", 0.5, images=9)]
    train = pictures(40, 32, 3)
    samples = stored(train[[7, 30]], "samples.npz")  # recited: the nearest training image is the sample itself
    page = report.report(
        places, tmp_path / "page.html", title="A & B", samples=samples, train=stored(train, "t"), extractor=CifarJudge()
    )
    assert (tmp_path / "page.html").read_text() == page
    assert "A &amp; B" in page and "&lt;b&gt;" in page and "<b>" not in page
    for part in ("Results", "Curves", "Pictures", "Nearest", "Protocols", "Commands", "0.5000*", "images 9, not 8"):
        assert part in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.search(r"<script|@import|url\(|https?://", page)
    assert 'name="viewport"' in page and "overflow-x: auto" in page


def test_nearest_training_images_are_found(monkeypatch) -> None:
    train = pictures(40, 32, 3)
    shown = []
    monkeypatch.setattr(report, "png", lambda pixels: shown.append(pixels) or b"")
    report.neighbours_section(stored(train[[7, 30]], "s"), stored(train, "t"), CifarJudge(), nearest=2)
    gap, cell = 2, 34
    for column in range(2):
        top = [
            shown[0][gap + r * cell : gap + r * cell + 32, gap + column * cell : gap + column * cell + 32]
            for r in (0, 1)
        ]
        np.testing.assert_array_equal(top[0], top[1])


# --- during training --------------------------------------------------------------------------------------------------


def test_distance_of_samples_chooses_the_best_checkpoint(tmp_path) -> None:
    tokenizer_folder(tmp_path / "tokenizer")
    common = (
        *GENERATOR, "model=llamagen_tiny", "model.depth=1", "model.width=16", "model.heads=2", "steps=8",
        f"tokenizer_from={tmp_path / 'tokenizer'}", "logger=csv",
    )  # fmt: skip
    options = ("callbacks=fd", "callbacks.fd.images=8", "callbacks.fd.chunk=4", "callbacks.fd.extractor=cifar")
    value = run(*common, *options, "callbacks.fd.every=1", "monitor=val/fd", f"run_dir={tmp_path / 'with'}")
    plain = run(*common, f"run_dir={tmp_path / 'without'}")
    curve = compare.read_curves(tmp_path / "with" / "metrics.csv")["val/fd"]
    assert [step for step, _ in curve] == [4, 8] and value == pytest.approx(curve[-1][1], rel=1e-5)
    kept = [c for c in state(tmp_path / "with")["callbacks"].values() if "found" in c]
    assert kept[0]["step"] == 8 and kept[0]["found"]["val/fd"] == pytest.approx(value, rel=1e-5)
    assert plain is not None and not (tmp_path / "without" / "metrics.csv").read_text().count("val/fd")
    weights = [state(tmp_path / n)["state_dict"] for n in ("with", "without")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "training must not notice"
    with pytest.raises(ValueError, match="monitor=val/fd: choose one of val/loss"):
        run(*common, "monitor=val/fd", f"run_dir={tmp_path / 'wrong'}")
    with pytest.raises(ValueError, match="callbacks=fd and rfd need whole weights; pass trainer=ddp"):
        run(*common, *options, "trainer=fsdp", f"run_dir={tmp_path / 'cut'}")


def test_distance_of_reconstructions_during_training(tmp_path, monkeypatch) -> None:
    """Measured at validations `every` steps apart; the last value again from the checkpoint's averaged weights."""
    listed: list[str] = []
    monkeypatch.setattr(
        "eval.callbacks.from_data", lambda data, split, n: listed.append(split) or from_data(data, split, n)
    )
    options = ("callbacks=rfd", "callbacks.rfd.extractor=cifar", "steps=8", "objective.gan=null", "monitor=val/rfd")
    run(*TOKENIZER, *options, "callbacks.rfd.every=5", f"run_dir={tmp_path / 'seldom'}")
    assert [step for step, _ in compare.read_curves(tmp_path / "seldom" / "metrics.csv")["val/rfd"]] == [4]
    value = run(*TOKENIZER, *options, "callbacks.rfd.every=4", f"run_dir={tmp_path / 'run'}")
    curve = compare.read_curves(tmp_path / "run" / "metrics.csv")["val/rfd"]
    assert [step for step, _ in curve] == [4, 8] and listed == ["val", "val"], "a run lists its pictures once"
    tokenizer = load_module(tmp_path / "run", FAMILIES, "ema")
    data = Fake(image_size=16, train_images=40, val_images=12, batch_size=8)
    images = torch.cat(list(from_data(data, "val").batches(12)))
    with torch.no_grad():
        made = to_uint8(tokenizer.decode(tokenizer.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1)))
    sides = []
    for side in (made, images):
        moments = Moments(CifarJudge().dim)
        moments.add(CifarJudge()(side).features)
        sides.append(moments.statistics())
    assert value == pytest.approx(frechet_distance(*sides), rel=1e-4)  # a metric passes through float32
