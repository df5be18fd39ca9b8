"""Cached tokens: stored is what the tokenizer says, restarts change nothing, the wrong tokenizer is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import make
from torch.utils.data import default_collate

from vtok import counters
from vtok.checkpoint import CheckpointError, save_folder, weights_hash
from vtok.config import build, describe
from vtok.data.ahead import Ahead
from vtok.data.codes import Codes, OnlineTokens
from vtok.data.extract import CROPS, extract
from vtok.data.fake import Fake
from vtok.data.imagefolder import ImageFolder
from vtok.data.module import EvaluationBatches, StepBatches
from vtok.data.shards import Shards, dtype_of, id_of, open_split, pack, unpack_row
from vtok.data.tasks import task_from_environment
from vtok.data.transforms import center_crop, mirror, ten_crop, to_float, to_rgb
from vtok.layers.packed import can_pack
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES
from vtok.models.cnn import CNNTokenizer
from vtok.noise import SampleNoise, key
from vtok.quantize.binary import LFQ
from vtok.quantize.kl import KL
from vtok.quantize.vq import VQ
from vtok.tokenizer import Part, Quantizer, Tokenizer, TokenSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """As in the process that is killed: the number of threads may change the order of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer(seed: int = 0, vocab_size: int = 32, quantizer: Quantizer | None = None) -> CNNTokenizer:
    torch.manual_seed(seed)
    quantizer = quantizer or VQ(vocab_size=vocab_size, channels=4)
    return CNNTokenizer(
        image_size=16, quantizer=quantizer, channels=8, multipliers=(1, 1), blocks=1, z_channels=8, groups=4
    ).eval()


class Means(Tokenizer):
    """Continuous toy: the mean colour of each quarter, plus keyed noise where it is given."""

    stride = 8

    def __init__(self, *, sigma: float = 0.0) -> None:
        super().__init__()
        self.sigma, self.scale = sigma, torch.nn.Parameter(torch.ones(3))
        self.spec = TokenSpec(SequenceLayout.raster(2, 2), (Part(4, None, 3),), 16)

    def encode(self, images, *, layout=None, prefix=None, noise=None):
        means = torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2) * self.scale
        return means + self.sigma * noise.normal(torch.arange(4), 3) if self.sigma else means


def data(**changes) -> Fake:
    arguments = {"image_size": 16, "batch_size": 4, "train_images": 25, "val_images": 7, "num_classes": 3}
    return Fake(**(arguments | changes))


def silent(line: str) -> None:
    pass


def write(out: Path, model=None, **changes) -> bool:
    options = {"crops": "none", "batch": 4, "shard_size": 10, "say": silent}
    return extract(changes.pop("source", None) or data(), model or tokenizer(), out, **(options | changes))


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


# --- round trip ---


@pytest.mark.parametrize("crops", ["none", "flip", "ten"])
def test_shards_hold_the_tokens_of_every_crop(tmp_path, crops):
    model, source = tokenizer(), data()
    assert write(tmp_path, model, crops=crops, shard_size=10)
    shards = open_split(tmp_path / "train", verify=True)
    count = CROPS[crops]["count"]
    assert (len(shards), shards.crops) == (25, count)
    assert [np.load(p).shape for p in sorted((tmp_path / "train").glob("codes-*"))] == [
        (10, count, 64),
        (10, count, 64),
        (5, count, 64),
    ]
    assert np.load(tmp_path / "train" / "codes-00000.npy").dtype == np.uint16
    for i in (0, 9, 10, 24):
        picture, label = source.sources.train[i]
        picture = to_rgb(picture)
        centre = center_crop(picture, 16)
        images = {"none": [centre], "flip": [centre, mirror(centre)], "ten": ten_crop(picture, 16)}[crops]
        for crop, image in enumerate(images):
            expected = model.encode(to_float(np.asarray(image))[None])[0]
            # a batch of another size may round a distance differently: near ties only
            assert (shards.row(i, crop) == expected).float().mean() > 0.98
        assert shards.labels[i] == label == i % 3
    assert np.load(tmp_path / "train" / "ids.npy").tolist() == [id_of(f"train/{i}") for i in range(25)]
    assert open_split(tmp_path / "val").crops == 1 and len(open_split(tmp_path / "val")) == 7


