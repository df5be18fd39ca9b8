"""VTBench's tasks on local pictures: fitting, detail, reading, and the command with tokenizers of known effect."""

from __future__ import annotations

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import make
from torch import Tensor, nn

from eval import ocr, vtbench
from eval.ocr import ErrorRates, edits, find_reader
from eval.vtbench import Detail, fine, fitted, to_bytes

CONFIG = {
    "from": "a", "pictures": None, "detail": None, "text": None, "weights": "ema", "trust": [], "fit": "crop",
    "rounding": "nearest", "upright": True, "ocr": "none", "languages": [], "lpips": None, "lpips_path": None,
    "batch_size": 4, "device": "cpu", "save": None, "out": None,
}  # fmt: skip


class Known(nn.Module):
    """A tokenizer whose copies are a given function of the pictures."""

    def __init__(self, side: int, change=lambda x: x) -> None:
        super().__init__()
        self.spec, self.change = SimpleNamespace(image_size=side), change
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor, *, noise: object = None) -> Tensor:
        return images

    def decode(self, tokens: Tensor, *, keep: object = None, noise: object = None) -> Tensor:
        return self.change(tokens)


def measure(monkeypatch, tokenizer: nn.Module, out, **changes) -> dict:
    monkeypatch.setattr(vtbench, "load_tokenizer", lambda config: tokenizer)
    monkeypatch.setattr(vtbench, "weights_hash", lambda config: "h")
    return vtbench.evaluate(CONFIG | {"out": str(out)} | changes)


