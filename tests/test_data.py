"""Data modules: batches as a pure function of the step, pixels against independent oracles, files that are broken."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch._utils import ExceptionWrapper

from vtok.data import files
from vtok.data.archive import UnsafeArchive, unpack
from vtok.data.cifar import CLASSES, Cifar10
from vtok.data.digits import Digits, enlarge, held_out_digits, read_digits
from vtok.data.fake import Fake
from vtok.data.files import BadImage, Names, list_images, read_image
from vtok.data.imagefolder import ImageFolder, file_source, find, read_class_file, split_by_hash
from vtok.data.module import EvaluationBatches, StepBatches, float_images
from vtok.data.sources import Limited, name_given
from vtok.data.transforms import (
    Draws,
    ImageTransform,
    center_crop,
    random_crop,
    resize_crop,
    ten_crop,
    to_float,
    to_rgb,
    to_uint8,
)
from vtok.noise import key

SHARED = Path(__file__).parents[2] / "shared"


def noise_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- batches ----------------------------------------------------------------------------------------------------------


def stream(size: int, seed: int, count: int) -> list[tuple[int, int]]:
    """The endless stream of (epoch, index), written out epoch by epoch."""
    places: list[tuple[int, int]] = []
    for epoch in itertools.count():
        order = torch.randperm(size, generator=torch.Generator().manual_seed(key(seed, epoch)))
        places += [(epoch, i) for i in order.tolist()]
        if len(places) >= count:
            return places[:count]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_are_the_stream_for_every_world_size(world, accumulate):
    batch, steps, size = 8, 7, 19  # 19 is no multiple of 8: batches span epochs
    ranks = [
        itertools.islice(
            StepBatches(size=size, batch_size=batch, accumulate=accumulate, rank=r, world=world, seed=5),
            steps * accumulate,
        )
        for r in range(world)
    ]
    found = [place for micro in zip(*ranks) for part in micro for place in part]
    assert found == stream(size, 5, batch * steps)


def test_every_epoch_holds_every_item_once():
    places = [p for b in itertools.islice(StepBatches(size=10, batch_size=4, seed=0), 10) for p in b]
    for epoch in range(4):
        assert sorted(i for e, i in places if e == epoch) == list(range(10))
    assert [i for e, i in places if e == 0] != [i for e, i in places if e == 1]


def test_start_is_a_position_in_the_same_stream():
    whole = list(itertools.islice(StepBatches(size=11, batch_size=6, accumulate=2, seed=3), 20))
    later = StepBatches(size=11, batch_size=6, accumulate=2, seed=3, start=14)
    assert list(itertools.islice(later, 6)) == whole[14:]
    assert StepBatches(size=11, batch_size=6, accumulate=2, seed=3).batch(17) == whole[17]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [4, 5, 10, 17, 101])
def test_evaluation_covers_every_item_once_over_the_ranks(world, size, batch_size):
    ranks = [EvaluationBatches(size=size, batch_size=batch_size, rank=r, world=world) for r in range(world)]
    found = [i for rank in ranks for batch in rank for _, i in batch]
    assert sorted(found) == list(range(size))
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    assert len({len(rank) for rank in ranks}) == 1  # or sharded weights would wait for each other for ever
    sizes = {len(batch) for rank in ranks for batch in rank}
    assert 0 not in sizes and max(sizes) <= max(batch_size, 2 if world > 1 and batch_size == 1 else batch_size)
    if world == 1:
        assert [len(batch) for batch in ranks[0]][:-1] == [batch_size] * (len(ranks[0]) - 1)


def test_fewer_held_out_images_than_processes_are_named():
    with pytest.raises(ValueError, match="3 held-out images are fewer than the 4 processes"):
        EvaluationBatches(size=3, batch_size=2, rank=0, world=4)


def test_batch_size_must_divide():
    with pytest.raises(ValueError, match=r"batch_size=6 .*devices \(2\) x accumulate \(2\)"):
        StepBatches(size=10, batch_size=6, accumulate=2, world=2, seed=0)
    with pytest.raises(ValueError, match="accumulate"):
        Digits(batch_size=5, accumulate=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        Digits(batch_size=0)


def fake(**changes) -> Fake:
    arguments = {"image_size": 16, "batch_size": 8, "flip": True, "shift": 2, "train_images": 21, "val_images": 10}
    return Fake(**(arguments | changes))


def test_workers_change_nothing():
    for loader in ("train_dataloader", "val_dataloader"):
        none, two = (getattr(fake(workers=w), loader)() for w in (0, 2))
        pairs = list(zip(itertools.islice(none, 6), itertools.islice(two, 6)))
        assert len(pairs) == (6 if loader == "train_dataloader" else 2)
        assert all(same(a, b) for a, b in pairs)


def test_start_gives_the_later_batches_of_one_run():
    data = fake(accumulate=2)
    whole = list(itertools.islice(data.train_dataloader(), 12))
    later = list(itertools.islice(data.train_dataloader(start=4), 4))
    assert all(same(a, b) for a, b in zip(whole[8:], later, strict=True))


def test_loaders_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    next(iter(fake().train_dataloader()))
    next(iter(fake().val_dataloader()))
    assert torch.equal(torch.rand(3), expected)


def test_item_fields_and_augmentation_are_keyed():
    data = fake()
    train, val = data.train_dataset(), data.val_dataset()
    item = train[(3, 5)]
    assert item["key"] == key(0, 3, 5) and item["index"] == 5 and item["label"] == 5
    assert torch.equal(item["image"], fake(batch_size=4).train_dataset()[(3, 5)]["image"])
    plain = torch.from_numpy(data.sources.train[5][0])
    versions = [train[(e, 5)]["image"] for e in range(20)]
    assert len({v.numpy().tobytes() for v in versions}) > 10
    assert any(torch.equal(v, plain.flip(1)) or not torch.equal(v, plain) for v in versions)
    assert all(np.array_equal(val[(0, i)]["image"], data.sources.val[i][0]) for i in range(10))


def test_a_seed_changes_order_and_augmentation_but_no_picture():
    a, b = fake(seed=0), fake(seed=1)
    assert not torch.equal(next(iter(a.train_dataloader()))["index"], next(iter(b.train_dataloader()))["index"])
    pictures = [next(iter(d.val_dataloader())) for d in (a, b)]
    assert torch.equal(pictures[0]["image"], pictures[1]["image"])


def test_limits_keep_the_classes():
    data = fake(limit_train=10, limit_val=5, train_images=100, num_classes=0)
    assert (data.train_size, data.val_size, data.num_classes, data.class_names) == (10, 5, 0, [])
    digits = Digits(limit_train=100)
    assert digits.train_size == 100 and len({digits.sources.train[i][1] for i in range(100)}) == 10
    with pytest.raises(ValueError, match="limit_train"):
        fake(limit_train=0)


class Recorder(L.LightningModule):
    """Records the samples that it sees; one parameter so that there is something to step."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), seen

    def training_step(self, batch, batch_idx):
        digest = hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
        self.seen.append((batch["index"].tolist(), digest))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, steps: int, seen: list, resume: str | None = None, workers: int = 0, **changes) -> L.Trainer:
    data = fake(batch_size=6, accumulate=2, workers=workers)
    options = {"accumulate_grad_batches": 2} | changes
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(Recorder(seen), data, ckpt_path=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_resuming_under_lightning_continues_the_stream(tmp_path):
    whole, first, second = [], [], []
    fit(tmp_path, 9, whole)
    fit(tmp_path, 5, first).save_checkpoint(tmp_path / "a.ckpt")  # step 5 is in the middle of epoch 1
    fit(tmp_path, 9, second, resume=str(tmp_path / "a.ckpt"), workers=2)
    assert len(whole) == 18 and first + second == whole


@pytest.mark.filterwarnings("ignore")
def test_accumulation_of_trainer_and_data_must_agree(tmp_path):
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        fit(tmp_path, 1, [], accumulate_grad_batches=1)


# --- pixels -----------------------------------------------------------------------------------------------------------


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def resample(pixels: np.ndarray, kernel, height: int, width: int) -> np.ndarray:
    """Antialiased resize from its definition: every output is a weighted mean, the kernel stretched when shrinking.

    Columns first, then rows; like Pillow, to whole grey levels in between.
    """
    for axis, size in ((1, width), (0, height)):
        length = pixels.shape[axis]
        centre = (np.arange(size)[:, None] + 0.5) * length / size
        weights = kernel((np.arange(length) + 0.5 - centre) / max(length / size, 1.0))
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.floor(np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis) + 0.5).clip(0, 255)
    return pixels