@pytest.mark.parametrize("name", ["cnn", "gigatok"])
def test_codes_equal_online_tokens(tmp_path, name):
    """By the fast paths; the given tokenizer, whose hash is compared, keeps its weights. GigaTok has linear layers."""
    model = tokenizer() if name == "cnn" else make(name).eval()
    before = weights_hash(model.state_dict())
    counters.reset()
    write(tmp_path, model, shard_size=100, batch=4)
    taken, packs = counters.read(), can_pack(model)
    assert taken["encode.channels_last"] == 7 + 2 and "encode.channels_first" not in taken
    assert bool(taken.get("linear.packed")) == packs and weights_hash(model.state_dict()) == before
    cached = Codes(folder=str(tmp_path), tokenizer=model, batch_size=4, seed=3)
    online = OnlineTokens(data=data(seed=3), tokenizer=model)
    assert cached.spec == online.spec == model.spec
    for field in ("num_classes", "class_names", "image_size", "train_size", "val_size", "batch_size", "accumulate"):
        assert getattr(cached, field) == getattr(online, field)
    counters.reset()
    for loader, batches in (("train_dataloader", 9), ("val_dataloader", 2)):
        pairs = list(itertools.islice(zip(getattr(cached, loader)(), getattr(online, loader)()), batches))
        assert len(pairs) == batches
        for a, b in pairs:
            b = online.on_after_batch_transfer(b, 0)
            assert a.keys() == b.keys() == {"tokens", "label", "key", "index"}
            assert all(torch.equal(a[k], b[k]) for k in ("label", "key", "index")) and a["tokens"].dtype == torch.int64
            assert (a["tokens"] == b["tokens"]).float().mean() > 0.98  # batches differ: near ties only
    taken = counters.read()
    assert taken["encode.channels_last"] == 9 + 2 and "encode.channels_first" not in taken
    assert weights_hash(online.tokenizer.state_dict()) == before


def test_crop_is_drawn_by_key(tmp_path):
    write(tmp_path, crops="ten")
    codes = Codes(folder=str(tmp_path), batch_size=5, seed=1)
    shards, dataset = codes.train, codes.train_dataset()
    drawn = np.zeros(10, int)
    for epoch in range(200):
        item = dataset[(epoch, 7)]
        crop = key(key(1, epoch, 7), 1) % 10
        assert torch.equal(item["tokens"], shards.row(7, crop)) and item["key"] == key(1, epoch, 7)
        drawn[crop] += 1
    assert drawn.min() > 5
    again = Codes(folder=str(tmp_path), batch_size=5, seed=1, workers=2)
    for a, b in itertools.islice(zip(codes.train_dataloader(), again.train_dataloader()), 8):
        assert all(torch.equal(a[k], b[k]) for k in a)
    plain = data().sources.val
    for i in range(7):
        expected = tokenizer().encode(to_float(plain[i][0])[None])[0]
        assert (codes.val_dataset()[(4, i)]["tokens"] == expected).float().mean() > 0.98


@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize("kind", ["ids", "float16", "bfloat16"])
def test_a_batch_read_at_once_is_its_items(tmp_path, kind, crops):
    """Of all shards, in any order and with repeats; row and crop by their definition."""
    model = tokenizer() if kind == "ids" else Means()
    write(tmp_path, model, crops=crops, dtype=None if kind == "ids" else kind)
    codes = Codes(folder=str(tmp_path), tokenizer=model, seed=2, limit_train=20)
    dataset, shards = codes.train_dataset(), open_split(tmp_path / "train")
    positions = [(epoch, index) for epoch in (3, 0) for index in (19, 4, 0, 11, 4, 8)]
    found = dataset.__getitems__(positions)
    assert found["tokens"].dtype == (torch.int64 if kind == "ids" else torch.float32)
    for tokens, label, sample_key, place, (epoch, index) in zip(*found.values(), positions, strict=True):
        row, sample = index * 25 // 20, key(2, epoch, index)
        assert torch.equal(tokens, shards.row(row, key(sample, 1) % CROPS[crops]["count"]))
        assert (label, sample_key, place) == (row % 3, sample, index)
    for some in (positions, positions[2:3], positions[5:]):  # all shards, one, an odd number
        same_batch(dataset.__getitems__(some), [dataset[position] for position in some])
    for wrong in ([(0, 0), (0, 20)], [(0, -1)]):
        with pytest.raises(IndexError):
            dataset.__getitems__(wrong)


