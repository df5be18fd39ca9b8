"""Restarts of torchrun after a SIGKILL, `python tests/restarts.py <folder> <kills> [seed]`: two processes train a small
tokenizer undisturbed, then `kills` times with one of them killed once; every end must be the undisturbed one's.

torchrun's own options and agent, with functions in forked processes in place of a script, so that nothing is imported
for each attempt. Rank and step of the first kill are 1 and 3, those of the others are drawn.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from forks import launch
from runs import TOKENIZER, everything, losses, run

from vtok.lit import Lit

STEPS = 5
# torchrun has started the processes: Lightning must not
TWO = ("trainer=ddp_sim", "trainer.strategy.start_method=popen", "resume=auto")
PLAIN = (option for option in TOKENIZER if "gan" not in option)
JOB = (*PLAIN, f"steps={STEPS}", "save_every=2", "val_every=5", *TWO)


def train(folder: Path, rank: int | None = None, step: int | None = None) -> None:
    """One process's training, which ends before that step where it is that rank and nobody was killed yet."""
    original, marker = Lit.training_step, folder.with_suffix(".killed")

    def training_step(self: Lit, batch: dict, batch_idx: int) -> None:
        if self.global_step == step and int(os.environ["RANK"]) == rank and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, batch, batch_idx)

    Lit.training_step = training_step
    run(*JOB, f"run_dir={folder}")


def main(folder: Path, kills: int, seed: int = 0) -> None:
    draw, straight = random.Random(seed), folder / "straight"
    launch(train, (straight,))
    for number in range(kills):
        rank, step = (draw.randrange(2), draw.randrange(STEPS)) if number else (1, 3)
        killed = folder / f"killed_{number}"
        launch(train, (killed, rank, step), ("--max-restarts=1",))
        assert killed.with_suffix(".killed").exists(), "nobody was killed"
        assert everything(killed) == everything(straight) and losses(killed) == losses(straight), (rank, step)
        print(f"{number + 1} of {kills}: rank {rank} killed in step {step + 1}, the end is bit-identical", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(a) for a in sys.argv[2:]))
