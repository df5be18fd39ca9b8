"""W&B where its service is away, or goes away: the training ends, and what was logged can be sent later."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PLAIN, losses, run
from wandb_server import Server

from vtok.lit import Lit

wandb = pytest.importorskip("wandb")
JOB = (*PLAIN, "steps=4", "val_every=2", "picture_every=4", "logger=wandb", "logger.wandb.finish_timeout=2")


@pytest.fixture
def online(monkeypatch):
    """Point W&B at an address, as a user with a key would be; its service ends with the test."""
    for name in ("WANDB_MODE", "WANDB_FINISH_TIMEOUT", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)

    def point(address: str) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)

    yield point
    wandb.teardown()
    for name in ("WANDB_FINISH_TIMEOUT", "WANDB_ERROR_REPORTING"):  # the logger's
        os.environ.pop(name, None)


def check_sync(folder: Path, run_dir: Path, *options: str) -> None:
    """`wandb sync` of the folder sends every number of metrics.csv, the pictures, and nothing private."""
    server = Server()
    environment = {**os.environ, "WANDB_BASE_URL": server.address}
    environment.pop("WANDB_SERVICE", None)
    command = [sys.executable, "-m", "wandb", "sync", *options, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    server.end()
    logged = {row["trainer/global_step"]: row["train/loss"] for row in server.history() if "train/loss" in row}
    wanted = {int(row["step"]): float(row["train/loss"]) for row in losses(run_dir) if "train/loss" in row}
    assert logged == pytest.approx(wanted) and len(wanted) == 4
    assert any("reconstructions" in name for name in server.uploads())
    private = (".py", "wandb-metadata.json", "diff.patch", "output.log")
    assert not any(name.endswith(private) for name in server.uploads())
    sent = b"\n".join(body for _, body in server.seen)
    for word in (str(run_dir.parent), str(Path.home()) + "/", platform.node() or "?", getpass.getuser()):
        assert len(word) < 4 or word.encode() not in sent, word  # a name as short as `vm` is in any text


@pytest.mark.slow
def test_a_run_that_begins_without_the_service_is_synchronised_later(tmp_path, online, capsys):
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        online(f"http://127.0.0.1:{hole.getsockname()[1]}")
        run(*JOB, "logger.wandb.timeout=1", f"run_dir={tmp_path / 'run'}")
    assert capsys.readouterr().out.count("W&B does not answer") == 1
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    check_sync(folder, tmp_path / "run")


@pytest.mark.slow
def test_a_run_whose_service_goes_away_ends_and_is_synchronised_later(tmp_path, online, monkeypatch):
    server, original = Server(), Lit.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            server.end()
        original(self, batch, batch_idx)

    monkeypatch.setattr(Lit, "training_step", training_step)
    online(server.address)
    began = time.monotonic()
    run(*JOB, f"run_dir={tmp_path / 'run'}")
    assert time.monotonic() - began < 100  # W&B alone would wait for ever
    assert any("upsertBucket" in str(body) for _, body in server.seen), "it had begun online"
    (folder,) = (tmp_path / "run" / "wandb").glob("run-*")
    check_sync(folder, tmp_path / "run", "--no-skip-online")