def same_batch(found: dict, items: list[dict]) -> None:
    want = default_collate(items)
    assert list(found) == list(want)
    for name, value in want.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype and found[name].is_contiguous()


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_batches_of_single_items(tmp_path, workers):
    """Across shards and epochs, from any step on; held-out ones with a smaller last one."""
    write(tmp_path, crops="ten")
    codes = Codes(folder=str(tmp_path), batch_size=7, seed=3, workers=workers)
    for start in (0, 5):
        places = StepBatches(size=25, batch_size=7, seed=3, start=start)
        for found, positions in itertools.islice(zip(codes.train_dataloader(start), places), 8):
            same_batch(found, [codes.train_dataset()[position] for position in positions])
    codes.batch_size = 3
    for found, positions in zip(codes.val_dataloader(), EvaluationBatches(size=7, batch_size=3), strict=True):
        same_batch(found, [codes.val_dataset()[position] for position in positions])


def test_a_batch_is_read_without_single_items(tmp_path, monkeypatch):
    write(tmp_path, crops="ten")
    codes = Codes(folder=str(tmp_path), batch_size=8)
    loader = iter(codes.train_dataloader())
    first = next(loader)
    monkeypatch.setattr(Shards, "row", None)
    monkeypatch.setattr("vtok.data.codes.key", None)
    assert next(loader)["tokens"].shape == first["tokens"].shape == (8, 64)


def test_ten_crop_centre_is_the_place_that_the_manifest_names():
    picture = to_rgb(data().sources.train[3][0])
    wide = np.asarray(center_crop(picture, 17))
    expected = wide[round(0.5) : round(0.5) + 16, round(0.5) : round(0.5) + 16]
    assert np.array_equal(np.asarray(ten_crop(picture, 16)[CROPS["ten"]["centre"]]), expected)


def test_large_vocabularies_and_latents(tmp_path):
    sizes = (65536, 65537, 2**32, 2**32 + 1, 2**63, None, 2**63 + 1)
    spec = {k: TokenSpec(SequenceLayout.line(2), (Part(2, k, 4),), 16) for k in sizes}
    found = [dtype_of(spec[k]) for k in sizes[:-1]]
    assert found == ["uint16", "uint32", "uint32", "int64", "int64", "float16"]
    for size, asked in ((65537, "uint16"), (2**32 + 1, "uint32")):
        with pytest.raises(ValueError, match=f"dtype={asked}"):
            dtype_of(spec[size], asked)
    with pytest.raises(ValueError, match="63 bits"):
        dtype_of(spec[2**63 + 1])
    ids = torch.tensor([0, 65535, 65536, 2**31])
    assert torch.equal(unpack_row(pack(ids, "uint32"), "uint32"), ids)
    assert torch.equal(unpack_row(pack(ids[:2], "uint16"), "uint16"), ids[:2])
    assert torch.equal(unpack_row(pack(ids << 31, "int64"), "int64"), ids << 31)
    values = torch.randn(5, 3)
    assert torch.equal(unpack_row(pack(values, "bfloat16"), "bfloat16"), values.bfloat16().float())
    assert torch.equal(unpack_row(pack(values, "float16"), "float16"), values.half().float())


def test_ids_of_sixty_two_bits_are_cached_exactly(tmp_path):
    model = tokenizer(quantizer=LFQ(bits=62, entropy_weight=0.0))
    write(tmp_path, model)
    shards, source = open_split(tmp_path / "val"), data().sources.val
    want = model.encode(to_float(np.stack([np.asarray(source[i][0]) for i in range(7)])))
    assert int(want.max()) > 2**60 and shards.manifest["dtype"] == "int64"
    bits = torch.stack([shards.row(i, 0) ^ want[i] for i in range(7)])[..., None] >> torch.arange(62) & 1
    assert (bits == 0).float().mean() > 0.99  # a channel near 0 may round to the other side in another batch


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_continuous_tokens_and_keyed_encoders(tmp_path, dtype):
    model = Means(sigma=0.1)
    write(tmp_path, model, dtype=dtype, source=data(seed=5))
    codes = Codes(folder=str(tmp_path), tokenizer=model, batch_size=5)
    picture = to_float(data().sources.train[11][0])[None]
    noise = SampleNoise(torch.tensor([key(5, 0, 11, 0)]))
    found = codes.train_dataset()[(0, 11)]["tokens"]
    assert found.dtype == torch.float32 and found.shape == (4, 3)
    rounded = model.encode(picture, noise=noise)[0].detach().to(getattr(torch, dtype)).float()
    assert torch.allclose(found, rounded, atol=1e-2) and (found == rounded).float().mean() > 0.9


