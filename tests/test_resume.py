"""Interrupted and resumed equals uninterrupted, bit for bit: weights, averages, optimizers, losses, random numbers.

The interrupted run is the second path; the negative test shows that the comparison would notice.
"""

from __future__ import annotations

import errno
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import LLAMAGEN, TOKENIZER, VAR, everything, losses, run, state, tokenizer_folder
from tokenizers import make

from vtok import ckpt_files, rng
from vtok.checkpoint import CheckpointError, load_module, write_atomic
from vtok.ckpt_files import AtomicCheckpointIO, file_hash, link, newest_whole, side, sweep, verify
from vtok.lit import Lit
from vtok.models import FAMILIES
from vtok.resume import EXIT_PREEMPTED, ResumeState
from vtok.run import keep_tokenizer

ROOT = Path(__file__).resolve().parents[1]
# 2 loader workers, accumulation 2; dropout, augmentation, code restarts and the GAN are in TOKENIZER
HARD = (*TOKENIZER, "accumulate=2", "data.workers=2", "steps=7", "save_every=2", "val_every=2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The hardest tokenizer run, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    run(*HARD, f"run_dir={folder}")
    return folder


@pytest.mark.parametrize("stop", [3, 4])  # the GAN starts at 2, so once within its first steps, once at a validation
def test_interrupted_equals_uninterrupted(straight, tmp_path, stop):
    run(*HARD, f"run_dir={tmp_path}", f"stop_after={stop}")
    assert state(tmp_path)["global_step"] == stop
    run(*HARD, f"run_dir={tmp_path}", "resume=last")
    assert everything(tmp_path) == everything(straight)
    assert losses(tmp_path) == losses(straight)


def test_without_the_random_numbers_the_runs_differ(straight, tmp_path, monkeypatch):
    run(*HARD, f"run_dir={tmp_path}", "stop_after=3")
    monkeypatch.setattr(ResumeState, "load_state_dict", lambda self, state: None)
    run(*HARD, f"run_dir={tmp_path}", "resume=last")
    assert losses(tmp_path)[:4] == losses(straight)[:4]
    assert losses(tmp_path) != losses(straight)
    ours, theirs = everything(tmp_path), everything(straight)
    assert any(ours[k] != theirs[k] for k in ours if k.startswith("module."))


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_generator_resumes_exactly(tmp_path, family):
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", family)
    base = (*(LLAMAGEN if family == "llamagen" else VAR), f"tokenizer_from={tokenizer}", "steps=5", "accumulate=2")
    base += ("final_weight_decay=0.08",) if family == "var" else ()  # moves at every step
    run(*base, f"run_dir={tmp_path / 'a'}")
    run(*base, f"run_dir={tmp_path / 'b'}", "stop_after=2")
    moved = [group["weight_decay"] for group in state(tmp_path / "b")["optimizer_states"][0]["param_groups"]]
    config = tokenizer / "config.json"  # what only the tokenizer's own training reads: nothing of it to a generator
    text = config.read_text()
    config.write_text(text.replace('"beta": 0.25', '"beta": 0.5'))
    assert config.read_text() != text
    second = 0.08 - 0.03 * math.cos(math.pi / 8) ** 2 if family == "var" else 0.05  # step 1 of 0 .. 4
    assert moved == pytest.approx([second, 0.0])
    run(*base, f"run_dir={tmp_path / 'b'}", f"ckpt_path={tmp_path / 'b/checkpoints/last.ckpt'}")
    assert everything(tmp_path / "b") == everything(tmp_path / "a")
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_killed_at_once_and_resumed(straight, tmp_path):
    """A real kill -9 in the middle of training, then resume=auto."""
    command = [sys.executable, "train.py", *HARD, f"run_dir={tmp_path}", "save_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    late = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "step_3.ckpt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < late
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(tmp_path)["global_step"] < 7 or pytest.skip("the run was over before the kill")
    run(*HARD, f"run_dir={tmp_path}", "save_every=1", "resume=auto")
    assert everything(tmp_path) == everything(straight)
    assert losses(tmp_path) == losses(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_waits_for_the_end_of_the_step(straight, tmp_path, monkeypatch, number):
    """The signal comes between the two batches of step 3: that step is finished and saved, the exit code is 85."""
    original = Lit.training_step

    def step(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.global_step == 2 and not self.between_steps:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Lit, "training_step", step)
        with pytest.raises(SystemExit) as stopped:
            run(*HARD, f"run_dir={tmp_path}")
    assert stopped.value.code == EXIT_PREEMPTED == 85
    assert state(tmp_path)["global_step"] == 3
    assert signal.getsignal(number) == before
    run(*HARD, f"run_dir={tmp_path}", "resume=auto")
    assert everything(tmp_path) == everything(straight)
    assert losses(tmp_path) == losses(straight)


def test_auto_walks_back_to_a_whole_checkpoint(straight, tmp_path, capsys):
    run(*HARD, f"run_dir={tmp_path}", "stop_after=5")
    checkpoints = tmp_path / "checkpoints"
    for name in ("last.ckpt", "step_5.ckpt"):
        data = (checkpoints / name).read_bytes()
        (checkpoints / name).unlink()  # last.ckpt and step_5.ckpt are one file
        (checkpoints / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"damaged or truncated.*resume=auto"):
        run(*HARD, f"run_dir={tmp_path}", "resume=last")
    capsys.readouterr()
    run(*HARD, f"run_dir={tmp_path}", "resume=auto")
    said = capsys.readouterr().out
    assert "last.ckpt differs from its SHA-256" in said and "from " + str(checkpoints / "step_4.ckpt") in said
    assert everything(tmp_path) == everything(straight)
    assert losses(tmp_path) == losses(straight)


def test_auto_starts_fresh_and_refuses_rubble(tmp_path, capsys):
    run(*TOKENIZER, "steps=1", f"run_dir={tmp_path}", "resume=auto")
    assert "nothing to resume, starting fresh" in capsys.readouterr().out
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"rubble")
    with pytest.raises(CheckpointError, match="overwrite=true"):
        run(*TOKENIZER, "steps=1", f"run_dir={tmp_path}", "resume=auto")


def test_an_existing_run_is_not_overwritten_by_accident(tmp_path):
    run(*TOKENIZER, "steps=2", f"run_dir={tmp_path}")
    with pytest.raises(ValueError, match="resume=auto, overwrite=true"):
        run(*TOKENIZER, "steps=1", f"run_dir={tmp_path}")
    assert state(tmp_path)["global_step"] == 2
    run(*TOKENIZER, "steps=1", f"run_dir={tmp_path}", "overwrite=true")
    assert state(tmp_path)["global_step"] == 1 and not (tmp_path / "checkpoints" / "step_2.ckpt").exists()
    assert {row["step"] for row in losses(tmp_path)} == {"1"}


def test_a_resume_from_an_earlier_step_drops_the_later_ones(tmp_path, capsys):
    run(*TOKENIZER, "steps=4", "save_every=2", f"run_dir={tmp_path}")
    run(*TOKENIZER, "steps=4", "stop_after=3", f"run_dir={tmp_path}", f"resume={tmp_path / 'checkpoints/step_2.ckpt'}")
    assert "removing step_4.ckpt" in capsys.readouterr().out
    assert state(tmp_path)["global_step"] == 3
    assert [row["step"] for row in losses(tmp_path)] == ["1", "2", "3"]


def test_changed_settings_are_named(tmp_path, capsys):
    run(*TOKENIZER, "steps=2", "stop_after=1", f"run_dir={tmp_path}")
    run(*TOKENIZER, "steps=2", "seed=5", f"run_dir={tmp_path}", "resume=last")
    assert "seed: 0 -> 5" in capsys.readouterr().out
    for change, words in (
        ("tokenizer.dropout=0.1", r"with tokenizer\.dropout=0\.2, this run has 0\.1; .*init_from"),
        ("+tokenizer.quantizer.rotation=true", r"with tokenizer\.quantizer\.rotation=False, this run has True;"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(*TOKENIZER, "steps=3", change, f"run_dir={tmp_path}", "resume=last")
    before = (tmp_path / "config.yaml").read_text()
    for change, name in (("ema=null", "ema"), ("objective.gan=null", "objective.gan")):
        with pytest.raises(CheckpointError, match=rf"has, unlike this run, {name}.*change them back"):
            run(*TOKENIZER, "steps=3", change, "resume=last", f"run_dir={tmp_path}")
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_of_an_earlier_version_goes_on(tmp_path, capsys):
    """Its checkpoint and config.yaml know fewer arguments; those stand at their defaults, or the resume is refused."""
    run(*TOKENIZER, "steps=2", "stop_after=1", f"run_dir={tmp_path}")
    config, last = tmp_path / "config.yaml", tmp_path / "checkpoints" / "last.ckpt"
    old = yaml.safe_load(config.read_text())
    del old["data"]["num_classes"], old["objective"]["gan"]["adaptive_eps"]
    config.write_text(yaml.safe_dump(old))
    saved = state(tmp_path)

    def forget(*names: str) -> None:
        for name in names:
            *above, argument = name.split(".")
            described = saved["module"]["arguments"]
            for part in above:
                described = described[part]["arguments"]
            del described[argument]
        torch.save(saved, last)
        side(last).unlink(missing_ok=True)

    forget("decoder_blocks", "projection", "quantizer.rotation", "quantizer.stochastic")
    capsys.readouterr()
    run(*TOKENIZER, "steps=2", "objective.gan.weight=0.7", f"run_dir={tmp_path}", "resume=last")
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: changed")]
    assert re.search(r"been: objective\.gan\.weight: \S+ -> 0\.7$", note)
    saved = state(tmp_path)
    assert saved["global_step"] == 2 and "rotation" in saved["module"]["arguments"]["quantizer"]["arguments"]
    forget("dropout")
    with pytest.raises(CheckpointError, match=r"with tokenizer\.dropout=0\.0, this run has 0\.2; "):
        run(*TOKENIZER, "steps=3", f"run_dir={tmp_path}", "resume=last")


def test_the_frozen_tokenizer_of_a_run_stays_what_it_was(tmp_path):
    """Also where no weight shows it."""
    keep_tokenizer(make("restok"), tmp_path, resumed=False)
    keep_tokenizer(make("restok", nested="all"), tmp_path, resumed=True)
    with pytest.raises(CheckpointError, match=r"tokenizer_from has theta=20, .* had 10000\.0: set it as it was"):
        keep_tokenizer(make("restok", theta=20), tmp_path, resumed=True)
    with pytest.raises(CheckpointError, match="is not the tokenizer"):
        keep_tokenizer(make("restok", seed=1), tmp_path, resumed=True)


def test_changed_options_of_the_optimizer_hold(tmp_path):
    """Its state comes back with the moments; decay and betas are those of the run that goes on."""
    run(*TOKENIZER, "steps=4", "stop_after=2", "optimizer.weight_decay=0.05", f"run_dir={tmp_path}")
    more = ("optimizer.weight_decay=0.1", "optimizer.betas=[0.8,0.9]")
    run(*TOKENIZER, "steps=4", *more, "resume=last", f"run_dir={tmp_path}")
    groups = state(tmp_path)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in groups)


def test_checkpoints_load_without_their_configuration(straight):
    saved = state(straight)
    for weights, prefix in (("ema", "ema."), ("raw", "module.")):
        module = load_module(straight, FAMILIES, weights)
        for name, value in module.state_dict().items():
            assert torch.equal(value, saved["state_dict"][prefix + name])
    assert saved["module"]["kind"] == "tokenizer"


# --- files ----------------------------------------------------------------------------------------------------------


def test_random_state_round_trip():
    rng.seed_all(7)
    [torch.rand(1), np.random.standard_normal(), random.gauss(0, 1)]  # the odd normal of a pair stays in numpy's state
    saved = rng.get_state()
    first = (torch.rand(3), np.random.standard_normal(3), random.gauss(0, 1), random.random())
    rng.set_state(saved)
    again = (torch.rand(3), np.random.standard_normal(3), random.gauss(0, 1), random.random())
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2:] == again[2:]
    with rng.untouched(3):
        inside = torch.rand(3)
    with rng.untouched(3):
        assert torch.equal(inside, torch.rand(3))
    after = torch.rand(3)
    rng.set_state(saved)
    assert torch.equal(torch.rand(6)[3:], after)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, io = tmp_path / "step_1.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.ones(3)}, path)
    save = torch.save

    def torn(data, file):
        save(data, file)
        file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    assert verify(path) is None and io.load_checkpoint(path)["a"].sum() == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1.ckpt", "step_1.ckpt.sha256"]


def test_last_verifies_whenever_a_kill_comes(tmp_path, monkeypatch):
    """Stop `link` after every possible number of renames: last.ckpt is the old file or the new one, and whole."""
    old, new, last = (tmp_path / n for n in ("step_1.ckpt", "step_2.ckpt", "last.ckpt"))
    for path, text in ((old, b"old"), (new, b"new")):
        path.write_bytes(text)
    replace = os.replace
    seen = set()
    for allowed in range(4):
        link(old, last)
        left = allowed

        def limited(source, target):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", limited)
            try:
                link(new, last)
            except KeyboardInterrupt:
                seen.add("stopped")
        assert verify(last) is None
        seen.add(last.read_bytes())
    assert seen == {"stopped", b"old", b"new"}


def test_a_full_disk_costs_the_oldest_generation(tmp_path, monkeypatch, capsys):
    io = AtomicCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint({"step": step}, tmp_path / f"step_{step}.ckpt")
    link(tmp_path / "step_2.ckpt", tmp_path / "last.ckpt")
    save, full = torch.save, [True]

    def once_full(data, file):
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(data, file)

    monkeypatch.setattr(torch, "save", once_full)
    io.save_checkpoint({"step": 3}, tmp_path / "step_3.ckpt")
    assert "removing step_1.ckpt" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step_2.ckpt", "step_3.ckpt"]


def test_stale_temporary_files_are_swept(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone, alive = int(done.stdout), os.getppid()
    (tmp_path / f"last.ckpt.tmp.{gone}").write_bytes(b"x")
    (tmp_path / f"last.ckpt.tmp.{alive}").write_bytes(b"x")
    assert [p.name for p in sweep(tmp_path)] == [f"last.ckpt.tmp.{gone}"]
    assert (tmp_path / f"last.ckpt.tmp.{alive}").exists()


def test_two_writers_of_one_number_do_not_meet(tmp_path):
    """Processes of two machines that share a folder may have the same number: each has a file of its own."""
    path = tmp_path / "recipe.json"

    def slow(file) -> None:
        file.write(b"first ")
        write_atomic(path, lambda other: other.write(b"second"))  # begins and ends while the first is not done
        assert path.read_bytes() == b"second"
        file.write(b"half")

    write_atomic(path, slow)
    assert path.read_bytes() == b"first half" and list(tmp_path.iterdir()) == [path]
    (left := tmp_path / f"recipe.json.tmp.{os.getpid()}").write_bytes(b"of a killed one")
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and left.read_bytes() == b"of a killed one"
    assert sweep(tmp_path) == [left]


def test_verification_is_not_about_the_zip_alone(tmp_path):
    """One flipped byte in the weights: torch would load it, the hash does not let it pass."""
    path = tmp_path / "step_1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(1000), "module": {}, "state_dict": {}}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.ones(100).numpy().tobytes()) + 200
    data[place] ^= 1
    path.write_bytes(bytes(data))
    assert not torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(1000))
    assert "SHA-256" in verify(path)
    assert newest_whole(tmp_path) == (None, [f"step_1.ckpt {verify(path)}"])
    assert file_hash(path) not in side(path).read_text()


def test_no_hard_links_no_problem(tmp_path, monkeypatch):
    source, target = tmp_path / "step_1.ckpt", tmp_path / "last.ckpt"
    source.write_bytes(b"weights")

    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(ckpt_files.os, "link", refused)
    link(source, target)
    assert target.read_bytes() == b"weights" and verify(target) is None and target.stat().st_nlink == 1
