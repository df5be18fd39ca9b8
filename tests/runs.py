"""Training runs for tests: the command of train.py in this process, tiny, and what a run left as comparable values."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from vgen.training import train
from vtok.checkpoint import save_folder
from vtok.models.cnn import CNNTokenizer
from vtok.models.var import VARTokenizer
from vtok.quantize.residual import MultiScaleVQ
from vtok.quantize.vq import VQ

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# a tokenizer with everything that draws or remembers: dropout, augmentation, code restarts, a GAN with two optimizers
TOKENIZER = (
    "data=fake",
    "data.image_size=16",
    "data.train_images=40",
    "data.val_images=12",
    "data.flip=true",
    "data.shift=2",
    "tokenizer=llamagen_vq16",
    "tokenizer.channels=8",
    "tokenizer.multipliers=[1,2,2]",
    "tokenizer.blocks=1",
    "tokenizer.z_channels=8",
    "tokenizer.attention=false",
    "tokenizer.mid_attention=false",
    "tokenizer.groups=4",
    "tokenizer.dropout=0.2",
    "tokenizer.quantizer.vocab_size=32",
    "tokenizer.quantizer.channels=4",
    "+tokenizer.quantizer.ema_decay=0.9",
    "+tokenizer.quantizer.restart=0.5",
    "objective=gan",
    "objective.gan.start=2",
    "objective.gan.discriminator.width=8",
    "objective.gan.discriminator.layers=1",
    "trainer=cpu",
    "batch_size=8",
    "log_every=1",
    "save_every=1000",
    "val_every=4",
    "picture_every=null",
    "bar=false",
    "optimizer.lr=1e-3",
)

# the same without what draws or has a second optimizer
PLAIN = tuple(o for o in TOKENIZER if "gan" not in o and "dropout" not in o and "restart" not in o)
GENERATOR = (
    "data=fake",
    "data.image_size=16",
    "data.train_images=40",
    "data.val_images=12",
    "data.flip=true",
    "trainer=cpu",
    "batch_size=8",
    "log_every=1",
    "save_every=1000",
    "val_every=4",
    "picture_every=null",
    "bar=false",
    "optimizer.lr=1e-3",
)
SMALL = ("model.depth=2", "model.width=32", "model.heads=2", "model.dropout=0.1")
LLAMAGEN = (*GENERATOR, "model=llamagen_tiny", *SMALL)
VAR = (*GENERATOR, "model=var_tiny", *(f"++{item}" for item in SMALL), "++model.drop_path=0.2")


def tokenizer_folder(folder: Path, family: str = "llamagen") -> Path:
    """An untrained tokenizer of 16 px images for generators of that family, as a shared folder."""
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2, 2), blocks=1, groups=4, attention=False, mid_attention=False)
    if family == "var":
        quantizer = MultiScaleVQ(vocab_size=16, channels=4, sides=(1, 2, 4))
        return save_folder(
            VARTokenizer(image_size=16, quantizer=quantizer, z_channels=None, projection=3, **shape), folder
        )
    return save_folder(
        CNNTokenizer(image_size=16, quantizer=VQ(vocab_size=16, channels=4), z_channels=8, **shape), folder
    )


def run(*overrides: str) -> float | None:
    """`python train.py <overrides>` in this process; mistakes are raised, not printed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=False)
    return train(config)


def run_all(jobs: Iterable[Iterable[str]]) -> None:
    """One after the other: what every process of torchrun does."""
    for job in jobs:
        run(*job)


def state(folder: Path, name: str = "last") -> dict:
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def digest(value: object) -> str:
    """Hash of nested tensors and numbers, bit for bit."""
    sha = hashlib.sha256()

    def add(item: object) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(item.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if item.numel() else b"")
        elif isinstance(item, dict):
            for key in item:
                sha.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


def everything(folder: Path) -> dict[str, str]:
    """Hashes of all that a run has learned: weights (raw, averaged, discriminator), optimizers, random numbers."""
    data = state(folder)
    found = {k: digest(v) for k, v in data["state_dict"].items()}
    found["optimizers"] = digest(data["optimizer_states"])
    found["rng"] = digest(data["callbacks"]["ResumeState"]["rng"])
    return found


def losses(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as text, without what a clock says."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("speed/")} for row in csv.DictReader(file)]
    return [row for row in rows if set(row) - {"step"}]