def test_online_tokens_keep_images_and_gradients_apart():
    online = OnlineTokens(data=data(), tokenizer=tokenizer(), keep_images=True)
    batch = online.encode(next(iter(online.train_dataloader())))
    assert batch["image"].shape == (4, 3, 16, 16) and not batch["tokens"].requires_grad
    assert not any(p.requires_grad for p in online.tokenizer.parameters()) and not online.tokenizer.training
    with torch.autocast("cpu", torch.bfloat16):
        mixed = online.encode(next(iter(online.train_dataloader())))
    assert torch.equal(mixed["tokens"], batch["tokens"])


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["index"].tolist(), batch["tokens"].tolist()))
        return self.weight.square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EarlyTokens(OnlineTokens):
    """As on a GPU: a batch is encoded while the step before it runs."""

    def train_dataloader(self) -> Ahead:
        return Ahead(super().train_dataloader(), self.encode, torch.device("cpu"))


def fit(tokens: L.LightningDataModule, steps: int, resume: str | None = None, accelerator="cpu"):
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Recorder()
    trainer.fit(module, tokens, ckpt_path=resume)
    return trainer, module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["online", "ahead", "cached"])
def test_resuming_under_lightning_continues_the_tokens(tmp_path, kind):
    write(tmp_path, crops="flip")

    def tokens() -> L.LightningDataModule:
        if kind == "cached":
            return Codes(folder=str(tmp_path), batch_size=4)
        online = EarlyTokens if kind == "ahead" else OnlineTokens
        return online(data=data(flip=True), tokenizer=tokenizer(), keep_images=kind == "ahead")

    whole = fit(tokens(), 10)[1]
    trainer, first = fit(tokens(), 4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert first + fit(tokens(), 10, str(tmp_path / "a.ckpt"))[1] == whole and len(whole) == 10
    if kind == "ahead":  # the same tokens as in turns
        assert whole == fit(OnlineTokens(data=data(flip=True), tokenizer=tokenizer()), 10)[1]


def test_a_batch_is_encoded_while_the_one_before_is_in_use():
    began: list[int] = []

    def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        began.append(int(batch["index"]))
        return {"tokens": batch["index"] * 10}

    counters.reset()
    early = Ahead([{"index": torch.tensor(i)} for i in range(4)], encode, torch.device("cpu"))
    for _ in range(2):  # it can be read again
        began.clear()
        for i, batch in enumerate(early):
            assert batch["tokens"] == 10 * i and began == list(range(min(i + 2, 4)))
        assert i == 3
    assert counters.read() == {"tokens.in_turn": 8} and not list(Ahead([], encode, torch.device("cpu")))


def test_lightning_ends_the_workers_of_a_loader_that_is_encoded_ahead(tmp_path):
    tokens = EarlyTokens(data=data(workers=1), tokenizer=tokenizer())
    loaders = []
    make = tokens.train_dataloader
    tokens.train_dataloader = lambda: loaders.append(make()) or loaders[-1]
    fit(tokens, 2)
    assert loaders[0].loader.num_workers == 1 and loaders[0].loader._iterator is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second stream needs a GPU")
@pytest.mark.filterwarnings("ignore")
def test_tokens_encoded_on_a_second_stream_are_those_of_the_first(monkeypatch):
    found = []
    slow = OnlineTokens.encode

    def late(self, batch):  # a step that does not wait for it reads what is not written yet
        torch.cuda._sleep(20_000_000)
        return slow(self, batch)

    monkeypatch.setattr(OnlineTokens, "encode", late)
    for ahead in (True, False):
        tokens = OnlineTokens(data=data(flip=True), tokenizer=tokenizer(), keep_images=True, ahead=ahead)
        counters.reset()
        found.append(fit(tokens, 30, accelerator="cuda")[1])
        assert bool(counters.read().get("tokens.ahead")) is ahead
    assert found[0] == found[1] and len(found[0]) == 30


# --- restarts and tasks ---


def test_interrupted_extraction_ends_in_the_same_files(tmp_path):
    write(tmp_path / "whole", crops="flip", shard_size=4)

    class Stop(Exception):
        pass

    failures = 0

    def fail(line: str) -> None:  # called after the codes of a shard are computed, before they are written
        nonlocal failures
        encoded = "images/s" in line
        if encoded and failures % 2 == 0:
            failures += 1
            raise Stop
        failures += encoded

    for _ in range(20):
        try:
            write(tmp_path / "parts", crops="flip", shard_size=4, say=fail)
            break
        except Stop:
            continue
    assert failures == 18 and content(tmp_path / "parts") == content(tmp_path / "whole")


def test_damaged_and_unfinished_shards_are_made_again(tmp_path):
    write(tmp_path, shard_size=4)
    expected = content(tmp_path)
    train = tmp_path / "train"
    (train / "codes-00000.npy").write_bytes(b"torn")
    altered = bytearray((train / "codes-00001.npy").read_bytes())
    altered[-1] ^= 1
    (train / "codes-00001.npy").write_bytes(altered)
    (train / "parts" / "00002.json").unlink()
    (train / "parts" / "00003.npy").unlink()
    (train / "manifest.json").unlink()
    said: list[str] = []
    write(tmp_path, shard_size=4, say=said.append)
    assert content(tmp_path) == expected
    assert sum("finished earlier" in line for line in said) == 7 - 4 + 2


@pytest.mark.parametrize("options", [{"scan": "none", "workers": 1}, {"cache": True}])
def test_a_row_of_a_substitute_has_its_id(tmp_path, options):
    """And the manifest counts these rows, also when tasks or a restart finish the split."""
    photos = tmp_path / "photos"
    (photos / "train").mkdir(parents=True)
    (photos / "val").mkdir()
    for i in range(6):
        Image.effect_noise((16, 16), 10 + 20 * i).convert("RGB").save(photos / "train" / f"{i}.png")
    Image.new("RGB", (16, 16)).save(photos / "val" / "0.png")
    for i in (2, 3, 5):
        (photos / "train" / f"{i}.png").write_bytes(b"no picture")
    said = []

    def go(out: str, **more) -> dict[str, bytes]:
        folder = ImageFolder(
            folder=str(photos / "train"), val_folder=str(photos / "val"), image_size=16, batch_size=2, num_classes=0,
            on_bad_image="skip", cache_dir=str(tmp_path / "cache"), **options,
        )  # fmt: skip
        write(tmp_path / out, source=folder, shard_size=4, crops="flip", say=said.append, **more)
        return content(tmp_path / out)

    whole = go("whole")
    stands = [0, 1, 4, 4, 4, 0]
    assert np.load(tmp_path / "whole" / "train" / "ids.npy").tolist() == [id_of(f"{i}.png") for i in stands]
    manifests = [json.loads((tmp_path / "whole" / split / "manifest.json").read_text()) for split in ("train", "val")]
    assert [m["substitutes"] for m in manifests] == [3, 0]
    assert [note.get("substitutes") for note in manifests[0]["shards"]] == [2, 1]
    shards = open_split(tmp_path / "whole" / "train")
    assert torch.equal(shards.row(2, 0), shards.row(4, 0)) and not torch.equal(shards.row(1, 0), shards.row(4, 0))
    assert sum("unreadable; their rows hold the next" in line for line in said) == 2
    for task in (0, 1):
        parts = go("parts", task=(task, 2))
    assert parts == whole
    (tmp_path / "parts" / "train" / "manifest.json").unlink()
    assert go("parts") == whole


def test_tasks_share_the_shards(tmp_path):
    write(tmp_path / "one", shard_size=3)
    done = [write(tmp_path / "three", shard_size=3, task=(t, 3)) for t in (2, 0, 1)]
    assert done == [False, False, True]
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_task_from_environment():
    assert task_from_environment(None, None, {}) == (0, 1)
    assert task_from_environment(1, 4, {"RANK": "0", "WORLD_SIZE": "2"}) == (1, 4)
    assert task_from_environment(None, None, {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}
    assert task_from_environment(None, None, array | {"SLURM_ARRAY_TASK_COUNT": "4"}) == (2, 4)
    stepped = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "6"}
    assert task_from_environment(None, None, stepped | {"SLURM_ARRAY_TASK_STEP": "2"}) == (2, 4)
    for bad in ((0, None, {}), (3, 3, {}), (None, None, array | {"SLURM_ARRAY_TASK_COUNT": "3"})):
        with pytest.raises(ValueError, match="task"):
            task_from_environment(*bad)


OPTIONS = ("data=fake", "data.image_size=16", "shard_size=8", "batch_size=8")


def command(monkeypatch, capsys, *overrides: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    loaded = importlib.util.spec_from_file_location("cache_codes", ROOT / "scripts" / "cache_codes.py")
    script = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["cache_codes.py", *OPTIONS, *overrides])
    try:
        script.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_killed_command_goes_on_to_identical_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_folder(tokenizer(), "tok")
    options = ("from=tok", "data.train_images=400", "data.val_images=20", "crops=flip")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "cache_codes.py"), *OPTIONS, *options, "out=killed"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(Path("killed").glob("train/codes-*.npy"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not Path("killed/train/manifest.json").exists()
    for out in ("killed", "whole"):
        code, output, errors = command(monkeypatch, capsys, *options, f"out={out}")
        assert code == 0, errors
        assert f"codes are in {out}" in output and ("finished earlier" in output) == (out == "killed")
    left = {k: v for k, v in content(Path("killed")).items() if ".tmp." not in k}
    assert left == content(Path("whole"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("from=none", "out=o"), "none does not exist"),
        (("from=tok", "out=o", "crops=five"), "choose none, flip or ten"),
        (("from=tok", "out=o", "task_id=2", "num_tasks=2"), "task_id=2"),
        (("from=tok", "out=o", "data.image_size=17"), "multiple of the stride"),
        (("from=tok", "out=o", "data=imagefolder", "data.folder=nothing"), "does not exist"),
        (("from=tok", "out=o", "cropz=ten"), "cropz"),
        (("from=tok",), "out"),
    ],
)
def test_command_mistakes_end_in_exit_code_2(tmp_path, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(tmp_path)
    save_folder(tokenizer(), "tok")
    code, _, errors = command(monkeypatch, capsys, *overrides)
    assert code == 2 and message in errors and "Traceback" not in errors, errors
    assert not Path("o").exists()


# --- refusals ---


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "codes", tokenizer(0))
    other = tokenizer(1)
    with pytest.raises(CheckpointError) as caught:
        Codes(folder=str(tmp_path / "codes"), tokenizer=other)
    for part in (weights_hash(tokenizer(0).state_dict())[:16], weights_hash(other.state_dict())[:16], "data.tokenizer"):
        assert part in str(caught.value)
    save_folder(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match=str(tmp_path / "other")):
        Codes(folder=str(tmp_path / "codes"), tokenizer=str(tmp_path / "other"))
    own = Codes(folder=str(tmp_path / "codes"))
    assert weights_hash(own.tokenizer.state_dict()) == weights_hash(tokenizer(0).state_dict())


def changed(model: Tokenizer, **values) -> Tokenizer:
    """The same weights with other arguments, by their names with __ between what is nested."""
    description = describe(model)
    for name, value in values.items():
        *above, argument = name.split("__")
        described = description["arguments"]
        for part in above:
            described = described[part]["arguments"]
        assert described[argument] != value
        described[argument] = value
    other = build(description, FAMILIES).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "name, values, said",
    [
        ("cnn_kl", {"quantizer__scale": 0.25}, r"quantizer\.scale=0\.5 \(now 0\.25\)"),
        ("restok", {"theta": 20.0}, r"theta=10000\.0 \(now 20\.0\)"),
        ("restok", {"legacy_reshape": True}, r"legacy_reshape=False \(now True\)"),
        ("flextok_vae", {"vae__quantizer__scale": 0.25}, r"vae\.quantizer\.scale=0\.5 \(now 0\.25\)"),
        ("var", {"quantizer__phi_weight": 0.25}, r"quantizer\.phi_weight=0\.5 \(now 0\.25\)"),
    ],
)
def test_the_same_weights_that_mean_other_codes_are_refused(tmp_path, name, values, said):
    made = make(name)
    other = changed(made, **values)
    write(tmp_path, made)
    assert len(Codes(folder=str(tmp_path), tokenizer=made).train_dataset()[0, 0]["tokens"]) == made.spec.layout.length
    assert weights_hash(other.state_dict()) == weights_hash(made.state_dict())
    with pytest.raises(CheckpointError, match=rf"same weights with another {said}: set"):
        Codes(folder=str(tmp_path), tokenizer=other)
    argument = next(iter(values)).split("__")[-1]
    for split in ("train", "val"):  # of a version that did not know the argument: as its default
        path = tmp_path / split / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(without(manifest, argument)))
    default = {"theta": True, "legacy_reshape": True, "scale": False, "phi_weight": True}[argument]
    if default:
        Codes(folder=str(tmp_path), tokenizer=made)
    else:
        with pytest.raises(CheckpointError, match=r"scale=1\.0 \(now 0\.5\)"):
            Codes(folder=str(tmp_path), tokenizer=made)


