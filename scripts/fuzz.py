"""Feed damaged pictures, configs, checkpoints and shards to train.py, in this process, through its own entry point.

    python scripts/fuzz.py images=500 configs=200 files=200 payloads=50

Every case must end with exit code 2 and at most three lines, none of them a traceback, that name the file or key, or
be accepted (odd pictures that are whole, values that happen to be right). Training itself is left out. Nothing that a
case carries may run, and files that were there keep their bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import entry, own_folder  # noqa: E402

SMALL = (
    "data=fake", "data.image_size=16", "tokenizer=llamagen_vq16", "tokenizer.channels=8", "tokenizer.groups=4",
    "tokenizer.multipliers=[1,2,2]", "tokenizer.blocks=1", "tokenizer.z_channels=8", "tokenizer.attention=false",
    "tokenizer.mid_attention=false", "tokenizer.quantizer.vocab_size=32", "tokenizer.quantizer.channels=4",
    "trainer=cpu", "batch_size=8", "steps=2", "val_every=2", "picture_every=null", "bar=false",
)  # fmt: skip
WRONG = ("", "abc", "-1", "0", "1.5", "null", "[1,2]", "{a: 1}", "true", "1e99", "nan", "../..", "x" * 300, "'", "${a}")
KEYS = (
    "steps", "batch_size", "accumulate", "seed", "clip", "ema", "log_every", "val_every", "save_every", "precision",
    "on_nan", "monitor", "monitor_mode", "optimizer.lr", "optimizer.betas", "schedule.kind", "schedule.warmup",
    "data", "data.image_size", "data.workers", "data.crop", "tokenizer", "tokenizer.channels", "tokenizer.groups",
    "tokenizer.quantizer.vocab_size", "objective", "trainer", "resume", "init_from", "model", "data_timeout",
    "save_minutes", "tokenizer.multipliers", "discriminator_optimizer.lr", "trust", "nothing.at.all",
)  # fmt: skip


class Failed(ValueError):
    """A case ended in a traceback, said too much, ran code, or changed a file."""


@entry("fuzz", ROOT / "configs", whole=dict.fromkeys(("images", "configs", "files", "payloads", "commands"), 0))
def main(config: Any) -> None:
    out = own_folder("out", Path(config.out).resolve(), ".fuzz", empty=True)
    draw, failed = random.Random(config.seed), []
    total = sum(int(config[kind]) for kind in ("images", "configs", "files", "payloads"))
    drawn, number = set(random.Random(f"{config.seed} commands").sample(range(total), min(total, config.commands))), 0
    for kind, cases in (("images", images), ("configs", configs), ("files", files), ("payloads", payloads)):
        counts: Counter[str] = Counter()
        for name, arguments in cases(int(config[kind]), draw, out / kind):
            try:
                counts[check(name, command(arguments), arguments, out)] += 1
                if number in drawn:
                    counts[check(name, process(arguments), arguments, out) + " as commands too"] += 1
            except Failed as error:
                print(f"failed: {error}", file=sys.stderr, flush=True)
                failed.append(name)
            number += 1
        print(f"{kind}: " + ", ".join(f"{v} {k}" for k, v in sorted(counts.items())), flush=True)
    if (out / "ran").exists():
        raise Failed("code of a payload was run")
    if failed:
        raise Failed(f"{len(failed)} cases: {', '.join(failed)}")


def check(name: str, ended: tuple[int, str], arguments: list[str], out: Path) -> str:
    """refused or accepted; `ended` is an exit code and standard error. Raises Failed."""
    code, text = ended
    lines = text.splitlines()
    if code not in (0, 2) or len(lines) > 3 or any(line.startswith("Traceback") for line in lines):
        raise Failed(f"{name}: exit code {code}, {' '.join(arguments)[-300:]}: {text[-600:]}")
    if code == 2 and not (lines and lines[0].startswith("error: ") and len(lines[0]) > 12):
        raise Failed(f"{name}: the message says nothing: {text[:200]!r}")
    if (out / "ran").exists():
        raise Failed(f"{name}: code was run")
    return "refused" if code else "accepted"


def command(arguments: list[str]) -> tuple[int, str]:
    """`python train.py <arguments>` in this process without the training itself: exit code, standard error."""
    import lightning
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()  # that of this command
    before, fit, errors = sys.argv, lightning.Trainer.fit, io.StringIO()
    traceback, asked = "VTOK_TRACEBACK", os.environ.pop("VTOK_TRACEBACK", None)
    sys.argv, lightning.Trainer.fit = ["train.py", *arguments], lambda *_, **__: None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stop:
        return (stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1), errors.getvalue()
    except BaseException as error:
        return 1, f"Traceback: {type(error).__name__}: {error}"
    finally:
        sys.argv, lightning.Trainer.fit = before, fit
        if asked is not None:
            os.environ[traceback] = asked
    return 0, ""


def process(arguments: list[str]) -> tuple[int, str]:
    """The same as a command of its own, training included; warnings of libraries do not count as its message."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr if done.returncode else ""


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, emptied, zeroed, with bytes changed, or with rubble put in."""
    how = draw.randrange(5)
    if how == 0:
        return data[: draw.randrange(len(data))]
    if how == 1:
        return b""
    at, size = draw.randrange(len(data)), draw.randrange(1, 64)
    if how == 2:
        return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    if how == 3:
        changed = bytearray(data)
        for _ in range(size):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return data[:at] + draw.randbytes(size) + data[at:]


def images(count: int, draw: random.Random, out: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder of three pictures, one of which is odd or damaged."""
    from PIL import Image

    def picture(size: tuple[int, int] = (20, 20), mode: str = "RGB") -> Image.Image:
        return Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).convert(mode)

    def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    odd: list[tuple[str, str, Callable[[], bytes]]] = [
        ("CMYK", "jpg", lambda: encoded(picture(mode="CMYK"), "JPEG")),
        ("16 bits", "png", lambda: encoded(picture(mode="L").convert("I;16"), "PNG")),
        ("palette", "png", lambda: encoded(picture(mode="P"), "PNG")),
        ("animated", "gif", lambda: encoded(picture(), "GIF", save_all=True, append_images=[picture()])),
        ("1 x 1", "png", lambda: encoded(picture((1, 1)), "PNG")),
        ("20,000 px wide", "png", lambda: encoded(picture((20000, 1)), "PNG")),
        ("wrong ending", "png", lambda: encoded(picture(), "JPEG")),
        ("zero bytes", "jpg", lambda: b""),
        ("text", "jpg", lambda: b"not an image"),
    ]
    for i in range(count):
        folder = out / f"{i:04d}"
        folder.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(encoded(picture(), "PNG"))
        if i % 2:
            name, ending, make = odd[i // 2 % len(odd)]
            (folder / f"c.{ending}").write_bytes(make())
        else:
            name, ending = "damaged", draw.choice(("jpg", "png", "gif", "webp", "bmp"))
            kind = {"jpg": "JPEG"}.get(ending, ending.upper())
            (folder / f"c.{ending}").write_bytes(damaged(encoded(picture(), kind), draw))
        wanted = [a for a in SMALL if not a.startswith("data")]
        where = [f"data.folder={folder}", "data=imagefolder", "data.image_size=16", "data.workers=0", "data.scan=full"]
        yield f"image {i} ({name})", [*wanted, *where, f"data.cache_dir={out}/cache", f"run_dir={out}/run{i}"]


def configs(count: int, draw: random.Random, out: Path) -> Iterator[tuple[str, list[str]]]:
    for i in range(count):
        key, value = draw.choice(KEYS), draw.choice(WRONG)
        yield f"config {i}", [*SMALL, f"{key}={value}", f"run_dir={out}/run{i}", "save=false"]


def files(count: int, draw: random.Random, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Checkpoints to resume and to start from, shared folders of tokenizers, and shards of codes."""
    import numpy as np
    import torch

    from vtok.checkpoint import save_folder
    from vtok.config import describe
    from vtok.data.extract import extract
    from vtok.data.fake import Fake
    from vtok.models.cnn import CNNTokenizer
    from vtok.quantize.vq import VQ

    shape = dict(channels=8, multipliers=(1, 2, 2), blocks=1, groups=4, attention=False, mid_attention=False)
    tokenizer = CNNTokenizer(image_size=16, quantizer=VQ(vocab_size=32, channels=4), z_channels=8, **shape)
    save_folder(tokenizer, out / "folder", kind="tokenizer")
    state = {f"module.{k}": v for k, v in tokenizer.state_dict().items()}
    torch.save(
        {"module": {**describe(tokenizer), "kind": "tokenizer"}, "state_dict": state, "global_step": 1}, out / "a.ckpt"
    )
    fake = Fake(image_size=16, batch_size=8, train_images=40, val_images=8)
    extract(fake, tokenizer, out / "codes", shard_size=16, say=lambda *_: None)
    generator = [a for a in SMALL if not a.startswith(("data", "tokenizer"))]
    generator += ["model=llamagen_tiny", "model.depth=1", "model.width=32", "model.heads=2"]
    assert np.load(out / "codes" / "train" / "codes-00000.npy").dtype == np.uint16
    for i in range(count):
        place = out / f"{i:04d}"
        if i % 3 == 0:
            place.mkdir()
            (place / "a.ckpt").write_bytes(damaged((out / "a.ckpt").read_bytes(), draw))
            extra = [f"{draw.choice(('resume', 'init_from'))}={place / 'a.ckpt'}", *SMALL]
        else:
            source = out / ("folder" if i % 3 == 1 else "codes")
            shutil.copytree(source, place)
            target = draw.choice(sorted(p for p in place.rglob("*") if p.is_file() and "parts" not in p.parts))
            target.write_bytes(damaged(target.read_bytes(), draw))
            own = ["data=fake", "data.image_size=16", f"tokenizer_from={place}"]
            extra = [*generator, *(own if i % 3 == 1 else ["data=codes", f"data.folder={place}", "data.verify=true"])]
        yield f"file {i}", [*extra, f"run_dir={out}/run{i}"]


class Runs:
    """A pickle that makes the file `ran` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def payloads(count: int, draw: random.Random, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Pickles in checkpoints and beside them, and configs whose _target_ is a call."""
    import torch

    out.mkdir(parents=True)
    ran = out.parent / "ran"
    calls = (
        "os.mkdir",
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "shutil.rmtree",
    )
    groups = ("tokenizer", "data", "objective", "trainer", "tokenizer.quantizer", "trainer.strategy")
    for i in range(count):
        if i % 2:
            group, call = draw.choice(groups), draw.choice(calls)
            extra = [f"++{group}._target_={call}", f"++{group}.path={ran}"]
        else:
            file = out / f"{i:04d}.ckpt"
            body = {"module": Runs(ran), "state_dict": {}, "global_step": 0}
            if i % 4:
                file.write_bytes(pickle.dumps(body, protocol=draw.choice((2, 4))))
            else:
                torch.save(body, file)
            extra = [f"{draw.choice(('resume', 'init_from'))}={file}"]
        yield f"payload {i}", [*SMALL, *extra, f"run_dir={out}/run{i}"]


if __name__ == "__main__":
    main()
