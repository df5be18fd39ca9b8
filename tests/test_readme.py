"""Every shell block of the README, run line by line in an empty folder that links to the clone."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from forks import command
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("train.py", "sample.py", "configs", "eval", "scripts", "vtok", "vgen")


def blocks() -> list[list[str]]:
    found = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [[line for line in block.splitlines() if line and "activate" not in line] for block in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The links, and a folder `pictures` with two classes."""
    home = tmp_path_factory.mktemp("readme")
    for name in LINKS:
        (home / name).symlink_to(ROOT / name)
    drawer = np.random.default_rng(0)
    for kind in ("bark", "sand"):
        (home / "pictures" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = drawer.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "pictures" / kind / f"{i}.png")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks())))
def test_block_runs(folder, number):
    for line in blocks()[number]:
        words = shlex.split(line)
        env = {}
        while "=" in words[0]:
            name, value = words.pop(0).split("=", 1)
            env[name] = value
        assert words[0] == "python", f"README line {line!r} is no python command"
        done = command(*words[1:], folder=folder, **env)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_what_the_blocks_left(folder):
    """The grid is a picture, the samples are as many as asked for, the sweep has two runs, W&B wrote offline."""
    assert Image.open(folder / "outputs/readme/grid.png").size[0] > 8 * 64
    samples = np.load(folder / "outputs/readme/samples.npz")
    assert samples["arr_0"].shape[0] == 40 and np.bincount(samples["arr_1"]).tolist() == [4] * 10
    assert len(list((folder / "outputs/sweeps/readme_sweep").glob("*/checkpoints/last.ckpt"))) == 2
    assert list(folder.rglob("offline-run-*")), "WANDB_MODE=offline leaves a run to synchronise"
