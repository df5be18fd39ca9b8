"""Tars and parquet: the same images, labels and order as a folder's, resumable, and damage that names its file."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtok.data.files import BadImage, EncodedImages, Names
from vtok.data.module import WINDOW, StepBatches, block_order
from vtok.data.packed import Parquet, Tars
from vtok.data.sources import Limited, name_given

COUNT = 22


def png(index: int) -> bytes:
    """A picture whose colour tells its index."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return path


def members(indices: range) -> dict[str, bytes]:
    """Labels as .cls for even and .json for odd indices."""
    found: dict[str, bytes] = {}
    for i in indices:
        found[f"a/{i:04d}.png"] = png(i)
        name, text = ("cls", str(i % 3)) if i % 2 == 0 else ("json", json.dumps({"label": i % 3}))
        found[f"a/{i:04d}.{name}"] = text.encode()
    return found


@pytest.fixture
def tars(tmp_path) -> Path:
    for shard, rows in enumerate((range(9), range(9, COUNT))):
        write_tar(tmp_path / "set" / "train" / f"{shard}.tar", members(rows))
    write_tar(tmp_path / "set" / "val" / "0.tar", members(range(4)))
    return tmp_path / "set"


def data(folder: Path, cls=Tars, **options):
    ending = "tar" if cls is Tars else "parquet"
    options = {"image_size": 8, "batch_size": 8, "flip": False, "cache_dir": str(folder / "cache"), **options}
    return cls(folder=str(folder), train=f"train/*.{ending}", val=f"val/*.{ending}", **options)


def seen(loader, batches: int) -> list[tuple[int, int]]:
    """(index read off the colour, label) of the first images of a loader."""
    found = []
    for batch, _ in zip(loader, range(batches)):
        values = batch["image"][:, 0, 0, 0].int() // 10
        assert torch.equal(values, batch["index"].int())
        found += list(zip(values.tolist(), batch["label"].tolist()))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_hold_the_images_and_labels_in_the_common_order(tars, workers):
    made = data(tars, workers=workers)
    found = seen(made.train_dataloader(), 6)
    batches = StepBatches(size=COUNT, batch_size=8, seed=0)
    assert [i for i, _ in found] == [i for b in range(6) for _, i in batches.batch(b)]
    assert all(label == i % 3 for i, label in found)
    assert made.class_names == ["0", "1", "2"] and made.train_size == COUNT and made.val_size == 4
    assert made.sources.train.name(9) == "1.tar/a/0009.png"
    assert seen(made.train_dataloader(start=4), 2) == found[32:]  # in the middle of the second epoch


def test_the_index_is_made_once_and_follows_the_files(tars, monkeypatch):
    from vtok.data import packed

    data(tars).setup()
    made = []
    monkeypatch.setattr(packed, "index_tars", lambda files, make=packed.index_tars: made.append(1) or make(files))
    data(tars).setup()
    assert not made
    write_tar(tars / "train" / "2.tar", members(range(COUNT, COUNT + 2)))
    again = data(tars)
    assert again.train_size == COUNT + 2 and len(made) == 1
    # processes that come together, of which one finds it made when its turn comes
    write_tar(tars / "train" / "2.tar", members(range(COUNT, COUNT + 3)))
    late = packed.one_at_a_time

    def waits(path):
        monkeypatch.setattr(packed, "one_at_a_time", late)
        assert data(tars).train_size == COUNT + 3
        return late(path)

    monkeypatch.setattr(packed, "one_at_a_time", waits)
    assert data(tars).train_size == COUNT + 3 and len(made) == 2


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: p.write_bytes(b"no archive" * 100), "no uncompressed tar"),
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), "damaged|truncated"),
        (lambda p: write_tar(p, {"a/1.png": b""}, tarfile.SYMTYPE), "is a link"),
        (lambda p: write_tar(p, {"a/1.png": png(1), "a/1.cls": b"dog"}), "no class number"),
        (lambda p: write_tar(p, {"a/1.png": png(1), "a/1.jpg": png(1)}), "two images"),
    ],
)
def test_broken_tars_name_the_file(tars, write, message):
    write(tars / "train" / "1.tar")
    with pytest.raises(ValueError, match=message) as raised:
        data(tars).setup()
    assert "1.tar" in str(raised.value)


def test_damaged_images_name_their_place_or_are_skipped(tars, caplog):
    write_tar(tars / "train" / "1.tar", {**members(range(9, COUNT)), "a/0012.png": png(12)[:-30]})
    with pytest.raises(BadImage, match=r"0012.png in .*1\.tar.*on_bad_image=skip"):
        data(tars).sources.train[12]
    source = data(tars, on_bad_image="skip").sources.train
    for _ in range(2):  # named when it is met first
        image, label = source[12]
        assert np.asarray(image)[0, 0, 0] == 130 and label == 13 % 3
        assert name_given(source, 12) == source.name(13) and name_given(source, 13) == source.name(13)
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped unreadable image 1.tar/a/0012.png ({tars / 'train'}): 1 so far"
    ]


def test_many_unreadable_images_are_counted_in_few_lines(caplog):
    class Mostly(EncodedImages):
        def read(self, index):
            if index < 40:
                raise BadImage("damaged")
            return Image.new("RGB", (2, 2))

    source = Mostly(Path("set"), Names([f"{i}.png" for i in range(41)]), [*range(41)], on_bad_image="skip")
    assert [source[i][1] for i in range(41)] == [40] * 41
    counts = [int(r.getMessage().split()[-3]) for r in caplog.records]
    assert counts == [*range(1, 11), 16, 32]
    with pytest.raises(BadImage, match=r"^damaged, or set data\.on_bad_image=skip$"):
        Mostly(Path("set"), source.names, source.labels)[0]