def adm_oracle(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop: halve by box, then bicubic, then the middle."""
    pixels = pixels.astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resample(pixels, box, pixels.shape[0] // 2, pixels.shape[1] // 2)
    scale = size / min(pixels.shape[:2])
    height, width = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    pixels = resample(pixels, cubic, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (64, 64), (50, 41), (200, 90), (130, 130), (20, 31), (64, 32)])
def test_adm_crop_equals_its_definition(width, height):
    image = noise_image(width, height)
    error = np.abs(np.asarray(center_crop(image, 32)) - adm_oracle(np.asarray(image), 32))
    assert error.max() <= 1 and error.mean() < 0.01  # Pillow's weights have 22 bits: ties may round the other way


def test_adm_crop_by_hand():
    image = noise_image(32, 32)
    assert center_crop(image, 32).tobytes() == image.tobytes()
    wide = noise_image(48, 32, 1)
    assert np.array_equal(np.asarray(center_crop(wide, 32)), np.asarray(wide)[:, 8:40])
    double = np.asarray(noise_image(64, 64, 2)).astype(int)
    pairs = (double[:, ::2] + double[:, 1::2] + 1) // 2  # Pillow averages columns, rounds, then averages rows
    means = (pairs[::2] + pairs[1::2] + 1) // 2
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(double.astype(np.uint8)), 32)), means)


def test_adm_random_crop_covers_its_range():
    image = noise_image(40, 32)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    spans = set()
    for seed in range(200):
        crop = random_crop(Image.fromarray(ramp), 64, Draws(seed))
        assert crop.size == (64, 64)
        spans.add(int(np.asarray(crop)[0, -2, 0]) - int(np.asarray(crop)[0, 1, 0]))
    # a crop covers 0.8..1 of the side, 256 grey levels: 61 of 63 steps between the second and the last but one pixel
    assert 0.8 * 256 * 61 / 64 - 4 <= min(spans) < 200 and 240 < max(spans) <= 256 * 61 / 64 + 4
    crops = {random_crop(image, 32, Draws(s), low=1.0).tobytes() for s in range(100)}
    windows = {np.ascontiguousarray(np.asarray(image)[:, x : x + 32]).tobytes() for x in range(9)}
    assert crops == windows


@pytest.mark.parametrize("width, height", [(60, 45), (45, 61), (100, 100)])
def test_var_and_ten_crops_equal_torchvision(width, height):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image = noise_image(width, height)
    resized = F.resize(image, 36, interpolation=InterpolationMode.LANCZOS)
    assert resize_crop(image, 32, None).tobytes() == F.center_crop(resized, [32, 32]).tobytes()
    windows = {
        F.crop(resized, y, x, 32, 32).tobytes() for y in range(resized.height - 31) for x in range(resized.width - 31)
    }
    found = {resize_crop(image, 32, Draws(s)).tobytes() for s in range(300)}
    assert found <= windows and len(found) > 0.6 * min(len(windows), 100)
    resized = F.resize(image, 32, interpolation=InterpolationMode.BICUBIC)
    windows = {
        F.crop(resized, y, x, 32, 32).tobytes() for y in range(resized.height - 31) for x in range(resized.width - 31)
    }
    short = ImageTransform(size=32, crop="short")
    assert {short(image, Draws(s)).tobytes() for s in range(100)} == windows  # every place of it, and none else
    assert short(image).tobytes() == center_crop(image, 32).tobytes()
    expected = F.ten_crop(center_crop(image, 35), [32, 32])
    assert [c.tobytes() for c in ten_crop(image, 32)] == [c.tobytes() for c in expected]
    one = ImageTransform(size=32, crop="ten")
    drawn = [one(image, Draws(s)).tobytes() for s in range(300)]
    assert set(drawn) == {c.tobytes() for c in expected} and one(image).tobytes() == center_crop(image, 32).tobytes()
    assert all(10 < drawn.count(c.tobytes()) < 50 for c in expected)  # 30 expected, 4 sigma of 5.2


def test_flip_and_shift():
    image = np.asarray(noise_image(8, 8))
    transform = ImageTransform(size=8, flip=True)
    assert {transform(image, Draws(s)).tobytes() for s in range(20)} == {
        image.tobytes(),
        np.ascontiguousarray(image[:, ::-1]).tobytes(),
    }
    moved = {ImageTransform(size=8, shift=1)(image, Draws(s)).tobytes() for s in range(200)}
    index = np.arange(8)
    expected = {
        np.ascontiguousarray(image[np.clip(index + y, 0, 7)][:, np.clip(index + x, 0, 7)]).tobytes()
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    }
    assert moved == expected
    assert np.array_equal(ImageTransform(size=8, flip=True, shift=3, window=3)(image), image)
    cut = {ImageTransform(size=8, window=5)(image, Draws(s)).tobytes() for s in range(400)}
    whole = [np.ascontiguousarray(image[y : y + 5, x : x + 5]) for y in range(4) for x in range(4)]
    assert cut == {square.tobytes() for square in whole}
    for side in (0, 17):
        with pytest.raises(ValueError, match=f"data.window={side} must lie in 1..16"):
            Fake(image_size=16, window=side)


def test_draws_are_uniform_and_independent():
    draws = Draws(3)
    values = np.array([draws.below(7) for _ in range(7000)])
    chi = ((np.bincount(values, minlength=7) - 1000) ** 2 / 1000).sum()
    assert chi < 22.5  # 99.9 % of chi-squared with 6 degrees of freedom
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(7000)
    again = Draws(3)
    assert [again.below(7) for _ in range(5)] == values[:5].tolist()


ON_A_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_a_batch_of_uint8_becomes_floats_as_numpy_divides(device):
    values = (np.arange(2 * 16 * 24 * 3) % 256).astype(np.uint8).reshape(2, 16, 24, 3)
    wanted = values.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    label = torch.arange(2)
    found = float_images({"image": torch.from_numpy(values).to(device), "label": label})
    assert found["label"] is label and found["image"].device.type == device and found["image"].is_contiguous()
    assert np.array_equal(found["image"].cpu().numpy(), wanted)
    assert np.array_equal(to_float(values[:, ::-1]).numpy(), wanted[:, :, ::-1])
    last = to_float(torch.from_numpy(values).to(device), channels_last=True)
    assert np.array_equal(last.cpu().numpy(), wanted) and last.is_contiguous(memory_format=torch.channels_last)
    for batch in (found, {"tokens": label}, None):
        assert float_images(batch) is batch
    with pytest.raises(ValueError, match=r"uint8 \[2, 3, 16, 24\], expected \[B, H, W, 3\]"):
        float_images({"image": torch.zeros(2, 3, 16, 24, dtype=torch.uint8)})


def test_float_and_uint8_are_inverse_on_all_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    images = to_float(values)
    assert images.min() == -1 and images.max() == 1 and images.shape == (3, 16, 16)
    assert torch.equal(to_uint8(images), torch.from_numpy(values))
    assert to_uint8(torch.tensor([-7.0, 3.0, 0.0]).reshape(3, 1, 1)).flatten().tolist() == [0, 255, 128]
    assert to_float(np.stack([values, values])).shape == (2, 3, 16, 16)


def test_grey_palette_alpha_and_16_bit_become_rgb(tmp_path):
    grey = noise_image(9, 7, mode="L")
    expected = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    rgba = noise_image(9, 7, mode="RGBA")
    palette = noise_image(9, 7).quantize(16)
    table = np.array(palette.getpalette()[: 16 * 3], np.uint8).reshape(-1, 3)
    deep = (np.asarray(grey).astype(np.uint16) * 257)[::-1]
    for name, image in {"grey": grey, "rgba": rgba, "palette": palette, "deep": Image.fromarray(deep)}.items():
        image.save(tmp_path / f"{name}.png")
    loaded = {p.stem: np.asarray(to_rgb(Image.open(p))) for p in tmp_path.iterdir()}
    assert np.array_equal(loaded["grey"], expected)
    assert np.array_equal(loaded["rgba"], np.asarray(rgba)[:, :, :3])
    assert np.array_equal(loaded["palette"], table[np.asarray(palette)])
    assert np.array_equal(loaded["deep"], expected[::-1])
    assert np.array_equal(np.asarray(to_rgb(deep)), expected[::-1])
    assert np.array_equal(np.asarray(to_rgb(np.asarray(grey))), expected)
    bright = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    assert np.asarray(to_rgb(bright))[0, :, 0].tolist() == [round(int(v) / 257) for v in bright[0]]
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(Image.fromarray(np.zeros((3, 3), np.float32)))


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed():
    _, labels = read_digits()
    held_out = held_out_digits(labels)
    digest = hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()
    assert digest == "131cb624f2c452a2092bc1d889f1a5cedb0703363ca3babeac8592be6d3d948e"
    counts = np.bincount(labels[held_out]) / np.bincount(labels)
    assert np.abs(counts - 0.2).max() < 0.003
    data = Digits()
    names = [{s.name(i) for i in range(len(s))} for s in (data.sources.train, data.sources.val)]
    assert (data.train_size, data.val_size, data.num_classes) == (1438, 359, 10) and not names[0] & names[1]
    assert names[1] == {f"digits/{i}" for i in held_out}


def test_digits_are_the_committed_ones_enlarged():
    digits, labels = read_digits()
    data = Digits(image_size=32)
    held_out = held_out_digits(labels)
    for place in (0, 100, 358):
        item = data.val_dataset()[(0, place)]
        assert item["label"] == labels[held_out[place]]
        image = to_float(item["image"])
        assert image.shape == (3, 32, 32) and torch.equal(image[0], image[2])
        small = torch.nn.functional.avg_pool2d(image[:1], 4)[0] * 8 + 8
        assert np.array_equal(small.round().numpy(), digits[held_out[place]])
    assert np.array_equal(enlarge(digits[:3], 8)[..., 0], np.rint(digits[:3] * (255 / 16)))
    assert torch.equal(Digits().train_dataset()[(0, 3)]["image"], Digits().train_dataset()[(9, 3)]["image"])
    with pytest.raises(ValueError, match="multiple of 8"):
        Digits(image_size=30)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data folder is not here")
def test_digits_file_is_the_source_file():
    with np.load(SHARED / "data" / "digits.npz") as source:
        digits, labels = read_digits()
        assert np.array_equal(source["x"], digits) and np.array_equal(source["y"], labels)


# --- folders ----------------------------------------------------------------------------------------------------------


def make_folder(root: Path, classes: list[str], each: int, size: int = 20) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            noise_image(size + c, size, seed=100 * c + i).save(root / name / f"{i}.png")
    return root


def folder_data(root: Path, **changes) -> ImageFolder:
    arguments = {"folder": str(root), "image_size": 16, "batch_size": 4, "cache_dir": str(root.parent / "cache")}
    return ImageFolder(**(arguments | changes))


def test_class_folders(tmp_path):
    data = folder_data(make_folder(tmp_path / "a", ["dog", "ant"], 6), val_fraction=0.3)
    assert data.class_names == ["ant", "dog"] and data.num_classes == 2 and data.train_size + data.val_size == 12
    for source in (data.sources.train, data.sources.val):
        for i in range(len(source)):
            image, label = source[i]
            assert source.name(i).startswith(["ant/", "dog/"][label])
            assert image.tobytes() == Image.open(tmp_path / "a" / source.name(i)).tobytes()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 16, 16, 3) and batch["label"].dtype == torch.int64


def test_flat_folder_of_ten_images(tmp_path):
    make_folder(tmp_path, ["flat"], 10)
    data = folder_data(tmp_path / "flat")
    assert (data.num_classes, data.class_names, data.train_size, data.val_size) == (0, [], 9, 1)
    assert set(next(iter(data.train_dataloader()))["label"].tolist()) == {0}


def test_num_classes_and_class_file(tmp_path):
    root = make_folder(tmp_path / "a", ["n02", "n01"], 4)
    assert folder_data(root, num_classes=0).num_classes == 0
    assert folder_data(root, num_classes=2).class_names == ["n01", "n02"]
    with pytest.raises(ValueError, match=r"2 class folders, but data.num_classes=3"):
        folder_data(root, num_classes=3).setup()
    (tmp_path / "names.txt").write_text("n02\tzebra fish\nn01\tape\n")
    data = folder_data(root, class_file=str(tmp_path / "names.txt"))
    assert data.class_names == ["zebra fish", "ape"]
    assert all(data.sources.train.name(i).startswith(["n02", "n01"][data.sources.train[i][1]]) for i in range(5))


def test_imagenet_names_are_in_label_order():
    table = read_class_file("imagenet")
    assert len(table) == 1000 and list(table) == sorted(table)
    places = {0: "tench", 207: "golden retriever", 388: "giant panda", 817: "sports car", 999: "toilet tissue"}
    assert {i: list(table.values())[i] for i in places} == places
    with pytest.raises(ValueError, match=r"data\.class_file=nothing"):
        read_class_file("nothing")


def test_split_is_stable_and_needs_two():
    names = [f"c/{i}.jpg" for i in range(2000)]
    train, val = split_by_hash(names, 0.1)
    assert sorted(train + val) == sorted(names) and abs(len(val) - 200) < 4 * math.sqrt(180)
    assert set(val) <= set(split_by_hash([*names, *(f"d/{i}.jpg" for i in range(500))], 0.1)[1])
    assert [len(part) for part in split_by_hash(names[:2], 0.999999)] == [1, 1]
    with pytest.raises(ValueError, match="cannot be split"):
        split_by_hash(names[:1], 0.5)


def test_val_folder(tmp_path):
    make_folder(tmp_path / "train", ["a", "b"], 3)
    make_folder(tmp_path / "val", ["b"], 2)
    data = folder_data(tmp_path / "train", val_folder=str(tmp_path / "val"))
    assert (data.train_size, data.val_size) == (6, 2) and data.sources.val[0][1] == 1
    with pytest.raises(ValueError, match=r"set data.folder=.*train data.val_folder=.*val"):
        folder_data(tmp_path, cache_dir=str(tmp_path / "cache")).setup()
    make_folder(tmp_path / "val", ["c"], 1)
    with pytest.raises(ValueError, match=r"lacks: \['c'\]"):
        folder_data(tmp_path / "train", val_folder=str(tmp_path / "val")).setup()
    with pytest.raises(ValueError, match="has no class folders"):
        folder_data(tmp_path / "train", val_folder=str(tmp_path / "val" / "b")).setup()


def test_folder_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"empty holds no images .*data.folder"):
        folder_data(tmp_path / "empty").setup()
    with pytest.raises(ValueError, match=r"does not exist; change data.folder"):
        folder_data(tmp_path / "none").setup()
    root = make_folder(tmp_path / "mixed", ["a"], 2)
    noise_image(8, 8).save(root / "loose.png")
    with pytest.raises(ValueError, match=r"mixes class folders"):
        folder_data(root).setup()
    assert folder_data(root, num_classes=0).train_size == 2
    for change in ({"crop": "middle"}, {"scan": "x"}, {"on_bad_image": "x"}, {"cache": True, "crop": "random"}):
        with pytest.raises(ValueError, match=r"data\."):
            folder_data(root, **change)


def test_hidden_files_and_link_cycles_are_left_out(tmp_path):
    root = make_folder(tmp_path / "a", ["x"], 2)
    (root / "x" / "._0.png").write_bytes(b"resource fork")
    (root / ".git").mkdir()
    noise_image(4, 4).save(root / ".git" / "a.png")
    (root / "x" / "up").symlink_to(root)
    assert list_images(root) == ["x/0.png", "x/1.png"]
    assert find(root)[1] == ["x"]


def test_names_hold_any_name():
    names = ["a/ü.jpg", "b.png", "", "x" * 300]
    stored = Names(names)
    assert list(stored) == names and len(Names([])) == 0


def break_one(root: Path, name: str = "ant/2.png", how: str = "truncated") -> Path:
    path = root / name
    path.write_bytes(path.read_bytes()[:300] if how == "truncated" else b"not an image at all")
    return path


@pytest.mark.parametrize("how", ["truncated", "garbage"])
@pytest.mark.parametrize("cache", [False, True])
def test_unreadable_image_is_an_error_that_names_it_before_training(tmp_path, how, cache):
    root = make_folder(tmp_path / "a", ["dog", "ant"], 6)
    path = break_one(root, how=how)
    with pytest.raises(BadImage, match=rf"cannot read image {path} .*data.on_bad_image=skip"):
        folder_data(root, cache=cache).setup()


def test_only_data_sets_tell_of_their_option(tmp_path):
    """Commands that read a picture (scripts/edit.py, gallery.py, eval.vtbench) have no data.on_bad_image."""
    path = tmp_path / "a.png"
    path.write_bytes(b"not an image at all")
    with pytest.raises(BadImage, match=rf"cannot read image {path} .*; replace or remove it$"):
        read_image(path)


def test_unreadable_image_in_a_worker_is_named_in_one_line(tmp_path):
    root = make_folder(tmp_path / "a", ["ant"], 4)
    path = break_one(root, "ant/1.png")
    data = folder_data(root, scan="none", val_fraction=0.01)
    place = [data.sources.train.name(i) for i in range(data.train_size)].index("ant/1.png")
    try:  # what a worker does with an error, and what the process that waits for it makes of that (10 s when real)
        data.train_dataset()[(0, place)]
    except BadImage:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(BadImage) as caught:
        wrapped.reraise()
    assert str(caught.value).startswith(f"cannot read image {path} (") and "\n" not in str(caught.value)


@pytest.mark.parametrize("cache", [False, True])
def test_skipping_counts_names_and_substitutes(tmp_path, caplog, cache):
    root = make_folder(tmp_path / "a", ["dog", "ant"], 6)
    path = break_one(root)
    plain = {p.relative_to(root).as_posix(): p for p in root.rglob("*.png")}
    data = folder_data(root, on_bad_image="skip", cache=cache)
    with caplog.at_level("WARNING", "vtok.data"):
        data.setup()
    assert "ant/2.png" in caplog.text and path.name in caplog.text
    for source in (data.sources.train, data.sources.val):
        names = [source.name(i) for i in range(len(source))]
        for i, name in enumerate(names):
            source[i]
            if name == "ant/2.png":
                name = names[(i + 1) % len(names)]
            assert name_given(source, i) == name_given(Limited(source, len(names)), i) == name
            expected = center_crop(Image.open(plain[name]), 16) if cache else Image.open(plain[name])
            assert np.array_equal(np.asarray(source[i][0]), np.asarray(expected))
            assert source[i][1] == ["ant", "dog"].index(name.split("/")[0])


def test_a_fine_folder_is_scanned_once(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "a", ["ant"], 5)
    folder_data(root).setup()
    monkeypatch.setattr("vtok.data.files.read_image", lambda path: pytest.fail(f"scanned {path} again"))
    folder_data(root).setup()
    monkeypatch.undo()
    break_one(root, "ant/1.png")
    with pytest.raises(BadImage, match=r"1\.png"):
        folder_data(root).setup()


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_nothing_else(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.img"
    outcomes = {"read": 0, "refused": 0}
    for kind in ("jpeg", "png", "webp", "bmp", "gif", "tiff"):
        buffer = io.BytesIO()
        noise_image(24, 17).save(buffer, kind)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(content), 3):
                content[place] = rng.integers(256)
            path.write_bytes(content[: len(content) if rng.random() < 0.7 else rng.integers(20, len(content))])
            try:
                assert read_image(path).mode == "RGB"
                outcomes["read"] += 1
            except BadImage as error:
                assert str(path) in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 60


def test_cache_is_reused_and_follows_the_folder(tmp_path):
    root = make_folder(tmp_path / "a", ["ant", "dog"], 4)
    first = folder_data(root, cache=True)
    plain = folder_data(root)
    for a, b in ((first.val_dataset(), plain.val_dataset()), (first.train_dataset(), plain.train_dataset())):
        assert len(a) == len(b) and all(torch.equal(a[(1, i)]["image"], b[(1, i)]["image"]) for i in range(len(a)))
    assert len(pickle.dumps(first.train_dataset())) < 4000  # a spawned worker gets the path, not the pixels
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("images-*.npy")}
    assert len(files) == 4 and not first.sources.train.native
    folder_data(root, cache=True).setup()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("images-*.npy")} == files
    victim = next(p for p in files if not p.stem.endswith("labels"))
    victim.write_bytes(victim.read_bytes()[:-5])  # torn by something else: decoded anew
    assert torch.equal(
        folder_data(root, cache=True).train_dataset()[(0, 0)]["image"], plain.train_dataset()[(0, 0)]["image"]
    )
    noise_image(20, 20, seed=999).save(root / "ant" / "0.png")
    changed = folder_data(root, cache=True)
    for dataset, source in (
        (changed.train_dataset(), changed.sources.train),
        (changed.val_dataset(), changed.sources.val),
    ):
        names = [source.name(i) for i in range(len(source))]
        if "ant/0.png" in names:
            expected = center_crop(Image.open(root / "ant" / "0.png"), 16)
            assert np.array_equal(dataset.source[names.index("ant/0.png")][0], np.asarray(expected))


def test_processes_that_come_together_decode_a_folder_once(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "a", ["ant", "dog"], 4)
    names, classes = find(root)
    decoded, found, decode = [], [], files._decode

    def slow(*arguments):
        decoded.append(arguments)
        time.sleep(0.5)  # the others come meanwhile
        decode(*arguments)

    monkeypatch.setattr(files, "_decode", slow)

    def one():  # a file's lock holds between threads that opened it each for themselves, as between processes
        source = file_source(root, names, classes, "error")
        found.append(files.cached(source, 16, tmp_path / "cache")[0][0].tobytes())

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(decoded) == 1 and len(found) == 3 and len(set(found)) == 1


# --- EXIF orientation -------------------------------------------------------------------------------------------------

# of the standard: what is done with the stored rows and columns to show the picture
ORIENTATIONS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


def with_orientation(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_where_asked(tmp_path, orientation):
    image = noise_image(9, 7)
    with_orientation(image, tmp_path / "a.png", orientation)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(image))
    turned = np.asarray(read_image(tmp_path / "a.png", upright=True))
    assert np.array_equal(turned, ORIENTATIONS[orientation](np.asarray(image)))


def test_damaged_exif_data_leaves_a_picture_as_it_lies(tmp_path):
    image = noise_image(9, 7)
    image.save(tmp_path / "a.png", exif=b"Exif\x00\x00no directory at all")
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", upright=True)), np.asarray(image))


def test_damaged_exif_data_raises_nothing(tmp_path):
    rng, path, exif = np.random.default_rng(0), tmp_path / "a.jpg", Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a maker of cameras", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    good, sizes = exif.tobytes(), {(9, 7): 0, (7, 9): 0}
    for _ in range(200):
        content = bytearray(good)
        for place in rng.integers(6, len(content), rng.integers(1, 5)):
            content[place] = rng.integers(256)
        noise_image(9, 7).save(path, exif=bytes(content))
        sizes[read_image(path, upright=True).size] += 1
    assert min(sizes.values()) > 20


def test_folders_are_turned_where_asked_and_older_caches_stay_valid(tmp_path):
    root = make_folder(tmp_path / "a", ["ant"], 4)
    stored = noise_image(20, 30)
    with_orientation(stored, root / "ant" / "0.png", 6)
    names = find(root)[0]
    for upright in (False, True):
        expected = np.asarray(center_crop(stored.rotate(-90, expand=True) if upright else stored, 16))
        for cache in (False, True):
            data = folder_data(root, upright=upright, cache=cache)
            split = data.sources.train if "ant/0.png" in split_by_hash(names, 0.05)[0] else data.sources.val
            place = [split.name(i) for i in range(len(split))].index("ant/0.png")
            assert np.array_equal(np.asarray(center_crop(to_rgb(split[place][0]), 16)), expected)
    before = hashlib.sha256(b"error")  # as it was without the option
    for name in names:
        stat = (root / name).stat()
        before.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns}|0\n".encode())
    found = [file_source(root, names, ["ant"], "error", upright).fingerprint() for upright in (False, True)]
    assert found[0] == before.hexdigest() != found[1]


# --- cifar ------------------------------------------------------------------------------------------------------------


def test_cifar_from_class_folders(tmp_path):
    for part, each in (("train", 3), ("test", 1)):
        make_folder(tmp_path / "c" / part, CLASSES, each, size=32)
    data = Cifar10(folder=str(tmp_path / "c"), cache_dir=str(tmp_path / "cache"), batch_size=5)
    assert (data.train_size, data.val_size, data.class_names) == (30, 10, CLASSES)
    batch = next(iter(data.val_dataloader()))
    expected = [np.asarray(center_crop(Image.open(tmp_path / "c/test" / c / "0.png"), 32)) for c in CLASSES[:5]]
    assert np.array_equal(batch["image"], np.stack(expected)) and batch["label"].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "c" / "train" / "cat").rename(tmp_path / "c" / "train" / "kitten")
    with pytest.raises(ValueError, match="not CIFAR-10"):
        Cifar10(folder=str(tmp_path / "c"), cache_dir=str(tmp_path / "cache")).setup()


def test_cifar_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data.download=true"):
        Cifar10(folder=str(tmp_path)).setup()

    def offline(*args, **kwargs):
        raise OSError("name resolution failed")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(ValueError, match=r"without a network set data.folder"):
        Cifar10(folder=str(tmp_path), download=True).setup()


# --- archives ---------------------------------------------------------------------------------------------------------


def tar_of(path: Path, members: list[tarfile.TarInfo | str]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 2 if info.isfile() else 0
            tar.addfile(info, io.BytesIO(b"hi") if info.isfile() else None)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        "../out.txt",
        "/tmp/out.txt",
        "a/../../out.txt",
        "C:\\out.txt",
        "..\\out.txt",
        link("l", "/etc/passwd", tarfile.SYMTYPE),
        link("l", "a.txt", tarfile.LNKTYPE),
        link("d", "", tarfile.CHRTYPE),
    ],
)
def test_unsafe_archives_write_nothing(tmp_path, member):
    archive = tar_of(tmp_path / "x.tar.xz", ["a.txt", member])
    with pytest.raises(UnsafeArchive):
        unpack(archive, tmp_path / "in" / "deep")
    assert not (tmp_path / "in").exists() and not (tmp_path / "out.txt").exists()


def test_archives_unpack(tmp_path):
    folder = tarfile.TarInfo("train/cat")
    folder.type = tarfile.DIRTYPE
    assert unpack(tar_of(tmp_path / "x.tar.xz", [folder, "train/cat/0.jpg", "b.txt"]), tmp_path / "t") == 2
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as pack:
        pack.writestr("train/cat/0.jpg", "hi")
        pack.writestr("b.txt", "hi")
    assert unpack(tmp_path / "x.zip", tmp_path / "z") == 2
    for root in ("t", "z"):
        files = {p.relative_to(tmp_path / root).as_posix(): p.read_text() for p in (tmp_path / root).rglob("*.*")}
        assert files == {"train/cat/0.jpg": "hi", "b.txt": "hi"}
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as pack:
        pack.writestr("../b.txt", "hi")
    with pytest.raises(UnsafeArchive):
        unpack(tmp_path / "bad.zip", tmp_path / "y")
    with pytest.raises(UnsafeArchive, match="more than 1 members"):
        unpack(tmp_path / "x.zip", tmp_path / "y", max_members=1)
    (tmp_path / "cut.tar.xz").write_bytes((tmp_path / "x.tar.xz").read_bytes()[:60])
    for name in ("cut.tar.xz", "none.tar"):
        with pytest.raises(ValueError, match=name):
            unpack(tmp_path / name, tmp_path / "y")


def test_unpacking_does_not_follow_a_link_that_was_there(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeArchive, match="through a link"):
        unpack(tar_of(tmp_path / "x.tar.xz", ["train/0.jpg"]), tmp_path / "in")
    assert not list((tmp_path / "elsewhere").iterdir())


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs" / "data").glob("*.yaml")), ids=lambda p: p.stem
)
def test_data_configs_name_the_constructor(path):
    import importlib
    import inspect

    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    bases = [path.with_name(f"{base}.yaml") for base in config.pop("defaults", []) if base != "_self_"]
    config = OmegaConf.merge(*map(OmegaConf.load, bases), config)
    module, _, name = config._target_.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    assert set(config) - {"_target_"} == set(parameters) - {"self"}
    raw = OmegaConf.to_container(config)
    for shared in ("batch_size", "accumulate", "seed"):
        assert raw[shared] == "${" + shared + "}"


def test_folders_of_ones_own_are_turned_and_imagenet_is_not():
    from omegaconf import OmegaConf

    configs = Path(__file__).parents[1] / "configs" / "data"
    assert OmegaConf.load(configs / "imagefolder.yaml").upright is True
    assert OmegaConf.load(configs / "imagenet256.yaml").upright is False
