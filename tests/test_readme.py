"""Every shell block of the README, run line by line in an empty folder that links to the clone, then the Python block
that reads what they left; and the commands that README, docs and configurations print, composed."""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from forks import command
from hydra import compose, initialize_config_dir
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("train.py", "sample.py", "configs", "eval", "scripts", "vtok", "vgen")


def blocks() -> list[list[str]]:
    found = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [[line for line in block.splitlines() if line and "activate" not in line] for block in found]


COMMAND = re.compile(r"python (train\.py|sample\.py|scripts/\w+\.py|-m eval\.\w+)(.*)")
OVERRIDE = re.compile(r"[+~]{0,2}[\w.]+=")
PLAIN = {"experiment", "data.folder", "data.val_folder", "tokenizer_from", "init_from"}  # composed by other tests


def printed() -> set[tuple[str, ...]]:
    """(configuration, overrides) of every command that README, docs and configurations print: up to the first word that
    is no key=value, with x for what stands in <>; without those that leave keys out by dots, and those of experiments
    alone."""
    found = set()
    texts = [p for pattern in ("README.md", "docs/**/*.md", "configs/**/*.yaml") for p in ROOT.glob(pattern)]
    for text in texts:
        lines = re.sub(r" *\\\n[#> ]*", " ", text.read_text())
        lines = re.sub(r"\n#   (?=[\w.]+=)", " ", lines)  # a header goes on in lines that are moved in
        for program, rest in COMMAND.findall(re.sub(r"<[^>\n]*>", "x", lines)):
            name = program.removesuffix(".py").removeprefix("scripts/").replace("-m eval.", "eval_")
            for short, choice in (("$data", "data=cifar10"), ("$where", "data=imagefolder"), ("data=x", "data=fake")):
                rest = rest.replace(short, choice)
            words = [w.strip("'\"") for w in re.split(r"[`|;]| #", rest)[0].split()]
            many = "-m" in words
            words = [w for w in words if w not in ("-m", "--config-dir", "docs/add_a_paper")]
            if "..." in rest or "mine" in words or not (ROOT / "configs" / f"{name}.yaml").is_file():
                continue
            words = list(itertools.takewhile(OVERRIDE.match, words))
            words = [re.sub(r"(=[^,\[{]*),.*", r"\1", w) if many else w for w in words]
            if any(w.partition("=")[0] not in PLAIN for w in words):
                found.add((name, *words))
    return found


def test_printed_commands_compose():
    """No key that is not there, no name of a configuration that is gone."""
    commands, wrong = sorted(printed()), []
    assert len(commands) > 60
    search = f"hydra.searchpath=[file://{ROOT / 'docs' / 'add_a_paper'}]"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for name, *overrides in commands:
            try:
                compose(name, overrides=[*overrides, search], return_hydra_config=True)
            except Exception as error:
                wrong.append(f"{name} {' '.join(overrides)}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The links, and a folder `pictures` with two classes."""
    home = tmp_path / "readme"
    home.mkdir()
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
def test_blocks_run(folder):
    """One test, since a block uses what those before it left. Trainings with batches of 8: those of a GPU take minutes.
    At the end the grid is a picture, the samples are as many as asked for, the sweep has two runs, and W&B wrote
    offline."""
    for line in itertools.chain(*blocks()):
        words = shlex.split(line)
        env = {}
        while "=" in words[0]:
            name, value = words.pop(0).split("=", 1)
            env[name] = value
        assert words[0] == "python", f"README line {line!r} is no python command"
        small = ["batch_size=8"] if words[1] == "train.py" else []
        done = command(*words[1:], *small, folder=folder, **env)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (folder / "loads.py").write_text(code + "print(tuple(tokens.shape), tuple(copies.shape), tuple(images.shape))")
    done = command("loads.py", folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("(1, 3, 32, 32) (2, 32, 32, 3)")
    assert Image.open(folder / "outputs/readme/grid.png").size[0] > 8 * 64
    samples = np.load(folder / "outputs/readme/samples.npz")
    assert samples["arr_0"].shape[0] == 40 and np.bincount(samples["arr_1"]).tolist() == [4] * 10
    assert len(list((folder / "outputs/sweeps/readme_sweep").glob("*/checkpoints/last.ckpt"))) == 2
    assert list(folder.rglob("offline-run-*")), "WANDB_MODE=offline leaves a run to synchronise"
