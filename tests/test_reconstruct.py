"""Reconstructing pictures of any size, and the gallery, through their commands."""

import copy
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import command
from PIL import Image
from runs import tokenizer_folder
from tokenizers import FAMILIES, SIZE, images, make
from torch import nn

from vtok import counters
from vtok.checkpoint import save_folder, write_atomic
from vtok.data.tiles import Tiling, reconstruct
from vtok.decoding import light_tokenizer
from vtok.layers.packed import packable
from vtok.noise import sample_seeds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.gallery import main as gallery_command  # noqa: E402
from scripts.gallery import prefixes  # noqa: E402
from scripts.reconstruct import main as reconstruct_command  # noqa: E402


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 1), (17, 40), (33, 5)])
def test_tiles_cover_a_picture_and_give_it_back(height, width):
    image = torch.rand(3, height, width)
    tiling = Tiling(height, width, 16)
    tiles = tiling.cut(image)
    assert tiles.shape == (tiling.rows * tiling.columns, 3, 16, 16)
    assert torch.equal(tiling.join(tiles), image)
    # a second path: the tile that holds a pixel, by division
    row, column = (height - 1) // 16, (width - 1) // 16
    corner = tiles[row * tiling.columns + column][:, (height - 1) % 16, (width - 1) % 16]
    assert torch.equal(corner, image[:, -1, -1])
    assert torch.equal(tiles[-1][:, 15, 15], image[:, -1, -1])  # padding repeats the last pixel


def test_a_tile_is_what_the_tokenizer_makes_of_it_alone():
    tokenizer = make("cnn_vq")
    image = torch.rand(3, 40, 20) * 2 - 1
    copy, tokens, tiling = reconstruct(tokenizer, image, batch=2)
    assert copy.shape == image.shape and (tiling.rows, tiling.columns) == (3, 2)
    alone = tokenizer.encode(image[None, :, 16:32, 0:16])
    assert torch.equal(tokens[2:3], alone)
    torch.testing.assert_close(copy[:, 16:32, 0:16], tokenizer.decode(alone)[0], rtol=1e-4, atol=1e-5)


class Linears(nn.Module):
    """A tokenizer of linear layers alone."""

    spec = SimpleNamespace(image_size=4)

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(48, 5), nn.Linear(5, 48)

    def encode(self, images, noise):
        return self.encoder(images.flatten(1))

    def decode(self, tokens, keep, noise):
        return self.decoder(tokens).view(-1, 3, 4, 4)


def test_a_packed_tokenizer_without_parameters_reconstructs():
    if not packable(torch.zeros(1)):
        pytest.skip("this processor has no packed products in float32")
    plain, image = Linears(), torch.rand(3, 6, 9) * 2 - 1
    fast = copy.deepcopy(plain)
    light_tokenizer(fast, torch.float32)
    assert not list(fast.parameters())
    for got, want in zip(reconstruct(fast, image)[:2], reconstruct(plain, image)[:2]):
        torch.testing.assert_close(got, want)


