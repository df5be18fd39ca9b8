"""Jobs of a real SLURM, `python tests/on_slurm.py <folder>`: needs sbatch, two free CPUs and the extra `slurm`; a
quarter of an hour, most of it the two minutes that SLURM lets a requeued job wait.

Three jobs on the CPU with a small tokenizer and its GAN, each compared with trainings that SLURM did not start:
one task that gets USR1 before its time limit and is requeued (docs/cluster.md's script), two tasks, and a multirun of
submitit of two jobs that meet their time limit. Weights, averages, optimizers and random numbers must equal bit for
bit, of two tasks the losses to 1e-5.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from runs import PLAIN, TOKENIZER, everything, losses, run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GAN = (*TOKENIZER, "val_every=1000", "log_every=100", "data.workers=1")
ON_SLURM = ("trainer=slurm", "trainer.accelerator=cpu")
SCRIPT = """#!/bin/bash
#SBATCH --ntasks-per-node={tasks} --cpus-per-task=1 --time={minutes} --output={log}
#SBATCH --requeue --signal=USR1@{early} --open-mode=append
export OMP_NUM_THREADS=1
srun {command}
code=$?
case "$code" in 85|138) scontrol requeue "$SLURM_JOB_ID"; sleep 30 ;; esac
exit "$code"
"""


def submit(folder: Path, *overrides: str, tasks: int = 1, minutes: int = 10, early: int = 60) -> str:
    """Start train.py with these overrides as a job; its number."""
    command = " ".join([sys.executable, "train.py", *overrides, *ON_SLURM, "resume=auto"])
    script = folder.with_suffix(".sh")
    script.write_text(
        SCRIPT.format(tasks=tasks, minutes=minutes, early=early, log=folder.with_suffix(".log"), command=command)
    )
    said = subprocess.run(["sbatch", "--parsable", str(script)], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.strip()


def wait(job: str, most: float = 1200) -> None:
    """Until SLURM has forgotten the job, or says how it ended."""
    began = time.monotonic()
    while time.monotonic() - began < most:
        asked = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"]
        states = set(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split())
        if not states - {"COMPLETED"}:
            return
        if states & {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}:
            raise SystemExit(f"job {job}: {states}")
        time.sleep(2)
    raise SystemExit(f"job {job} has not ended in {most:.0f} s")


def requeued(folder: Path, steps: int) -> str:
    job = (*GAN, f"steps={steps}")
    run(*job, "trainer=cpu", f"run_dir={folder / 'straight'}")
    wait(submit(folder / "requeued", *job, f"run_dir={folder / 'requeued'}", minutes=3))
    log = (folder / "requeued.log").read_text()
    stops = re.findall(r"stopped on request after step (\d+)", log)
    assert stops, f"the time limit came too late: raise steps, see {folder / 'requeued.log'}"
    assert everything(folder / "requeued") == everything(folder / "straight")
    return f"stopped after step {', '.join(stops)} of {steps}, requeued, the end is bit-identical"


def two_tasks(folder: Path) -> str:
    job = (*PLAIN, "steps=20")
    run(*job, f"run_dir={folder / 'one_task'}")
    wait(submit(folder / "two_tasks", *job, f"run_dir={folder / 'two_tasks'}", tasks=2))
    log = (folder / "two_tasks.log").read_text()
    assert "8 = 4 x 2 devices" in log, log
    one, two = losses(folder / "one_task"), losses(folder / "two_tasks")
    pairs = [(float(a[k]), float(b[k])) for a, b in zip(one, two, strict=True) for k in a if k.endswith("loss")]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    assert len(pairs) >= 20 and worst <= 1e-5, worst
    return f"{len(pairs)} losses equal one process's to {worst:.0e}"


def multirun(folder: Path, steps: int) -> str:
    job = (*GAN, f"steps={steps}")
    limits = ("timeout_min=3", "signal_delay_s=60", "cpus_per_task=1", "gpus_per_node=null")
    command = [sys.executable, str(ROOT / "train.py"), "-m", "launcher=submitit_slurm", *ON_SLURM, "name=sweep"]
    command += [f"hydra.launcher.{limit}" for limit in limits] + [*job, "optimizer.lr=1e-3,2e-3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = folder / "outputs" / "sweeps" / "sweep"
    for number, rate in enumerate(("1e-3", "2e-3")):
        run(*job, f"optimizer.lr={rate}", "trainer=cpu", f"run_dir={folder / rate}")
        assert everything(sweep / str(number)) == everything(folder / rate)
    logs = [path.read_text() for path in sweep.rglob("*_log.out")]
    stops = [s for log in logs for s in re.findall(r"stopped on request after step (\d+)", log)]
    assert stops, f"no job met its time limit: raise steps, see {sweep}"
    return f"two jobs, stopped after steps {', '.join(stops)}, queued again, both ends bit-identical"


def main(folder: Path, steps: int = 1500) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print("one task:", requeued(folder, steps), flush=True)
    print("two tasks:", two_tasks(folder), flush=True)
    print("multirun of submitit:", multirun(folder, steps), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *(int(a) for a in sys.argv[2:]))