def without(data, argument: str):
    """Nested data whose descriptions do not name the argument."""
    if isinstance(data, list):
        return [without(part, argument) for part in data]
    if not isinstance(data, dict):
        return data
    return {k: without(v, argument) for k, v in data.items() if k != argument}


def test_codes_of_a_tokenizer_that_trained_otherwise_are_taken(tmp_path):
    write(tmp_path, make("restok"))
    Codes(folder=str(tmp_path), tokenizer=make("restok", nested="all"))


@pytest.mark.parametrize(
    "change, name",
    [
        ({"model": tokenizer(1)}, "tokenizer="),
        ({"crops": "ten"}, "crops=none, asked for ten"),
        ({"shard_size": 9}, "shard_size=10, asked for 9"),
        ({"source": data(train_images=26)}, r"data\.train="),
        ({"model": changed(tokenizer(), quantizer__beta=0.5)}, r"tokenizer\.quantizer\.beta=0\.25, asked for 0\.5"),
        ({"source": data(num_classes=4)}, "class_names="),
    ],
)
def test_a_folder_of_another_recipe_is_left_alone(tmp_path, change, name):
    write(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=name):
        write(tmp_path, **change)
    assert content(tmp_path) == before


def test_turned_pictures_and_lying_ones_share_no_folder(tmp_path):
    """The option is named where it is on, so that folders begun without it go on."""
    turned = data()
    turned.upright = True
    write(tmp_path / "lying")
    assert "upright" not in json.loads((tmp_path / "lying" / "recipe.json").read_text())
    write(tmp_path / "turned", source=turned)
    for name, source, words in (("lying", turned, "None, asked for True"), ("turned", None, "True, asked for None")):
        with pytest.raises(ValueError, match=f"upright={words}"):
            write(tmp_path / name, source=source)


