"""A disk that fills up, a real one: a tmpfs of a few hundred kilobytes. What was written survives, and work goes on
once there is room."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TOKENIZER, everything, run, state
from torch import distributed as dist

from vtok import pieces
from vtok.ckpt_files import AtomicCheckpointIO, verify
from vtok.data.extract import extract
from vtok.data.fake import Fake
from vtok.data.files import cached
from vtok.data.imagefolder import file_source, find
from vtok.models.cnn import CNNTokenizer
from vtok.quantize.vq import VQ

NEEDS = r"no space left to write .*: it needs ([\d,]+) bytes, ([\d,]+) bytes are free; what was there is untouched"


@pytest.fixture
def disk(tmp_path):
    """The folder of a small disk; `resize` takes bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root on Linux")

    class Disk(type(folder)):
        def resize(self, size: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self)], check=True)

    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_cache_of_decoded_images_takes_its_disk_before_it_decodes(disk):
    """It is written through memory, where a full disk would end the process with a bus error."""
    source = disk.parent / "pictures"
    (source / "a").mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(source / "a" / f"{i:02d}.png")
    names, classes = find(source)
    files = file_source(source, names, classes, "error")
    with pytest.raises(OSError, match=NEEDS) as error:
        cached(files, 256, disk)  # 5.9 MB on one
    assert error.value.errno == errno.ENOSPC and not list(disk.glob("*.npy*"))
    disk.resize(2**23)
    found = cached(files, 256, disk)
    assert len(found) == 30 and np.asarray(found[29][0])[0, 0].tolist() == [29, 0, 0]
    del found, error  # maps of files, in the second's frames too, would keep the disk busy
    gc.collect()


def needed(error: pytest.ExceptionInfo) -> int:
    assert error.value.errno == errno.ENOSPC
    wanted, free = (int(n.replace(",", "")) for n in re.search(NEEDS, str(error.value)).groups())
    assert free < wanted
    return wanted


def test_a_training_keeps_its_checkpoint_and_goes_on(disk, tmp_path):
    job = (*TOKENIZER, "steps=4", "save_every=2", "val_every=4")
    run(*job, f"run_dir={tmp_path / 'straight'}")
    size = (tmp_path / "straight" / "checkpoints" / "last.ckpt").stat().st_size
    disk.resize(int(1.6 * size))
    with pytest.raises(OSError) as error:
        run(*job, f"run_dir={disk / 'run'}")
    assert 0.8 * size < needed(error) <= size
    last = disk / "run" / "checkpoints" / "last.ckpt"
    assert verify(last) is None and state(disk / "run")["global_step"] == 2
    assert sorted(p.name for p in last.parent.glob("*.ckpt*")) == [
        "last.ckpt", "last.ckpt.sha256", "step_2.ckpt", "step_2.ckpt.sha256"
    ]  # fmt: skip
    disk.resize(4 * size)
    run(*job, f"run_dir={disk / 'run'}", "resume=auto")
    assert everything(disk / "run") == everything(tmp_path / "straight")


def test_codes_keep_their_shards_and_go_on(disk, tmp_path):
    shape = dict(channels=8, multipliers=(1, 2), blocks=1, groups=4, attention=False, mid_attention=False)
    torch.manual_seed(0)
    tokenizer = CNNTokenizer(image_size=32, quantizer=VQ(vocab_size=32, channels=4), z_channels=8, **shape).eval()
    data = Fake(image_size=32, batch_size=16, train_images=512, val_images=16)

    def extracted(out: Path) -> dict[str, bytes]:
        extract(data, tokenizer, out, shard_size=64, say=lambda *_: None)
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*.npy"))}

    wanted = extracted(tmp_path / "roomy")
    largest = max(len(v) for v in wanted.values())
    disk.resize(sum(p.stat().st_size for p in (tmp_path / "roomy").rglob("*")) // 2)
    with pytest.raises(OSError) as error:
        extracted(disk / "codes")
    assert needed(error) >= largest - 1024  # a header of numpy more
    kept = {p: p.stat().st_mtime_ns for p in (disk / "codes").rglob("*.npy")}
    assert kept and len(kept) < len(wanted)
    assert all(p.read_bytes() == wanted[p.relative_to(disk / "codes").as_posix()] for p in kept)
    assert not [p for p in (disk / "codes").rglob("*") if ".tmp" in p.name]
    disk.resize(8 * sum(len(v) for v in wanted.values()))
    assert extracted(disk / "codes") == wanted
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())


def test_pieces_leave_nothing_behind(disk, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        pieces.write({"state_dict.a": torch.ones(1000)}, disk / "step_1.pieces")
        with pytest.raises(OSError) as error:
            pieces.write({"state_dict.a": torch.ones(1_000_000)}, disk / "step_2.pieces")
    finally:
        dist.destroy_process_group()
    assert needed(error) == 4_000_000 and os.listdir(disk) == ["step_1.pieces"]
    assert torch.equal(pieces.read_whole(disk / "step_1.pieces")["state_dict.a"], torch.ones(1000))


def test_the_oldest_checkpoint_is_given_up_once(disk, capsys):
    files = AtomicCheckpointIO()
    for step in (1, 2, 3):
        files.save_checkpoint({"a": torch.full((90_000,), float(step))}, disk / f"step_{step}.ckpt")
    assert "removing step_1.ckpt" in capsys.readouterr().out
    assert all(verify(disk / f"step_{step}.ckpt") is None for step in (2, 3)) and not (disk / "step_1.ckpt").exists()
    assert np.array_equal(files.load_checkpoint(disk / "step_3.ckpt")["a"], np.full(90_000, 3))
