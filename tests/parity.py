"""DDP and FSDP against one process, run as a program: tiny models of every family, losses of every optimizer step.

    python tests/parity.py kinds=generator out=outputs/parity
    python tests/parity.py kinds=tokenizer,statistics precision=64-true out=outputs/parity64

The same global batch is cut over 1, 2 and 4 gloo processes on the CPU, which live through all cases (a start costs more
than a training). The loss (and the discriminator's) of each of 50 steps must equal that of one process without a
strategy, to 1e-5. A tokenizer chooses codes: in float32 a sum in another order now and then chooses another, so they
are compared in float64. Further keys: steps, worlds=1,2,4, modes=ddp,fsdp, only=<families>.
Dropout and drop path are off: they draw from each process's own generator. Every case is a file under `out`, so a
command that was stopped goes on; the table is printed and written to <out>/parity.md. Exit code 1 where a case differs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from generators import FAMILIES as GENERATORS  # noqa: E402
from generators import make as make_generator  # noqa: E402
from generators import tokens_of  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from tokenizers import CNN, cnn_ibq, magvit2, magvit2_bsq  # noqa: E402
from tokenizers import FAMILIES as TOKENIZERS  # noqa: E402
from tokenizers import make as make_tokenizer  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from vgen.lit import LitGenerator  # noqa: E402
from vtok.callbacks import quiet  # noqa: E402
from vtok.ckpt_files import AtomicCheckpointIO  # noqa: E402
from vtok.data.fake import Fake  # noqa: E402
from vtok.data.module import StepData  # noqa: E402
from vtok.fsdp import Sharded  # noqa: E402
from vtok.lit import Lit, LitTokenizer  # noqa: E402
from vtok.losses.discriminators import MaskBitDiscriminator  # noqa: E402
from vtok.losses.gan import GAN  # noqa: E402
from vtok.losses.objective import TokenizerObjective  # noqa: E402
from vtok.models.cnn import CNNTokenizer  # noqa: E402
from vtok.noise import key  # noqa: E402
from vtok.optim import Recipe  # noqa: E402
from vtok.quantize.vq import VQ  # noqa: E402

BATCH, ROWS, TOLERANCE = 8, 40, 1e-5
COMPARED = ("train/loss", "train/discriminator")


def small(**options: Any) -> CNNTokenizer:
    quantizer = VQ(vocab_size=32, channels=6, l2_norm=True, **options)
    return CNNTokenizer(image_size=16, quantizer=quantizer, z_channels=8, **CNN)


# what counts over a batch: code histograms and sums (moving averages), entropy of the mean, the adaptive GAN weight.
# Restarts of codes are left out: they draw from the vectors of process 0's part of the batch.
STATISTICS = {
    "vq_moving_average": lambda: small(ema_decay=0.9),
    "vq_entropy": lambda: small(entropy_weight=0.1, entropy_temperature=0.1),
    "lfq_entropy": magvit2,
    "bsq_entropy": magvit2_bsq,
    "ibq_entropy": cnn_ibq,
    "gan_adaptive": small,
}


class Rows(Dataset):
    """Fixed random tokens for a generator, indexed by (epoch, index)."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        epoch, index = position
        return {"tokens": self.tokens[index], "label": index % 5, "key": key(0, epoch, index), "index": index}


class Tokens(StepData):
    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(batch_size=BATCH)
        self.rows = Rows(tokens)

    def train_dataset(self) -> Dataset:
        return self.rows


class Curve(DummyLogger):
    """Keeps the numbers that every optimizer step records."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({k: v for k, v in metrics.items() if k.startswith("train/")})


def still(module: nn.Module) -> nn.Module:
    """In training mode, without what draws from a process's own generator."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "rate"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module.train()


def build(kind: str, name: str, steps: int) -> tuple[Lit, StepData]:
    # LFQ's and BSQ's entropies are so steep that at 1e-3 a rounding of float64 grows to 1 in 30 steps
    rate = 1e-4 if name in ("lfq_entropy", "bsq_entropy", "magvit2", "magvit2_bsq") else 1e-3
    recipe = Recipe(
        optimizer={"lr": rate}, schedule={"warmup": 5, "kind": "cosine"}, steps=steps, clip=1.0, ema=0.99, log_every=1
    )
    if kind == "generator":
        model = still(make_generator(name))
        return LitGenerator(model, recipe), Tokens(tokens_of(model, ROWS))
    torch.manual_seed(0)
    model = still(make_tokenizer(name) if kind == "tokenizer" else STATISTICS[name]())
    gan = None
    if name == "gan_adaptive":
        judge = MaskBitDiscriminator(width=8, stages=2, groups=4, patches=2)  # GroupNorm: no batch statistics
        gan = GAN(discriminator=judge, start=2, adaptive=True, lecam_weight=0.001)
    lit = LitTokenizer(
        model,
        TokenizerObjective(perceptual_weight=0.0, gan=gan),
        recipe,
        discriminator_optimizer={"lr": 1e-3, "betas": [0.5, 0.9], "weight_decay": 0.0},
    )
    return lit, Fake(image_size=16, batch_size=BATCH, train_images=ROWS, val_images=8, flip=True)


def train(kind: str, name: str, mode: str, world: int, steps: int, precision: str) -> list[dict[str, float]]:
    """Losses of every step. mode "one": no strategy at all."""
    lit, data = build(kind, name, steps)
    strategy: Any = "auto"
    if mode == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=kind != "generator")
    elif mode == "fsdp":
        strategy = Sharded(process_group_backend="gloo")
    if double := mode == "fsdp" and precision == "64-true":  # Lightning's strategy refuses the name
        precision = "32-true"
        lit.double()
        lit.on_after_batch_transfer = lambda batch, _: {**batch, "image": batch["image"].double()}
        torch.set_default_dtype(torch.float64)
    curve, out = Curve(), tempfile.mkdtemp()
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision=precision, max_steps=steps, max_epochs=-1,
        limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, logger=curve,
        plugins=[AtomicCheckpointIO()], inference_mode=mode != "fsdp",
    )  # fmt: skip
    try:
        trainer.fit(lit, data)
    finally:
        if double:
            torch.set_default_dtype(torch.float32)
    shutil.rmtree(out, ignore_errors=True)
    return curve.rows