@pytest.mark.parametrize("upright", [False, True])
def test_pictures_in_tars_are_turned_where_asked(tars, upright):
    pixels, exif, buffer = np.arange(60, dtype=np.uint8).reshape(4, 5, 3), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    write_tar(tars / "val" / "0.tar", {"a/0.png": buffer.getvalue()})
    found = data(tars, upright=upright, num_classes=0).sources.val[0][0]
    assert np.array_equal(np.asarray(found), np.rot90(pixels, -1) if upright else pixels)


def test_mistakes_name_the_key(tars):
    for options, key in (({"num_classes": 2}, "data.num_classes=2"), ({"on_bad_image": "no"}, "on_bad_image")):
        with pytest.raises(ValueError, match=key):
            data(tars, **options).setup()
    assert data(tars, num_classes=0).num_classes == 0
    for split in ("train", "val"):
        for path in (tars / split).iterdir():
            path.unlink()
        write_tar(tars / split / "0.tar", {"a/1.png": png(1)})
    assert data(tars).num_classes == 0
    with pytest.raises(ValueError, match=r"has no labels, but data\.num_classes=3"):
        data(tars, num_classes=3).setup()
    with pytest.raises(ValueError, match=r"no train/\*.parquet.*data.train"):
        data(tars, Parquet).setup()


def test_block_order_is_a_permutation_within_windows():
    blocks = np.array([3, 5, 2, 4, 4, 1])
    order = block_order(blocks, torch.Generator().manual_seed(0), window=2)
    assert sorted(order.tolist()) == list(range(19))
    block = np.repeat(np.arange(6), blocks)[order.numpy()]
    at = 0
    windows = []
    while at < 19:
        kinds = set(block[at : at + 1])
        end = at
        while end < 19 and (block[end] in kinds or len(kinds) < 2):
            kinds.add(block[end])
            end += 1
        assert end - at == sum(int(blocks[k]) for k in kinds)
        windows.append(kinds)
        at = end
    assert len(windows) == 3 and set.union(*windows) == set(range(6))
    for world in (1, 2, 4):  # the same global batches on any number of processes
        parts = [StepBatches(size=19, batch_size=8, rank=r, world=world, seed=3, blocks=blocks) for r in range(world)]
        joined = [[p for part in parts for p in part.batch(b)] for b in range(5)]
        alone = StepBatches(size=19, batch_size=8, seed=3, blocks=blocks)
        assert joined == [alone.batch(b) for b in range(5)]


@pytest.mark.parametrize("count", [1, 4, 7, 19, 30])
def test_a_limited_source_keeps_its_blocks(count):
    class Blocks(list):
        native, blocks = True, (3, 0, 5, 2, 4, 4, 1)

    block = np.repeat(np.arange(7), Blocks.blocks)
    limited = Limited(Blocks((i, 0) for i in range(19)), count)
    chosen = [limited[i][0] for i in range(len(limited))]
    assert len(set(chosen)) == min(count, 19) and chosen == sorted(chosen)
    assert list(limited.blocks) == [n for n in np.bincount(block[chosen], minlength=7) if n]
    Blocks.blocks = None
    assert limited.blocks is None


def test_parquet_holds_the_same(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for split, count in (("train", COUNT), ("val", 4)):
        rows = range(count)
        table = pyarrow.table(
            {"image": [{"bytes": png(i), "path": None} for i in rows], "label": [i % 3 for i in rows]}
        )
        names = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        (tmp_path / split).mkdir()
        parquet.write_table(table, tmp_path / split / "0.parquet", row_group_size=5)
    made = data(tmp_path, Parquet)
    found = seen(made.train_dataloader(), 6)
    assert sorted(i for i, _ in found[:COUNT]) == list(range(COUNT)) and all(c == i % 3 for i, c in found)
    assert made.class_names == ["ant", "bee", "cat"]
    assert seen(data(tmp_path, Parquet, workers=2).train_dataloader(start=2), 4) == found[16:]
    reads, read = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, i, **options: reads.append(i) or read(self, i, **options)
    )
    few = data(tmp_path, Parquet, limit_train=11, batch_size=11)
    blocks = few.train_dataset().blocks
    order = [i for _, i in StepBatches(size=11, batch_size=11, seed=0, blocks=blocks).batch(0)]
    batch = next(iter(few.train_dataloader()))
    assert batch["index"].tolist() == order and sorted(order) == list(range(11))
    values = batch["image"][:, 0, 0, 0].int() // 10
    assert values.tolist() == [2 * i for i in order]  # every second one
    assert sorted(reads) == [0, 1, 2, 3, 4] and WINDOW == 4, "each row group once, although only four are kept"
    monkeypatch.undo()
    table = pyarrow.table({"image": [{"bytes": png(0), "path": None}], "label": ["ant"]})
    parquet.write_table(table, tmp_path / "val" / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet: column `label` holds string, expected class numbers"):
        data(tmp_path, Parquet).setup()
    (tmp_path / "train" / "0.parquet").write_bytes(b"rubble")
    with pytest.raises(ValueError, match=r"0\.parquet is no parquet file"):
        data(tmp_path, Parquet).setup()
