"""Kill a long evaluation at random moments, start it again, and compare its end with an uninterrupted one, bit for bit.

    python scripts/kill_eval.py from=outputs/demo/llamagen images=50000 kills=5

Draws the images of a run through `python -m eval.fid` (see its page on restarting), once in one go and once with
SIGKILLs. Every index must have been measured exactly once, and the merged moments, scores and the result must be equal.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402


def start(config: Any, out: Path, log: Path) -> subprocess.Popen:
    given = [f"{key}={config[key]}" for key in ("from", "images", "reference", "extractor", "chunk", "block")]
    given = [item for item in given if not item.endswith("=None")]
    command = [sys.executable, "-m", "eval.fid", *given, *config.overrides, f"out={out}"]
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / "samples").glob("block-*.npz"))


def wait(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        raise ValueError(f"eval.fid failed; its output is in {log}")


def interrupted(config: Any, out: Path, log: Path, chance: random.Random) -> tuple[int, list[int]]:
    """(kills, blocks that each kill found): every kill comes at a random moment after another block was written."""
    parts, found = out.with_suffix(".parts"), []
    while len(found) < config.kills:
        process, before = start(config, out, log), len(blocks(parts))
        while process.poll() is None and len(blocks(parts)) <= before:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, float(config.seconds)))
        if process.poll() is not None:
            break  # it had finished: too few blocks for so many kills
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(len(blocks(parts)))
    wait(start(config, out, log), log)
    return len(found), found


def check(whole: Path, killed: Path, kills: Sequence[int]) -> list[str]:
    one, two = (json.loads(path.read_text()) for path in (whole, killed))
    lines = [f"killed {len(kills)} times, with {', '.join(map(str, kills))} parts written"]
    if one["metrics"] != two["metrics"] or one["moments_sha256"] != two["moments_sha256"]:
        raise ValueError(f"{killed} differs from {whole}: the interrupted job is not the uninterrupted one")
    lines.append(f"{two['protocol']['images']} images, each index once; moments sha256 {two['moments_sha256'][:16]}")
    return [*lines, "metrics and moments are equal bit for bit"]


@entry(
    "kill_eval", ROOT / "configs", whole={"images": 1, "kills": 1}, numbers={"seconds": (0, 3600)}, lists=("overrides",)
)
def main(config: Any) -> None:
    for name in ("from", "reference"):
        if not config[name].startswith(("zoo:", "hf:")) and not Path(config[name]).exists():
            raise ValueError(f"{name}={config[name]} does not exist; change {name}")
    folder = Path(config.out)
    check_place("out", folder, folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    for name in ("whole", "killed"):
        if (folder / f"{name}.json").exists() or (folder / f"{name}.parts").exists():
            raise ValueError(f"{folder} holds an earlier {name} job: delete it or pass another out=")
    killed, kills = interrupted(config, folder / "killed.json", log, random.Random(config.seed))
    wait(start(config, folder / "whole.json", log), log)
    if killed < config.kills:
        raise ValueError(f"only {killed} of kills={config.kills} fitted in: raise images or lower block")
    print("\n".join(check(folder / "whole.json", folder / "killed.json", kills)))


if __name__ == "__main__":
    main()