def test_the_commands(tmp_path):
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    other = tokenizer_folder(tmp_path / "var", "var")
    folder, drawer = tmp_path / "in", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(drawer.integers(0, 255, (20, 33, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(drawer.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / "deep" / "grey.png")
    Image.fromarray(drawer.integers(0, 255, (18, 40, 4), dtype=np.uint8)).save(folder / "rgba.png")
    words = ["scripts/reconstruct.py", f"from={tokenizer}", f"in={folder}", f"out={tmp_path / 'out'}", "device=cpu"]
    ran = command(*words)
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "out" / "a.png") as copy:
        assert copy.size == (33, 20) and copy.mode == "RGB"
    with np.load(tmp_path / "out" / "deep" / "grey.npz") as arrays:
        assert arrays["tokens"].shape == (1, 16)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"] == 3 and report["unreadable"] == []
    first = report
    (folder / "broken.png").write_bytes(b"no picture")
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    ran = command(*words)
    assert ran.returncode == 2 and "broken.png" in ran.stderr and "on_bad_image=skip" in ran.stderr
    assert "Traceback" not in ran.stderr and len(ran.stderr.splitlines()) <= 3
    ran = command(*words, "on_bad_image=skip")
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["finished_earlier"] == 3 and report["unreadable"] == ["broken.png"]
    assert report["psnr_mean"] == first["psnr_mean"]  # of copies that are there
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    (folder / "broken.png").unlink()
    for changed, said in ((f"from={other}", "tokenizer="), ("seed=1", "seed=0"), (f"out={folder}", "would replace")):
        ran = command(*words, changed)
        assert ran.returncode == 2 and said in ran.stderr and "another" in ran.stderr, ran.stderr
    shared = [*words[:3], f"out={tmp_path / 'shared'}", "device=cpu", "num_tasks=2"]
    for task in (0, 1):
        ran = command(*shared, f"task_id={task}")
        assert ran.returncode == 0, ran.stderr
    reports = [json.loads((tmp_path / "shared" / f"report_{t}_of_2.json").read_text()) for t in (0, 1)]
    assert [r["images"] for r in reports] == [2, 1] and not any(r["finished_earlier"] for r in reports)
    whole, parts = ({p.relative_to(tmp_path / n): p.read_bytes() for p in sorted((tmp_path / n).rglob("*"))
                     if p.suffix in (".png", ".npz")} for n in ("out", "shared"))  # fmt: skip
    assert whole == parts and len(parts) == 6
    ran = command(
        "scripts/gallery.py", f"from=[{tokenizer},{other}]", f"in={folder}", f"out={tmp_path / 'gallery.png'}",
        "count=2", "device=cpu",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    # original, the plain tokenizer, and one row for each of the three scales
    assert len(ran.stdout.strip().splitlines()) == 1 + 3 + 1
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.size[1] == 5 * (64 + 2)


def draw(path: Path, seed: int, height: int = 16, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Image.fromarray(pixels)


def test_a_copy_is_done_for_these_pixels_and_this_recipe_only(tmp_path, monkeypatch):
    first, other = tokenizer_folder(tmp_path / "tokenizer"), tokenizer_folder(tmp_path / "var", "var")
    folder = tmp_path / "in"
    folder.mkdir()

    def go(*more: str, out: str = "out", tokenizer: Path = first) -> tuple[int, int]:
        """(images made, finished earlier)."""
        words = [f"from={tokenizer}", f"in={folder}", f"out={tmp_path / out}", "device=cpu", *more]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words])
        reconstruct_command()
        report = json.loads((tmp_path / out / "report.json").read_text())
        return report["images"], report["finished_earlier"]

    def stopped(*more: str, tokenizer: Path = first) -> None:
        """Killed between the ids and the copy of a picture."""

        def write(path: Path, *options: object, **rest: object) -> None:
            if path.suffix == ".png":
                raise RuntimeError("killed")
            write_atomic(path, *options, **rest)

        with monkeypatch.context() as patch:
            patch.setattr("vtok.checkpoint.write_atomic", write)
            with pytest.raises(RuntimeError, match="killed"):
                go(*more, tokenizer=tokenizer)

    draw(folder / "a.png", 0)
    draw(folder / "b.png", 1)
    counters.reset()
    assert [go(), go()] == [(2, 0), (0, 2)]
    assert counters.read() == {"encode.channels_last": 2, "encode.float32": 2}
    draw(folder / "a.png", 2)  # another picture under the name
    assert [go(), go()] == [(1, 1), (0, 2)]
    draw(folder / "b.png", 3)
    stopped()
    assert go() == (1, 1)
    with np.load(tmp_path / "out" / "a.npz") as arrays:  # as earlier versions wrote it
        plain = {name: arrays[name] for name in arrays.files if "sha256" not in name}
    np.savez_compressed(tmp_path / "out" / "a.npz", **plain)
    assert go() == (1, 1)
    stopped("overwrite=true", tokenizer=other)  # b's copy is still the first tokenizer's
    assert go(tokenizer=other) == (2, 0) and go(out="fresh", tokenizer=other) == (2, 0)
    for name in ("a.png", "a.npz", "b.png", "b.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_picture_is_drawn_by_its_name(tmp_path, monkeypatch, capsys):
    """Whatever else is in the folder, and otherwise than the same pixels under another name."""
    save_folder(make("dar"), tmp_path / "dar", kind="tokenizer")
    for folder, names in (("two", "ab"), ("one", "b")):
        (tmp_path / folder).mkdir()
        for name in names:
            draw(tmp_path / folder / f"{name}.png", 0, 16, 24)

    def go(folder: str) -> dict[str, bytes]:
        words = [f"from={tmp_path / 'dar'}", f"in={tmp_path / folder}", f"out={tmp_path / f'{folder}_copies'}"]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words, "device=cpu"])
        reconstruct_command()
        return {path.stem: path.read_bytes() for path in (tmp_path / f"{folder}_copies").glob("*.png")}

    two, one = go("two"), go("one")
    assert one["b"] == two["b"] != two["a"]
    recipe = json.loads((tmp_path / "one_copies" / "recipe.json").read_text())
    del recipe["noise"]
    (tmp_path / "one_copies" / "recipe.json").write_text(json.dumps(recipe))  # of a version that drew all alike
    with pytest.raises(SystemExit):
        go("one")
    assert "copies with noise=None, asked for keyed by name; choose another out=" in capsys.readouterr().err


def test_copies_belong_to_a_tokenizer_as_it_is_set_up(tmp_path, monkeypatch, capsys):
    """Its weights do not show the size of its tiles. Folders of versions that kept the weights' hash alone go on."""
    small = tokenizer_folder(tmp_path / "small")
    described = json.loads((small / "config.json").read_text())
    large, out = tmp_path / "large", tmp_path / "out"
    large.mkdir()
    (large / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    described["arguments"]["image_size"] = 32
    (large / "config.json").write_text(json.dumps(described))
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / "a.png", 0, 20, 20)

    def go(tokenizer: Path) -> tuple[int, int]:
        """(images made, finished earlier)."""
        words = [f"from={tokenizer}", f"in={tmp_path / 'in'}", f"out={out}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words])
        reconstruct_command()
        report = json.loads((out / "report.json").read_text())
        return report["images"], report["finished_earlier"]

    assert [go(small), go(small)] == [(1, 0), (0, 1)]
    with pytest.raises(SystemExit):
        go(large)
    assert "copies with tokenizer.image_size=16, asked for 32; choose another out=" in capsys.readouterr().err
    recipe = json.loads((out / "recipe.json").read_text())
    described = recipe["tokenizer"].pop("description")
    (out / "recipe.json").write_text(json.dumps(recipe))  # as earlier versions wrote it
    with np.load(out / "a.npz") as arrays:
        older = dict(arrays) | {"recipe_sha256": np.array(hashlib.sha256(json.dumps(recipe).encode()).hexdigest())}
    np.savez_compressed(out / "a.npz", **older)
    assert [go(small), go(small)] == [(1, 0), (0, 1)]
    del described["arguments"]["decoder_blocks"]  # a version that did not know this argument
    recipe["tokenizer"]["description"] = described
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert [go(small), go(small)] == [(1, 0), (0, 1)]


def test_pictures_are_copied_and_shown_upright(tmp_path, monkeypatch):
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name in ("upright", "lying"):
        (tmp_path / name).mkdir()
    for seed in range(2):
        upright = draw(tmp_path / "upright" / f"{seed}.png", seed, 20, 33)
        upright.rotate(90, expand=True).save(tmp_path / "lying" / f"{seed}.png", exif=exif)
    made = {}
    for name in ("upright", "lying"):
        words = [f"from={tokenizer}", f"in={tmp_path / name}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words, f"out={tmp_path / f'{name}_copies'}"])
        reconstruct_command()
        made[name] = [(tmp_path / f"{name}_copies" / f"{seed}.png").read_bytes() for seed in range(2)]
        monkeypatch.setattr(sys, "argv", ["gallery.py", *words, f"out={tmp_path / f'{name}.png'}"])
        gallery_command()
        made[name].append((tmp_path / f"{name}.png").read_bytes())
    assert made["upright"] == made["lying"]
    with Image.open(tmp_path / "lying_copies" / "0.png") as copy:
        assert copy.size == (33, 20)


def test_the_report_counts_what_its_figures_are_of(tmp_path, monkeypatch, capsys):
    """PSNR of all pictures, made now or earlier; SSIM of those that its window fits."""
    (tmp_path / "in").mkdir()
    tokenizer, decibels = tokenizer_folder(tmp_path / "tokenizer"), []
    words = [f"from={tokenizer}", f"in={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words])
    for name, height, made, counted, windowed in (("a", 10, 1, 1, 0), ("b", 11, 1, 2, 1)):
        original = draw(tmp_path / "in" / f"{name}.png", 0, height, 20)
        reconstruct_command()
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert (report["images"], report["measured"], report["ssim_images"]) == (made, counted, windowed)
        assert ("ssim_gauss11" in report) == (windowed > 0)
        with Image.open(tmp_path / "out" / f"{name}.png") as copy:
            error = (np.asarray(original).astype(float) - np.asarray(copy)) / 255
        decibels.append(-10 * np.log10((error**2).mean()))
        assert report["psnr_mean"] == pytest.approx(np.mean(decibels))
    assert "SSIM of 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_whether_a_larger_image_has_more_tokens(name):
    tokenizer = make(name)
    try:
        length = tokenizer.spec_for(2 * SIZE).layout.length
    except ValueError:
        length = 0
    assert (tokenizer.grows != "no") == (length > tokenizer.spec.layout.length)


@pytest.mark.parametrize("name", ["cnn_vq", "cnn_kl", "magvit2", "maskgit_vqgan", "hita"])
def test_a_whole_picture_is_what_one_pass_makes_of_it(name):
    """Padded to the stride of 4 only; a square for Hita."""
    tokenizer, image = make(name), torch.rand(3, 18, 29) * 2 - 1
    copy, tokens, tiling = reconstruct(tokenizer, image, seed=3, whole=True)
    height, width = (32, 32) if name == "hita" else (20, 32)
    padded = np.pad(image.numpy(), ((0, 0), (0, height - 18), (0, width - 29)), mode="edge")
    with torch.no_grad():
        expected = tokenizer(torch.from_numpy(padded)[None], key=sample_seeds(3, 0, 1))
    torch.testing.assert_close(copy, expected.images[0, :, :18, :29], rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens.flatten(0, 1), expected.tokens[0])
    assert (tiling.rows, tiling.columns, tiling.side) == ((1, 1, 32) if name == "hita" else (5, 8, 4))
    assert tokens.shape[:2] == ((1, 4 + 64) if name == "hita" else (5 * 8, 1))


def test_whole_pictures_through_the_command(tmp_path, monkeypatch, capsys):
    tokenizer, other = tokenizer_folder(tmp_path / "tokenizer"), tokenizer_folder(tmp_path / "var", "var")
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / "a.png", 0, 18, 29)

    def go(source: Path, *more: str) -> None:
        words = [f"from={source}", f"in={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "device=cpu", *more]
        monkeypatch.setattr(sys, "argv", ["reconstruct.py", *words])
        reconstruct_command()

    for source, more, words in (
        (other, ["whole=true"], "VARTokenizer has no more tokens for a larger image than the 21"),
        (tokenizer, ["whole=true"], ""),
        (tokenizer, [], "holds copies with whole=True, asked for None"),
    ):
        if not words:
            go(source, *more)
            continue
        with pytest.raises(SystemExit):
            go(source, *more)
        assert words in capsys.readouterr().err
    with np.load(tmp_path / "out" / "a.npz") as arrays:
        assert arrays["tokens"].shape == (40, 1)
        assert arrays["height_width_side_rows_columns"].tolist() == [18, 29, 4, 5, 8]
    with Image.open(tmp_path / "out" / "a.png") as copy:
        assert copy.size == (29, 18)


@pytest.mark.parametrize(
    "family, changed, said",
    (
        ("var", {"keep": "2"}, "keep=2 of 21 tokens is no end of a scale: choose from (1, 5, 21)"),
        ("var", {"keep": "few"}, "keep=few: give a whole number of at least 1"),
        ("llamagen", {"keep": "2"}, "decodes whole images only"),
        ("llamagen", {"batch_size": "0"}, "batch_size=0: give a whole number of at least 1"),
        ("llamagen", {"batch_size": "true"}, "batch_size=True: give a whole number of at least 1"),
        ("llamagen", {"seed": "x"}, "seed=x: give a whole number"),
        ("llamagen", {"in": "nowhere"}, "nowhere does not exist; change in"),
        ("llamagen", {"out": "in/copies"}, "lies in in="),
    ),
)
def test_a_mistake_leaves_no_trace(family, changed, said, tmp_path, monkeypatch, capsys):
    """Above all no recipe.json, which would refuse the next try, put right, in the same folder."""
    tokenizer_folder(tmp_path / "tokenizer", family)
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / "a.png", 0)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    words = {"from": "tokenizer", "in": "in", "out": "out", "device": "cpu"} | changed
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *(f"{key}={value}" for key, value in words.items())])
    with pytest.raises(SystemExit):
        reconstruct_command()
    assert said in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "changed, said",
    (
        ({"in": "nowhere"}, "nowhere does not exist; change in\n"),
        ({"in": "tokenizer"}, "in=tokenizer holds no images; change in\n"),
        ({"count": "x"}, "count=x: give a whole number of at least 1\n"),
        ({"count": "0"}, "count=0: give a whole number of at least 1\n"),
        ({"seed": "x"}, "seed=x: give a whole number\n"),
        ({"size": "0"}, "size=0: give a whole number of at least 1\n"),
    ),
)
def test_a_mistake_of_the_gallery_names_its_key(changed, said, tmp_path, monkeypatch, capsys):
    tokenizer_folder(tmp_path / "tokenizer")
    draw(tmp_path / "a.png", 0)
    monkeypatch.chdir(tmp_path)
    words = {"from": "tokenizer", "in": "a.png", "out": "x.png", "device": "cpu"} | changed
    monkeypatch.setattr(sys, "argv", ["gallery.py", *(f"{key}={value}" for key, value in words.items())])
    with pytest.raises(SystemExit):
        gallery_command()
    assert capsys.readouterr().err.endswith(said) and not Path("x.png").exists()