def test_two_seeds_of_an_encoder_that_draws_share_no_folder(tmp_path):
    """Also where the quantizer that draws is a part of the tokenizer (FlexTok with its VAE)."""
    for name in ("cnn_kl", "flextok_vae"):
        write(tmp_path / name, make(name), source=data(seed=1))
        write(tmp_path / name, make(name), source=data(seed=1))
        with pytest.raises(ValueError, match="seed=1, asked for 2"):
            write(tmp_path / name, make(name), source=data(seed=2))
    write(tmp_path / "vq", source=data(seed=1))
    write(tmp_path / "vq", source=data(seed=2))  # the same codes


def test_an_encoder_that_draws_nothing_needs_no_seed(tmp_path):
    """A folder of a version that noted one all the same goes on."""
    model = tokenizer(quantizer=KL(channels=4, deterministic=True))
    write(tmp_path, model, source=data(seed=1))
    path = tmp_path / "recipe.json"
    recipe = json.loads(path.read_text())
    assert "seed" not in recipe
    path.write_text(json.dumps(recipe | {"seed": 1}))
    write(tmp_path, model, source=data(seed=2))


def test_a_folder_half_made_by_an_earlier_version_goes_on(tmp_path):
    """Its recipe names fewer arguments of the tokenizer; both manifests then say the same."""
    half, whole, said = tmp_path / "half", tmp_path / "whole", []
    write(whole)
    assert not write(half, task=(0, 2))
    path = half / "recipe.json"
    full = json.loads(path.read_text())
    path.write_text(json.dumps(without(without(full, "decoder_blocks"), "stochastic")))
    assert write(half, say=said.append)
    assert sum("finished earlier" in line for line in said) == 2
    Codes(folder=str(half), tokenizer=tokenizer())
    ours, theirs = content(half), content(whole)
    assert all(ours[k] == theirs[k] for k in theirs if k.endswith(".npy")) and ours.keys() == theirs.keys()
    path.write_text(json.dumps(without(full, "z_channels")))
    with pytest.raises(ValueError, match=r"codes with tokenizer\.z_channels=256, asked for 8"):
        write(half)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
        write(half)


