"""Bad days and many processes: kills, full disks, stalled loaders, shares of a job, sharded training."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import lightning
import pytest
import torch
from forks import command, torchrun
from runs import LLAMAGEN, PLAIN, TOKENIZER, losses, run, run_all, state, tokenizer_folder
from torch.utils.data import DataLoader

from vtok import checkpoint
from vtok.ckpt_files import AtomicCheckpointIO, verify
from vtok.data.fake import Fake
from vtok.data.shards import save_array
from vtok.lit import Lit, NotFinite
from vtok.sharing import without_places
from vtok.watch import Stalled, check_restarts, process_gone

ROOT = Path(__file__).resolve().parents[1]


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_kills_leave_no_trace(tmp_path):
    """The script compares with the uninterrupted run; here its counts are checked."""
    arguments = ("scripts/torture.py", "kills=5", "steps=12", "write=0.4", "loader=0.2", f"out={tmp_path}")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2 kills inside a checkpoint write" in done.stdout and "1 kills while the loader starts" in done.stdout
    assert "bit-identical" in done.stdout


def test_workers_live_through_the_first_request(tmp_path):
    """SLURM sends SIGTERM and SIGUSR1 to every process of a job: the batches must go on."""
    data = Fake(image_size=8, batch_size=4, train_images=40, val_images=4, workers=2)
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]  # one of each worker: both have started
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        for worker in batches._workers:
            os.kill(worker.pid, number)
    later = [next(batches) for _ in range(7)]
    quiet = iter(Fake(image_size=8, batch_size=4, train_images=40, val_images=4).train_dataloader())
    for batch in (*first, *later):
        assert torch.equal(batch["image"], next(quiet)["image"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_live_through_a_request_while_they_start(monkeypatch, number):
    from torch.utils.data._utils import worker

    loop = worker._worker_loop

    def asked_at_once(*arguments):
        os.kill(os.getpid(), number)
        loop(*arguments)

    monkeypatch.setattr(worker, "_worker_loop", asked_at_once)
    settings = {"image_size": 8, "batch_size": 4, "train_images": 12, "val_images": 4}
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    for batch, wanted in zip(Fake(**settings, workers=2).val_dataloader(), Fake(**settings).val_dataloader()):
        assert torch.equal(batch["image"], wanted["image"])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing stays blocked here
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_the_checkpoint(tmp_path):
    """torchrun without restarts; one of two processes is killed after the checkpoint of step 2. Scripts, not forks: of
    forks that have both ended when it looks, torchrun's report names only one."""
    run_dir, script = tmp_path / "killed", tmp_path / "job.py"
    script.write_text(
        "import sys\nsys.path[:0] = ['tests', '.']\nfrom pathlib import Path\nfrom restarts import train\n"
        f"train(Path({str(run_dir)!r}), 1, 3)\n"
    )
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    assert done.returncode == 1
    assert "error: another process of this job has ended, so this one stops after step 3" in done.stderr
    assert "training.py" not in done.stderr  # no traceback but torchrun's
    report = done.stderr[done.stderr.index("ChildFailedError") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9", report), report
    assert done.stderr.index("ChildFailedError") > done.stderr.index("another process of this job has ended")
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["last.ckpt", "last.ckpt.sha256", "step_2.ckpt", "step_2.ckpt.sha256"]
    assert verify(run_dir / "checkpoints" / "last.ckpt") is None and state(run_dir)["global_step"] == 2


@pytest.mark.slow
def test_a_restart_of_torchrun_goes_on_bit_for_bit(tmp_path):
    done = command("tests/restarts.py", str(tmp_path), "1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error: another process of this job has ended, so this one stops after step 3" in done.stderr
    assert f"resume=auto: from {tmp_path / 'killed_0' / 'checkpoints' / 'last.ckpt'}" in done.stdout
    assert "goes on from step 2" in done.stdout and "training.py" not in done.stderr  # no traceback but torchrun's
    assert "1 of 1: rank 1 killed in step 4, the end is bit-identical" in done.stdout


def test_a_restart_that_would_meet_ended_processes_is_refused(monkeypatch):
    started = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for changed in ({"WORLD_SIZE": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}):
        check_restarts({**started, **changed})
    check_restarts({})
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts"):
        run(*PLAIN)


REFUSED = "timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:33179$0"


@pytest.mark.parametrize(
    "error, gone",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:548] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:4711: Connection reset by peer"), True),
        (RuntimeError("ncclRemoteError: a network error or a remote process exiting prematurely."), True),
        (RuntimeError(f"Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] {REFUSED}"), False),
        (RuntimeError("Gloo connectFullMesh failed with [pair.cc:548] Connection closed by peer [127.0.0.1]:1"), False),
        (RuntimeError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a download's, say
    ],
)
def test_only_a_lost_process_is_called_one(error, gone):
    assert process_gone(error) is gone


# --- full disks -----------------------------------------------------------------------------------------------------


class Full:
    """A file on a disk with `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.fixture
def room(monkeypatch):
    """Let files of vtok.checkpoint.write_atomic hold only so many bytes."""
    opened = open

    def limit(size: int) -> None:
        def small(path, mode="r", *rest, **named):
            file = opened(path, mode, *rest, **named)
            return Full(file, size) if ".ckpt.tmp." in str(path) or ".npy.tmp." in str(path) else file

        monkeypatch.setattr(checkpoint, "open", small, raising=False)

    return limit


def test_a_full_disk_keeps_the_checkpoint_before_and_says_what_is_needed(tmp_path, room):
    files = AtomicCheckpointIO()
    files.save_checkpoint({"a": torch.ones(1000)}, tmp_path / "step_1.ckpt")
    room(20_000)
    with pytest.raises(OSError, match=r"step_2.ckpt: it needs 400,000 bytes, [\d,]+ bytes are free") as raised:
        files.save_checkpoint({"a": torch.ones(100_000)}, tmp_path / "step_2.ckpt")
    assert raised.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1.ckpt", "step_1.ckpt.sha256"]
    assert verify(tmp_path / "step_1.ckpt") is None


def test_a_full_disk_keeps_the_shard_before(tmp_path, room):
    import numpy as np

    save_array(tmp_path / "codes.npy", np.arange(10))
    room(1000)
    with pytest.raises(OSError, match="it needs 80,000 bytes"):
        save_array(tmp_path / "codes.npy", np.arange(10_000))
    assert np.load(tmp_path / "codes.npy").tolist() == list(range(10))


# --- watching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_step_that_is_not_finite_names_its_images(tmp_path, monkeypatch, capsys, how):
    original, seen = Lit.training_step, {}

    def step(self, batch, batch_idx):
        seen.setdefault(self.global_step + 1, []).extend(batch["index"].tolist())
        if self.global_step == 1:
            batch = {**batch, "image": batch["image"] * float("nan")}
        original(self, batch, batch_idx)

    monkeypatch.setattr(Lit, "training_step", step)
    settings = (*PLAIN, "steps=3", "accumulate=2", f"on_nan={how}", f"run_dir={tmp_path}")
    if how == "stop":
        with pytest.raises(NotFinite, match="step 2") as raised:
            run(*settings)
        said = str(raised.value)
    else:
        run(*settings)
        said = next(line for line in capsys.readouterr().out.split("note: ") if "was skipped" in line)
    shown = said.split("(index and name): ")[1].splitlines()[0].split(", ")
    assert [int(item.split()[0]) for item in shown] == seen[2] and len(shown) == 8


def test_a_stalled_loader_is_reported_and_stopped(tmp_path, monkeypatch, capsys):
    from vtok.data.module import KeyedImages

    original = KeyedImages.__getitem__

    def slow(self, position):
        if self.augment and position == order[20]:
            time.sleep(60)
        return original(self, position)

    data = Fake(image_size=16, batch_size=8, train_images=40, val_images=12)
    order = [tuple(p) for batch, _ in zip(data.train_dataloader().batch_sampler, range(4)) for p in batch]
    monkeypatch.setattr(KeyedImages, "__getitem__", slow)
    began = time.monotonic()
    with pytest.raises(Stalled, match=r"no batch for \d+ s after step 1, data_timeout=1.5"):
        run(*PLAIN, "steps=6", "data_timeout=1.5", f"run_dir={tmp_path}")
    assert time.monotonic() - began < 50
    assert "waiting for a batch" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


class Slow(lightning.Callback):
    """Measures for longer than a loader may take."""

    def on_validation_epoch_end(self, trainer, pl_module):
        time.sleep(1.2)


def test_what_callbacks_measure_is_no_waiting_for_a_batch(tmp_path, capsys):
    run(*PLAIN, "steps=2", "val_every=1", "data_timeout=1", f"+callbacks.slow._target_={__name__}.Slow",
        f"trust=[{__name__}]", f"run_dir={tmp_path}")  # fmt: skip
    assert "waiting for a batch" not in capsys.readouterr().out and state(tmp_path)["global_step"] == 2


def test_what_is_watched_is_logged(tmp_path):
    run(*PLAIN, "steps=2", f"run_dir={tmp_path}")
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"speed/images_per_second", "speed/data_wait", "speed/memory_gib", "train/grad_norm", "val/usage"}
    assert wanted <= set(header)


# --- what is shared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("/home/ada/runs/var", "var"),
        ("from=/home/ada/var/ out=samples", "from=var out=samples"),
        ("~/data/x.png", "x.png"),
        ("C:\\Users\\ada\\x.ckpt", "x.ckpt"),
        ("outputs/run", "outputs/run"),
        ("c + (s - 1)(c - u) at 3 images/s", "c + (s - 1)(c - u) at 3 images/s"),
        ({"a": ["/scratch/u1/b"], "n": 3}, {"a": ["b"], "n": 3}),
    ],
)
def test_places_are_cut(text, wanted):
    assert without_places(text) == wanted


def test_shared_files_name_no_place(tmp_path):
    run(*PLAIN, "steps=1", f"run_dir={tmp_path / 'secret_place'}")
    done = command("scripts/export.py", f"from={tmp_path / 'secret_place'}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "out").rglob("*"):
        assert b"secret_place" not in file.read_bytes() and str(Path.home()).encode() not in file.read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kind"] == "tokenizer" and config["family"] == "CNNTokenizer"
    data = (tmp_path / "secret_place" / "checkpoints" / "last.ckpt").read_bytes()
    assert b"secret_place" not in data and str(tmp_path).encode() not in data


# --- shares of a sampling job ---------------------------------------------------------------------------------------


def test_every_image_once_and_the_same_for_any_number_of_tasks(tmp_path):
    from test_pipeline import exported, settings

    from vgen.sampling import sample

    source = exported(tmp_path / "model")
    options = {"per_class": 5, "chunk": 4}  # 5 classes: 25 images, 7 chunks, the last one padded
    sample(settings(source, tmp_path / "one", **options))
    for tasks in (2, 3, 4):
        for task in range(tasks):
            sample(settings(source, tmp_path / f"of{tasks}", **options, task_id=task, num_tasks=tasks))
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.png")}
    assert len(wanted) == 25
    for tasks in (2, 3, 4):
        assert {p.name: p.read_bytes() for p in (tmp_path / f"of{tasks}").glob("*.png")} == wanted

    names = sorted(wanted)  # a killed task: some files are missing, and only their chunks are made again
    for name in names[6:9]:
        (tmp_path / "one" / name).unlink()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.png")}
    sample(settings(source, tmp_path / "one", **options))
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.png")} == wanted
    assert all(
        (tmp_path / "one" / n).stat().st_mtime_ns == t for n, t in before.items() if not 4 <= names.index(n) < 12
    )

    with pytest.raises(ValueError, match=r"another seed \(0, now 1\)"):
        sample(settings(source, tmp_path / "one", **options, seed=1, overwrite=False))
    with pytest.raises(ValueError, match="another seed"):
        sample(settings(source, tmp_path / "one", **options, seed=1, task_id=0, num_tasks=2))
    with pytest.raises(ValueError, match="out=<folder>"):
        sample(settings(source, tmp_path / "a.npz", task_id=0, num_tasks=2))


# --- sharded --------------------------------------------------------------------------------------------------------

SHARDED = (
    "trainer=fsdp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.strategy.process_group_backend=gloo",
)


@pytest.mark.slow
def test_sharded_training_equals_one_process_and_goes_on_in_the_other(tmp_path):
    """A generator and a tokenizer with a moving codebook; one run goes from one process to two and back."""
    made_by = tokenizer_folder(tmp_path / "tokenizer")
    common = ("steps=6", "accumulate=2", "val_every=3", "save_every=2", "ema=0.9")
    jobs = {
        "generator": (*LLAMAGEN, f"tokenizer_from={made_by}", "model.dropout=0", "model.token_dropout=0", *common),
        "tokenizer": (*PLAIN, *common),
    }
    two = [(*job, *SHARDED, f"run_dir={tmp_path / f'two_{name}'}") for name, job in jobs.items()]
    half = (*jobs["generator"], f"run_dir={tmp_path / 'half'}")
    run(*half, "stop_after=2")
    done = torchrun(run_all, [*two, (*half, *SHARDED, "resume=auto", "stop_after=4")])
    assert done.returncode == 0, done.stderr[-3000:]
    for name, job in jobs.items():
        run(*job, f"run_dir={tmp_path / f'one_{name}'}")
        close(tmp_path / f"one_{name}", tmp_path / f"two_{name}")
    run(*half, "resume=auto")
    close(tmp_path / "one_generator", tmp_path / "half")
    for name in ("module", "ema"):
        one, half = (state(tmp_path / n)["state_dict"] for n in ("one_generator", "half"))
        for key in (k for k in one if k.startswith(name + ".")):
            torch.testing.assert_close(one[key], half[key], rtol=1e-4, atol=1e-6)


def close(one: Path, two: Path) -> None:
    """Losses and gradient norms of two runs, to 1e-5 relative."""
    first, second = losses(one), losses(two)
    assert [set(row) for row in first] == [set(row) for row in second] and len(first) > 6
    for a, b in zip(first, second):
        for name in a:
            if name.endswith(("loss", "psnr", "nats", "grad_norm")):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name


@pytest.mark.slow
def test_a_checkpoint_in_pieces_is_read_by_any_number_of_processes(tmp_path):
    """Two processes write pieces and go on from them; one process reads, exports and finishes the run."""
    from safetensors.torch import load_file

    from vtok.ckpt_files import newest_whole
    from vtok.pieces import read_whole

    made_by = tokenizer_folder(tmp_path / "tokenizer")
    job = (
        *LLAMAGEN,
        f"tokenizer_from={made_by}",
        "model.dropout=0",
        "model.token_dropout=0",
        "steps=6",
        "save_every=2",
    )
    job = (*job, "val_every=6", "ema=0.9")
    two = (*job, *SHARDED, "trainer.strategy.pieces=true", f"run_dir={tmp_path / 'two'}", "resume=auto")
    done = torchrun(run_all, [(*two, f"stop_after={stop}") for stop in (2, 4)])
    assert done.returncode == 0, done.stderr[-3000:]

    folder = tmp_path / "two" / "checkpoints"
    assert sorted(p.name for p in folder.glob("*.pieces*")) == ["step_2.pieces", "step_4.pieces"]
    assert len(list((folder / "step_4.pieces").iterdir())) == 2  # a file of each process
    small = state(tmp_path / "two")
    assert not any(v.dim() for v in small["state_dict"].values()) and small["global_step"] == 4
    tensors = read_whole(folder / "step_4.pieces")
    sizes = [sum(v.numel() for v in load_file(p).values()) for p in sorted((folder / "step_4.pieces").iterdir())]
    assert sum(sizes) == sum(v.numel() for v in tensors.values()) and max(sizes) < 0.7 * sum(sizes)  # none is whole

    done = command("scripts/export.py", f"from={tmp_path / 'two'}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, tensors.get(f"state_dict.ema.{name}", value)), name

    run(*job, f"run_dir={tmp_path / 'one'}")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "two", copy)
    run(*job, f"run_dir={tmp_path / 'two'}", "resume=auto")  # one process, whole files: the pieces go one by one
    close(tmp_path / "one", tmp_path / "two")
    assert sorted(p.name for p in folder.glob("*.pieces")) == ["step_4.pieces"]

    os.truncate(sorted((copy / "checkpoints" / "step_4.pieces").iterdir())[1], 100)
    found, passed = newest_whole(copy / "checkpoints")
    assert found.name == "step_2.ckpt" and "shard-00002" in passed[0] and "damaged" in passed[0]


def test_a_gan_is_not_sharded(tmp_path):
    with pytest.raises(ValueError, match="trainer=ddp, or objective=plain"):
        run(*TOKENIZER, *SHARDED, f"run_dir={tmp_path}")


def test_a_sharded_generator_of_every_family_has_the_same_gradients():
    """One process with a mesh of one: cutting and gathering change no bit."""
    done = command(str(ROOT / "tests" / "sharded.py"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_launcher_composes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = command("train.py", "launcher=submitit_slurm", "trainer=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert done.returncode == 0 and "SlurmLauncher" in done.stdout, done.stderr


def test_a_sweep_of_jobs_where_none_can_be_submitted_says_so(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if shutil.which("srun"):
        pytest.skip("jobs can be submitted here")
    sweep = ("-m", "launcher=submitit_slurm", "trainer=slurm", f"hydra.sweep.dir={tmp_path}", "seed=0,1")
    done = command("train.py", *sweep)
    assert done.returncode == 2 and len(done.stderr.splitlines()) <= 3, done.stderr
    assert "there is no srun here" in done.stderr and "login node" in done.stderr


# --- fuzzed input ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_input_costs_three_lines_and_runs_nothing(tmp_path):
    done = command(
        "scripts/fuzz.py", "images=8", "configs=8", "files=6", "payloads=4", "commands=0", "seed=1", f"out={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "payloads: 4 refused"