def folder_of(place, sizes: dict[str, tuple[int, int]], texts: dict[str, str] | None = None):
    place.mkdir()
    for i, (name, (width, height)) in enumerate(sizes.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
    for name, text in (texts or {}).items():
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(place)


# --- reading ---------------------------------------------------------------------------------------------------------


def by_recursion(a: str, b: str) -> int:
    @functools.cache
    def walk(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(walk(i - 1, j) + 1, walk(i, j - 1) + 1, walk(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return walk(len(a), len(b))


def test_edits_equal_the_definition() -> None:
    assert edits("kitten", "sitting") == 3 and edits("", "abc") == 3 and edits("abc", "") == 3 and edits("", "") == 0
    assert edits(["the", "cat", "sat"], ["cat", "sat", "down"]) == 2
    drawer = np.random.default_rng(0)
    for _ in range(40):
        a, b = ("".join(drawer.choice(list("abc"), drawer.integers(0, 12))) for _ in range(2))
        assert edits(a, b) == by_recursion(a, b)


def test_rates_are_of_the_whole_set_and_ignore_spacing() -> None:
    rates = ErrorRates()
    rates.add("one two\n three", "one  two three")
    assert rates.result() == {"cer": 0.0, "wer": 0.0}
    rates.add("abcd", "abxd")
    assert rates.result() == {"cer": 1 / 17, "wer": 1 / 4}
    with pytest.raises(ValueError, match="empty"):
        ErrorRates().result()


def test_a_reader_is_found_or_named(monkeypatch) -> None:
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    assert find_reader("auto", []) is None and find_reader("none", []) is None
    with pytest.raises(ValueError, match="tesseract is not installed: no OCR was found: install the tesseract program"):
        find_reader("tesseract", [])
    with pytest.raises(ValueError, match="ocr=paper: choose auto"):
        find_reader("paper", [])
    with pytest.raises(ValueError, match="no module my_reader"):
        find_reader("my_reader:read", [])


NEEDS_TESSERACT = pytest.mark.skipif(ocr.shutil.which("tesseract") is None, reason="needs the tesseract program")


def page_of(lines: list[str]) -> Image.Image:
    """Black words on white, 256 x 256, one line below the other."""
    picture = Image.new("RGB", (256, 256), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((16, 20 + 48 * i), line, fill="black", font=ImageFont.load_default(30))
    return picture


@NEEDS_TESSERACT
def test_tesseract_reads_words_and_names_missing_languages() -> None:
    name, read = find_reader("tesseract", ["eng"])
    assert name == "tesseract" and ocr.plain(read(np.asarray(page_of(["Seven green", "bottles"])))) == (
        "Seven green bottles"
    )
    assert ocr.plain(find_reader("auto", [])[1](np.full((64, 64, 3), 255, np.uint8))) == ""
    with pytest.raises(ValueError, match=r"languages=klingon: tesseract has .*eng"):
        find_reader("tesseract", ["eng", "klingon"])


@NEEDS_TESSERACT
@pytest.mark.parametrize(("side", "lowest", "highest"), [(1, 0.0, 0.0), (16, 0.5, 2.0)], ids=["exact", "coarse"])
def test_a_coarse_copy_is_read_worse_than_its_original(tmp_path, monkeypatch, side, lowest, highest) -> None:
    """Copies whose squares of 16 px are their mean hold no letters of 30 px; exact copies read as the originals do."""
    place = tmp_path / "text"
    place.mkdir()
    for i, lines in enumerate((["Seven green", "bottles"], ["The quick fox", "jumps over", "a lazy dog"])):
        page_of(lines).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")

    def squares(x: Tensor) -> Tensor:
        return nn.functional.interpolate(nn.functional.avg_pool2d(x, side), scale_factor=side)

    found = measure(monkeypatch, Known(256, squares), tmp_path / "v.json", text=str(place), ocr="tesseract")
    assert found["ocr"] == "tesseract"
    assert found["metrics"]["text_cer_originals"] == found["metrics"]["text_wer_originals"] == 0.0
    assert lowest <= found["metrics"]["text_cer"] <= highest and lowest <= found["metrics"]["text_wer"] <= highest


# --- pictures --------------------------------------------------------------------------------------------------------


def test_fitting_covers_contains_or_leaves() -> None:
    picture = Image.new("RGB", (300, 150))
    assert fitted(picture, 64, "crop").size == (64, 64) and fitted(picture, 64, "pad").size == (64, 32)
    assert fitted(picture, 64, "tiles").size == (300, 150)
    assert fitted(Image.new("RGB", (9, 20)), 64, "crop").size == (64, 64), "small ones are enlarged"
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 40:] = 255
    middle = np.asarray(fitted(Image.fromarray(halves), 40, "crop"))
    assert (middle[:, :20] == 0).all() and (middle[:, 20:] == 255).all(), "the middle is kept"


def test_detail_of_known_copies() -> None:
    images = torch.randint(0, 256, (3, 24, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for copies, kept, error in ((images, 1.0, 0.0), (torch.full_like(images, 90), 0.0, 1.0), (255 - images, 1.0, 4.0)):
        detail = Detail()
        for part in (slice(0, 2), slice(2, 3)):
            detail.add(images[part], copies[part])
        assert detail.result() == pytest.approx({"detail_kept": kept, "detail_error": error}, abs=1e-9)
    empty = Detail()
    empty.add(torch.zeros_like(images), images)
    assert empty.result() == {}
    ramp = torch.linspace(0, 1, 40, dtype=torch.float64).expand(1, 3, 40, 40)
    assert float(fine(ramp)[..., 8:-8].abs().max()) < 1e-12, "a ramp has no fine structure"


def test_rounding_and_truncation() -> None:
    greys = torch.tensor([-1.2, -1.0, -0.999, 0.0, 0.999, 1.0]).view(1, 1, 6).expand(3, 1, 6)
    assert to_bytes(greys, "nearest")[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]
    assert to_bytes(greys, "truncate")[0, :, 0].tolist() == [0, 0, 0, 127, 254, 255]


# --- the command -----------------------------------------------------------------------------------------------------


def test_an_exact_tokenizer_loses_nothing_in_any_fit(tmp_path, monkeypatch) -> None:
    places = {task: folder_of(tmp_path / task, {"a": (50, 30), "b": (31, 64)}) for task in ("pictures", "detail")}
    for fit in ("crop", "pad", "tiles"):
        found = measure(monkeypatch, Known(32), tmp_path / "v.json", fit=fit, save=str(tmp_path / fit), **places)
        metrics = found["metrics"]
        assert metrics["pictures_count"] == 2 and metrics["detail_psnr_mean"] == pytest.approx(100)
        assert metrics["detail_ssim_gauss11"] == pytest.approx(1) and metrics["detail_detail_kept"] == pytest.approx(1)
        assert json.loads((tmp_path / "v.json").read_text())["metrics"] == metrics
    assert Image.open(tmp_path / "tiles" / "detail" / "a.png").size == (100, 30)
    assert not any("rFID" in name for name in metrics)


def test_pictures_are_turned_unless_told(tmp_path, monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "lying").mkdir()
    Image.fromarray(pixels).save(tmp_path / "lying" / "a.png", exif=exif)
    for upright, shown in ((True, np.rot90(pixels, -1)), (False, pixels)):
        out, save = tmp_path / "v.json", str(tmp_path / str(upright))
        folder = str(tmp_path / "lying")
        found = measure(monkeypatch, Known(32), out, fit="tiles", save=save, upright=upright, pictures=folder)
        pair = np.asarray(Image.open(tmp_path / str(upright) / "pictures" / "a.png"))
        np.testing.assert_array_equal(pair, np.concatenate([shown, shown], axis=1))
        assert found["upright"] is upright


def test_a_picture_is_drawn_by_its_place(tmp_path, monkeypatch) -> None:
    """One picture under two names is drawn twice."""
    place, save = tmp_path / "pictures", tmp_path / "pairs"
    place.mkdir()
    for name in "ab":
        Image.new("RGB", (16, 16), (90, 120, 150)).save(place / f"{name}.png")
    measure(monkeypatch, make("dar"), tmp_path / "v.json", pictures=str(place), save=str(save))
    first, second = ((save / "pictures" / f"{name}.png").read_bytes() for name in "ab")
    assert first != second


def test_a_darker_copy_has_the_psnr_of_its_darkness(tmp_path, monkeypatch) -> None:
    """Copies 10 grey levels off everywhere, of one grey: 20 log10(255 / 10) dB, and no detail to speak of."""
    (tmp_path / "grey").mkdir()
    Image.new("RGB", (40, 40), (120, 120, 120)).save(tmp_path / "grey" / "g.png")
    tokenizer = Known(32, lambda x: x - 10 / 127.5)
    metrics = measure(monkeypatch, tokenizer, tmp_path / "v.json", pictures=str(tmp_path / "grey"))["metrics"]
    assert metrics["pictures_psnr_mean"] == pytest.approx(20 * np.log10(25.5), abs=1e-6)
    assert "pictures_detail_kept" not in metrics


def test_small_pictures_are_measured_where_the_windows_fit(tmp_path, monkeypatch) -> None:
    """SSIM's 11 pixels, LPIPS' 16: the others' means are of fewer pictures."""
    sizes = {"a": (40, 10), "b": (40, 11), "c": (30, 40)}
    both, large = folder_of(tmp_path / "both", sizes), folder_of(tmp_path / "large", {"x": (1, 1), **sizes})
    for name in ("x", "a"):
        (tmp_path / "large" / f"{name}.png").unlink()  # the same drawn pixels without the smallest

    def distance(*_, **__):
        return lambda a, b: (a - b).abs().sum() * 0 + min(a.shape[2:])

    monkeypatch.setattr("eval.reconstruction.perceptual_distance", distance)
    found = {}
    for name, folder in (("both", both), ("large", large)):
        tokenizer = Known(32, lambda x: (x * 0.9).clamp(-1, 1))
        found[name] = measure(monkeypatch, tokenizer, tmp_path / "v.json", pictures=folder, fit="tiles")["metrics"]
    assert found["both"]["pictures_count"] == 3 and found["both"]["pictures_ssim_images"] == 2
    assert found["both"]["pictures_lpips_images"] == 1 and found["both"]["pictures_lpips_vgg"] == 30
    for key in ("ssim_gauss11", "detail_kept", "detail_error", "ssim_images"):
        assert found["large"][f"pictures_{key}"] == pytest.approx(found["both"][f"pictures_{key}"], rel=1e-2), key
    tiny = measure(monkeypatch, Known(8), tmp_path / "v.json", pictures=both)["metrics"]
    assert tiny == {"pictures_count": 3, "pictures_psnr_mean": 100, "pictures_psnr_set": 100, "pictures_ssim_images": 0}


def test_text_is_read_from_copies_and_originals(tmp_path, monkeypatch, capsys) -> None:
    """A reader that sees how bright a picture is: right on originals but for one letter, wrong on dark copies."""
    place = tmp_path / "text"
    place.mkdir()
    Image.new("RGB", (32, 32), (200, 200, 200)).save(place / "p.png")
    (place / "p.txt").write_text("big words", encoding="utf-8")
    module = SimpleNamespace(read=lambda picture: "bag words" if picture.mean() > 150 else "x")
    monkeypatch.setitem(sys.modules, "my_reader", module)
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: name == "my_reader" or None)
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    darker = Known(32, lambda x: x - 1)
    options = {"text": str(place), "ocr": "my_reader:read"}
    found = measure(monkeypatch, darker, tmp_path / "v.json", **options)
    assert found["ocr"] == "my_reader:read" and found["metrics"]["text_wer"] == 1.0
    assert found["metrics"]["text_cer"] == pytest.approx(1.0) and found["metrics"]["text_cer_originals"] == 1 / 9
    without = measure(monkeypatch, darker, tmp_path / "v.json", **options | {"ocr": "auto"})
    assert "text: pixels only, no OCR was found" in capsys.readouterr().out
    assert "text_cer" not in without["metrics"] and "text_psnr_mean" in without["metrics"]
    (place / "p.txt").unlink()
    with pytest.raises(ValueError, match=r"p\.txt is missing"):
        measure(monkeypatch, None, tmp_path / "v.json", **options)  # before a tokenizer is loaded


def test_mistakes_are_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="detail=<folder>"):
        measure(monkeypatch, Known(32), tmp_path / "v.json")
    with pytest.raises(ValueError, match="fit=stretch: choose crop, pad, tiles"):
        measure(monkeypatch, Known(32), tmp_path / "v.json", detail=str(tmp_path), fit="stretch")
    with pytest.raises(ValueError, match="holds no images"):
        measure(monkeypatch, Known(32), tmp_path / "v.json", detail=str(tmp_path))


def test_a_stored_tokenizer_is_loaded_by_the_command(tmp_path) -> None:
    from test_pipeline import parts

    from vtok.checkpoint import save_folder

    save_folder(parts("llamagen")[1], tmp_path / "tokenizer", kind="tokenizer")
    place = folder_of(tmp_path / "detail", {"a": (40, 60)})
    found = vtbench.evaluate(CONFIG | {"from": str(tmp_path / "tokenizer"), "detail": place})
    assert (tmp_path / "tokenizer" / "eval" / "vtbench.json").is_file()
    assert found["metrics"]["detail_psnr_mean"] < 30 and "sha256" in found["tokenizer"]