def test_codes_of_other_crops_are_refused_where_a_recipe_names_its_own(tmp_path):
    for crops in CROPS:
        write(tmp_path / crops, crops=crops)
    for asked, made in itertools.product((None, *CROPS), CROPS):
        if asked in (None, made):
            assert Codes(folder=str(tmp_path / made), crops=asked).train.crops == CROPS[made]["count"]
            continue
        words = rf"crops={made}, .*cache_codes\.py crops={asked}, .*data\.crops=null"
        with pytest.raises(CheckpointError, match=words):
            Codes(folder=str(tmp_path / made), crops=asked)
    with pytest.raises(ValueError, match=r"^data\.crops=five: choose none, flip, ten, or null to take any$"):
        Codes(folder=str(tmp_path / "nothing"), crops="five")


def test_damaged_folders_are_refused(tmp_path):
    write(tmp_path)
    train = tmp_path / "train"
    good = content(tmp_path)

    def restore() -> None:
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)

    def edit(**changes) -> None:
        manifest = json.loads(good["train/manifest.json"])
        (train / "manifest.json").write_text(json.dumps(manifest | changes))

    shard = train / "codes-00001.npy"
    notes = json.loads(good["train/manifest.json"])["shards"]
    cases = [
        (lambda: shard.write_bytes(shard.read_bytes()[:-2]), "codes-00001.npy has .* truncated"),
        (lambda: shard.write_bytes(b"x" * 200), "no array"),
        (lambda: np.save(shard, np.zeros((10, 1, 63), np.uint16)), "expected uint16 .10, 1, 64."),
        (lambda: np.save(shard, np.zeros((10, 1, 64), np.int16)), "int16"),
        (shard.unlink, "codes-00001.npy is missing"),
        ((train / "labels.npy").unlink, "labels.npy is missing"),
        ((train / "manifest.json").unlink, "run the extraction again"),
        (lambda: (train / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda: (train / "manifest.json").write_text("{}"), "lacks"),
        (lambda: edit(format="vtok-shards/v9"), "v9"),
        (lambda: edit(dtype="object"), "dtype 'object'"),
        (lambda: edit(rows=24), "labels.npy is int32"),
        (lambda: edit(shards=notes[:2]), "hold 20 rows"),
        (lambda: edit(shards=[notes[0] | {"file": "../val/codes-00000.npy"}]), "no file of the folder"),
        (lambda: edit(class_names=["a"]), "differ in class_names"),
    ]
    for damage, message in cases:
        damage()
        with pytest.raises(CheckpointError, match=message):
            Codes(folder=str(tmp_path))
        restore()
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    Codes(folder=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"codes-00001\.npy was altered"):
        Codes(folder=str(tmp_path), verify=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        Codes(folder=str(tmp_path / "none"))


def test_ten_crop_needs_whole_images(tmp_path):
    source = data()
    source.sources.train.native = False
    with pytest.raises(ValueError, match=r"data\.cache=false"):
        write(tmp_path, crops="ten", source=source)
    source.transform = dataclasses.replace(source.transform, crop="var")
    with pytest.raises(ValueError, match=r"crops=flip are ADM's, which data\.crop=var does not change"):
        write(tmp_path, crops="flip", source=source)


def test_limits_are_spread_like_those_of_images(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"data\.limit_train=0 must be at least 1"):
        Codes(folder=str(tmp_path), limit_train=0)
    codes, images = Codes(folder=str(tmp_path), limit_train=6, limit_val=3), data(limit_train=6, limit_val=3)
    assert (codes.train_size, codes.val_size) == (images.train_size, images.val_size) == (6, 3)
    labels = [codes.train_dataset()[(0, i)]["label"] for i in range(6)]
    assert labels == [images.sources.train[i][1] for i in range(6)]


def test_a_folder_of_codes_knows_its_pictures_by_their_files_sizes_too(tmp_path):
    """Pictures of the same names are others where a file has another size; folders of earlier versions go on."""
    photos, out = tmp_path / "photos" / "a", tmp_path / "codes"
    photos.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 90, 90)).save(photos / f"{i}.png")

    def again():
        folder = ImageFolder(folder=str(photos.parent), image_size=16, batch_size=2, val_fraction=0.5)
        return extract(folder, make("cnn_vq"), out, batch=2)

    assert again() and again()
    Image.effect_noise((16, 16), 80).save(photos / "2.png")
    with pytest.raises(ValueError, match=r"holds codes with files\.\w+=.*choose another out="):
        again()
    recipe = json.loads((out / "recipe.json").read_text())
    assert set(recipe.pop("files")) == {"train", "val"}
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert again()