def cases(options: dict[str, str]) -> list[tuple[str, str, str, int]]:
    """(kind, name, mode, world) of all that is asked for, those of one process first."""
    groups = {"generator": GENERATORS, "tokenizer": TOKENIZERS, "statistics": STATISTICS}
    only = set(options["only"].split(",")) if options["only"] else None
    kinds = options["kinds"].split(",")
    named = [(kind, name) for kind in kinds for name in groups[kind] if only is None or name in only]
    worlds = [int(w) for w in options["worlds"].split(",")]
    places = [(mode, world) for world in worlds for mode in options["modes"].split(",") if world > 1 or mode == "fsdp"]
    return [(k, n, mode, world) for mode, world in [("one", 1), *places] for k, n in named
            if not (mode == "fsdp" and n == "gan_adaptive")]  # fmt: skip


def place_of(out: Path, kind: str, name: str, mode: str, world: int) -> Path:
    return out / f"{kind}-{name}-{mode}{world}.json"


def worker(rank: int, todo: list[tuple[str, str, str, int]], out: Path, options: dict[str, str], meet: Any) -> None:
    """One of the processes: all cases of its world size or larger, each with a process group of its own."""
    torch.set_num_threads(1)
    quiet()
    steps, precision = int(options["steps"]), options["precision"]
    for number, (kind, name, mode, world) in enumerate(todo):
        store = out / f".store{number}"
        if rank < world:
            began, error = time.monotonic(), None
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "parity", "GLOO_SOCKET_IFNAME": "lo"}
            os.environ.update({k: str(v) for k, v in environment.items()})
            if mode == "one":
                os.environ.pop("TORCHELASTIC_RUN_ID")
                for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                    os.environ.pop(variable)
            else:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=20)
                )
            rows: list[dict[str, float]] = []
            try:
                rows = train(kind, name, mode, world, steps, precision)
            except Exception:
                error = traceback.format_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
            if rank == 0 or error:
                record = {"rows": rows, "error": error, "seconds": time.monotonic() - began}
                place_of(out, kind, name, mode, world).write_text(json.dumps(record))
                print(f"{kind} {name} {mode} x {world}: {error or 'done'}", flush=True)
        meet.wait()


def difference(first: Iterable[dict[str, float]], second: Iterable[dict[str, float]]) -> float:
    """Largest difference of the losses at a step, relative to their size (at least 1e-3)."""
    first, second = list(first), list(second)
    if len(first) != len(second) or any(set(a) != set(b) for a, b in zip(first, second)):
        return float("inf")
    pairs = [(a[k], b[k]) for a, b in zip(first, second) for k in COMPARED if k in a]
    return max((abs(a - b) / max(1e-3, abs(a)) if a == a else float("inf") for a, b in pairs), default=float("inf"))


def table(out: Path, options: dict[str, str]) -> tuple[str, bool]:
    """Markdown: largest difference from one process by family and place, and whether all are below TOLERANCE."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for kind, name, mode, world in cases(options):
        path, one = place_of(out, kind, name, mode, world), place_of(out, kind, name, "one", 1)
        row = found.setdefault((kind, name), {})
        if mode == "one":
            continue
        if not (path.is_file() and one.is_file()):
            row[f"{mode} x {world}"] = None
            continue
        mine, wanted = json.loads(path.read_text()), json.loads(one.read_text())
        failed = mine["error"] or wanted["error"]
        row[f"{mode} x {world}"] = float("inf") if failed else difference(wanted["rows"], mine["rows"])
    columns = list(dict.fromkeys(c for row in found.values() for c in row))
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for (kind, name), row in found.items():
        shown = ["-" if row.get(c) is None else f"{row[c]:.0e}" for c in columns]
        lines.append(f"| {name} ({kind}) | " + " | ".join(shown) + " |")
    values = [v for row in found.values() for v in row.values() if v is not None]
    return "\n".join(lines) + "\n", all(v <= TOLERANCE for v in values)


def main() -> int:
    options = {
        "kinds": "generator,tokenizer,statistics",
        "out": "outputs/parity",
        "steps": "50",
        "worlds": "1,2,4",
        "modes": "ddp,fsdp",
        "only": "",
    }
    options |= {"precision": "32-true"}
    if not all("=" in argument for argument in sys.argv[1:]):
        raise SystemExit(__doc__)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if set(given) - set(options):
        raise SystemExit(f"unknown {sorted(set(given) - set(options))}: there are {', '.join(options)}")
    options |= given
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [case for case in cases(options) if not place_of(out, *case).is_file()]
    if todo:
        with socket.socket() as free:  # Lightning wants an address, though the processes have met by a file
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for stale in out.glob(".store*"):
            stale.unlink()
        context = torch.multiprocessing.get_context("fork")  # this process has imported everything
        torch.set_num_threads(1)
        count = max(world for *_, world in todo)
        meet = context.Barrier(count)
        running = [context.Process(target=worker, args=(r, todo, out, options, meet)) for r in range(count)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        for stale in out.glob(".store*"):
            stale.unlink()
        if any(process.exitcode for process in running):
            raise SystemExit("a process died: start the command again, it goes on")
    text, good = table(out, options)
    (out / "parity.md").write_text(text)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