def test_the_gallery_of_one_picture_is_that_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / "a.png", 0)
    for source, out in (("in", "folder.png"), ("in/a.png", "file.png")):
        words = [f"from={tokenizer_folder(tmp_path / 'tokenizer')}", f"in={tmp_path / source}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["gallery.py", *words, f"out={tmp_path / out}"])
        gallery_command()
    assert (tmp_path / "folder.png").read_bytes() == (tmp_path / "file.png").read_bytes()


def test_the_gallery_shows_images_below_the_window_of_ssim(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / "a.png", 0)
    words = [f"from={tokenizer_folder(tmp_path / 'tokenizer')}", f"in={tmp_path / 'in'}", "size=8", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["gallery.py", *words, f"out={tmp_path / 'x.png'}"])
    gallery_command()
    assert "tokenizer  " in capsys.readouterr().out and (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("name", ["var", "flexvar", "dar", "detailflow", "flextok", "retok", "restok"])
def test_the_gallery_shows_powers_of_two_or_whole_scales(name):
    tokenizer = make(name)
    shown = prefixes(tokenizer)
    assert shown == ([1, 1 + 4, 1 + 4 + 16] if name in ("var", "flexvar") else [1, 2, 4, 8])
    tokens = tokenizer.encode(images(1))
    for keep in shown:
        assert tokenizer.decode(tokens, keep=keep).shape == (1, 3, 16, 16)
