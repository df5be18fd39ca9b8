"""Kill a small training at random moments, resume it with resume=auto, and compare its end with an uninterrupted run.

    python scripts/torture.py model=[tokenizer,generator] signal=[KILL,TERM] kills=100 seed=0

The tokenizer trains with a GAN, dropout, a moving codebook and code restarts, the generator with dropout. Trainings are
processes forked from this one, which has imported everything, so that a kill costs a second and not ten. A kill counts
as one inside a checkpoint write only if the writer's temporary file was left behind, and as one in the start of the
loader only if the first batch had not come. Weights, averages, optimizers and random numbers must equal bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import entry, own_folder  # noqa: E402

BASE = (
    "data=fake", "data.image_size=16", "data.train_images=40", "data.val_images=8", "data.flip=true", "data.shift=2",
    "trainer=cpu", "batch_size=8", "log_every=1", "val_every=9", "picture_every=null", "bar=false",
    "optimizer.lr=1e-3", "save_minutes=null",
)  # fmt: skip
TOKENIZER = (
    "tokenizer=llamagen_vq16", "tokenizer.channels=8", "tokenizer.multipliers=[1,2,2]", "tokenizer.blocks=1",
    "tokenizer.z_channels=8", "tokenizer.attention=false", "tokenizer.mid_attention=false", "tokenizer.groups=4",
    "tokenizer.dropout=0.2", "tokenizer.quantizer.vocab_size=32", "tokenizer.quantizer.channels=4",
    "+tokenizer.quantizer.ema_decay=0.9", "+tokenizer.quantizer.restart=0.5", "objective=gan", "objective.gan.start=2",
    "objective.gan.discriminator.width=8", "objective.gan.discriminator.layers=1",
)  # fmt: skip
GENERATOR = ("model=llamagen_tiny", "model.depth=2", "model.width=32", "model.heads=2", "model.dropout=0.1")
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}
MOMENTS = {"any": "at any time", "write": "inside a checkpoint write", "loader": "while the loader starts"}
EXIT_PREEMPTED = 85
LATE = 120.0  # seconds after which a training is called hung


class Failed(ValueError):
    """A training did not resume, hung, or ended in other weights."""


@entry(
    "torture",
    ROOT / "configs" / "torture",  # apart: `model` is a group of the others
    whole={"kills": 1, "save_every": 1, "workers": 0},
    numbers={"write": (0, 1), "loader": (0, 1), "corrupt": (0, 1)},
    lists=("model", "signal", "overrides"),
)
def main(config: Any) -> None:
    models, signals = (([v] if isinstance(v, str) else list(v)) for v in (config.model, config.signal))
    for name, value, known in (("model", models, ("tokenizer", "generator")), ("signal", signals, tuple(SIGNALS))):
        if set(value) - set(known):
            raise ValueError(f"{name}={value}: choose of {', '.join(known)}")
    if config.write + config.loader > 1:
        raise ValueError(f"write={config.write} and loader={config.loader} are shares of the kills: above 1 together")
    import torch

    from vgen import training  # noqa: F401  (imported before the forks)

    torch.set_num_threads(1)  # before any work: a process with a thread pool must not be forked
    for model in models:
        for number in signals:
            counts = torture(config, model, number, Path(config.out) / f"{model}_{number}")
            shown = ", ".join(f"{v} {k}" for k, v in sorted(counts.items()))
            print(f"{model}, SIG{number}: {shown}; every end was bit-identical to the uninterrupted run", flush=True)


def torture(config: Any, model: str, number: str, out: Path) -> Counter[str]:
    """Trainings with kills until `config.kills` of them hit; counts of what happened. Raises Failed."""
    own_folder("out", out, ".torture", empty=True)
    draw = random.Random(f"{config.seed} {model} {number}")
    overrides = [*BASE, f"steps={config.steps}", f"save_every={config.save_every}", f"data.workers={config.workers}"]
    overrides += TOKENIZER if model == "tokenizer" else (*GENERATOR, f"tokenizer_from={small_tokenizer(out)}")
    overrides += list(config.overrides)

    straight, began = Training([*overrides, f"run_dir={out / 'straight'}"], out / "straight.log"), time.monotonic()
    if straight.wait() != 0:
        raise Failed(f"the uninterrupted training failed, see {out / 'straight.log'}")
    seconds, wanted = time.monotonic() - began, identity(out / "straight")

    share = {"write": round(config.kills * config.write), "loader": round(config.kills * config.loader)}
    plan = [moment for moment, count in share.items() for _ in range(count)]
    plan += ["any"] * (config.kills - len(plan))
    draw.shuffle(plan)
    counts: Counter[str] = Counter()
    while plan:
        if counts["trainings that ended"] > 10 + config.kills:
            raise Failed(f"trainings end before their kill ({plan[-1]}): raise steps")
        plan = one_training(plan, overrides, out, SIGNALS[number], draw, seconds, config.corrupt, counts)
        found = identity(out / "killed")
        different = [k for k in wanted if found.get(k) != wanted[k]]
        if different or set(found) != set(wanted):
            raise Failed(f"{out / 'killed'} ended in other values than {out / 'straight'}: {different[:3]}")
    return counts


def one_training(
    plan: list[str], overrides: Sequence[str], out: Path, number: int, draw: random.Random, seconds: float,
    corrupt: float, counts: Counter[str],
) -> list[str]:  # fmt: skip
    """A training from its first step to its end, killed on the way; returns the kills that are still to come."""
    run, log = out / "killed", out / "killed.log"
    shutil.rmtree(run, ignore_errors=True)
    plan, damaged = list(plan), False
    while True:
        training = Training([*overrides, f"run_dir={run}", "resume=auto"], log)
        hit = bool(plan) and training.kill(number, plan[-1], run / "checkpoints", draw, seconds)
        code, said = training.wait(), log.read_text()
        if code not in (0, -number, EXIT_PREEMPTED):
            raise Failed(f"exit code {code} after {counts['kills']} kills, see {log}")
        if damaged and "differs from its SHA-256" in said:
            counts["damaged checkpoints passed over"] += 1
        elif damaged and "starting fresh" in said:
            raise Failed(f"a damaged checkpoint was not passed over, see {log}")
        if code == 0:
            counts["trainings that ended"] += 1
            return plan
        counts["kills"] += 1
        counts["saved and left with code 85"] += code == EXIT_PREEMPTED
        if hit:
            counts[f"kills {MOMENTS[plan.pop()]}"] += 1
        damaged = draw.random() < corrupt and cut_newest(run / "checkpoints")


class Training:
    """`python train.py <overrides>` in a forked process group of its own, with what it says in a file."""

    def __init__(self, overrides: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.events, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(list(overrides), log, theirs))
        self.process.start()
        theirs.close()

    def kill(self, number: int, moment: str, checkpoints: Path, draw: random.Random, seconds: float) -> bool:
        """Send the signal at a moment of that kind; whether it hit one."""
        if moment == "any":
            self.process.join(draw.uniform(0, seconds))
        elif moment == "loader":
            if not self._event("loader starts"):
                return False
            time.sleep(draw.uniform(0, 0.05))
        else:
            skip = draw.randrange(4)  # checkpoints that pass first
            if not self._writing(checkpoints, skip):
                return False
            time.sleep(draw.uniform(0, 0.002))
        hit = self.process.is_alive() and not (moment == "loader" and self.events.poll())
        try:
            # the data loader's workers get it too, as under SLURM
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        if moment == "write" and number == signal.SIGKILL:
            self.process.join()
            return any(checkpoints.glob("*.ckpt.tmp.*"))
        return hit

    def wait(self) -> int:
        self.process.join(LATE)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            raise Failed(f"a training did not end within {LATE:.0f} s")
        return self.process.exitcode

    def _event(self, name: str) -> bool:
        while self.process.is_alive() or self.events.poll():
            if self.events.poll(0.05):
                try:
                    if self.events.recv() == name:
                        return True
                except EOFError:
                    return False
        return False

    def _writing(self, checkpoints: Path, skip: int) -> bool:
        seen: set[str] = set()
        while self.process.is_alive():
            now = {p.name for p in _listing(checkpoints) if f".ckpt.tmp.{self.process.pid}" in p.name}
            if len(seen | now) > skip and now - seen:
                return True
            seen |= now
            time.sleep(0.0002)
        return False


def _listing(folder: Path) -> Iterator[Path]:
    return iter(list(folder.iterdir()) if folder.is_dir() else ())


def _train(overrides: list[str], log: Path, events: Connection) -> None:
    os.setpgid(0, 0)
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from lightning import Callback

    from vgen import training
    from vtok.data.module import StepData

    class FirstBatch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not self.__dict__.setdefault("told", False):
                self.told = True
                events.send("first batch")

    loader, build = StepData.train_dataloader, training.build_trainer

    def starts(self: StepData, *arguments: Any) -> Any:
        events.send("loader starts")
        return loader(self, *arguments)

    def watched(*arguments: Any, **named: Any) -> Any:
        trainer = build(*arguments, **named)
        trainer.callbacks.append(FirstBatch())
        return trainer

    StepData.train_dataloader, training.build_trainer = starts, watched
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", overrides=overrides)
        training.train(config)


def small_tokenizer(folder: Path) -> Path:
    """An untrained tokenizer for the generator, as a shared folder."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from vtok.checkpoint import save_folder
    from vtok.config import instantiate
    from vtok.rng import seed_all

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=[*BASE, *TOKENIZER])
    seed_all(0)
    return save_folder(instantiate(config.tokenizer, _convert_="all"), folder / "tokenizer")


def identity(run: Path) -> dict[str, str]:
    """Hash of every value that training left in last.ckpt, by place: weights, averages, optimizers, random numbers."""
    from vtok.checkpoint import read_checkpoint, weights_hash

    data = read_checkpoint(run / "checkpoints" / "last.ckpt")
    parts = {k: data[k] for k in ("state_dict", "optimizer_states")} | {"rng": data["callbacks"]["ResumeState"]["rng"]}

    def leaves(place: str, value: Any) -> Iterator[tuple[str, str]]:
        if hasattr(value, "detach"):
            yield place, weights_hash({"": value})
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                yield from leaves(f"{place}.{key}", item)
        else:
            yield place, repr(value)

    return dict(leaves("", parts))


def cut_newest(checkpoints: Path) -> bool:
    """Damage the newest checkpoint where an older whole one is left."""
    from vtok.ckpt_files import generations, verify

    found = [path for path in generations(checkpoints) if verify(path) is None]
    last = checkpoints / "last.ckpt"
    if len(found) < 2 or not last.is_file() or not last.samefile(found[0]):
        return False
    os.truncate(found[0], found[0].stat().st_size // 2)  # last.ckpt is the same file
    return True


if __name__ == "__main__":
    main()
