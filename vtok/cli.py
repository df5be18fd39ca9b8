"""One door for every command: Hydra's main, with a user's mistake reported in at most three lines and exit code 2.

A mistake is an error that names what to change (ValueError, a missing file, a wrong key). Anything else is a bug of
ours and keeps its traceback. Heavy imports belong inside the task, so that --help and --cfg answer at once.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_MISTAKE = 2


def entry(config_name: str, configs: Path) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorator that turns `task(config)` into the main function of a command.

    config_name: file in the folder `configs` without its ending.
    """

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def guarded(config: Any) -> Any:
            try:
                if isinstance(trust := config.get("trust", []), str) or not isinstance(trust, Sequence):
                    raise ValueError(f"trust={trust} must be a list of modules: trust=[my.module]")
                set_threads(config.get("threads"))
                return task(config)
            except Exception as error:
                if not _mistake(error):
                    raise
                raise SystemExit(report(error)) from None  # Hydra would print a line of its own before handing it on

        def main() -> None:
            import hydra

            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its exceptions on instead of printing them
            command = hydra.main(version_base="1.3", config_path=str(configs), config_name=config_name)(guarded)
            try:
                command()
            except Exception as error:
                if not _mistake(error):
                    if (wrong := _no_choice(error, configs)) is None:
                        raise
                    error = wrong
                sys.exit(report(error))

        main.__doc__ = task.__doc__
        return main

    return decorate


def set_threads(threads: int | None) -> None:
    """How many CPU threads this process and those that it starts compute with; None leaves PyTorch's choice, which
    OMP_NUM_THREADS decides. ValueError unless it is a whole number above 0."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads={threads} must be a whole number of at least 1, or null for PyTorch's choice")
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)  # without it Lightning chooses anew for several processes
    torch.set_num_threads(threads)


def check_whole_number(name: str, value: Any, least: int | None = None) -> None:
    """Raise ValueError unless the value of key `name` is a whole number, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{name}={value}: give a whole number" + ("" if least is None else f" of at least {least}"))


# keys that mean the same in every command of sampling and evaluation that has them -> the least that they may be
WHOLE = {
    "batch_size": 1, "seed": None, "per_class": 1, "num_images": 1, "images": 1, "train_images": 1, "chunk": 1,
    "decode_chunk": 1, "steps": 1, "solver_steps": 1, "top_k": 0, "sample_size": 1, "splits": 1, "permutation": None,
    "block": 1, "task_id": 0, "num_tasks": 1,
}  # fmt: skip
NUMBERS = ("guidance", "temperature", "top_p")
NEVER_NULL = ("batch_size", "seed", "per_class")


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, where one of WHOLE or NUMBERS is no such number."""
    for name, least in WHOLE.items():
        if name in config and (config[name] is not None or name in NEVER_NULL):
            check_whole_number(name, config[name], least)
    for name in NUMBERS:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name}={value}: give a number")


def check_place(name: str, path: str | Path | None, *, folder: bool = False) -> None:
    """Raise ValueError where the file (or folder) that key `name` gives cannot be written: before the work, not after
    it. None is no place."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() and not folder:
        raise ValueError(f"{name}={path} is a folder: give a file")
    start = path if folder else path.parent
    there = next((place for place in (start, *start.parents) if place.exists()), Path())
    if not there.is_dir():
        raise ValueError(f"{name}={path}: {there} is a file, no folder; give another {name}=")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{name}={path}: {there} cannot be written to; give another {name}=")


def _root(error: BaseException) -> BaseException:
    """What a constructor raised, where Hydra has wrapped it."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _mistake(error: BaseException) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if os.environ.get("VTOK_TRACEBACK"):
        return False
    root = _root(error)
    wrong_argument = root is not error and isinstance(root, TypeError)  # a key that the constructor does not have
    return wrong_argument or isinstance(root, (HydraException, OmegaConfBaseException, ValueError, OSError))


def _no_choice(error: BaseException, configs: Path) -> ValueError | None:
    """What Hydra stumbles over where a group of configs is given something else than names."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("hydra._internal"):
        return None
    for name, equals, value in (argument.partition("=") for argument in sys.argv[1:]):
        if equals and value[:1] in ("[", "{") and (configs / name.lstrip("+")).is_dir():
            return ValueError(f"{name}={value} is no choice: pass {name}=<name>, or set {name}.<key>")
    return None


def report(error: BaseException) -> int:
    """Print a mistake in at most three lines on stderr; return the exit code."""
    parts: list[str] = []
    seen: BaseException | None = _root(error)
    while seen is not None and len(parts) < 8:
        parts += [line.strip() for line in str(seen).splitlines() if line.strip()]
        seen = seen.__cause__
    noise = ("full_key:", "object_type=", "reference_type=", "Set the environment variable", "Config search path")
    noise += ("provider=",)
    lines = [re.sub(r"^In '[^']*': ", "", line) for line in dict.fromkeys(parts) if not line.startswith(noise)]
    for i, line in enumerate(lines):
        if line.startswith("Available options"):
            lines[i:] = [f"{line} {', '.join(lines[i + 1 :])}"]
            break
    lines = lines or [type(error).__name__]
    print("error: " + "\n  ".join(line[:400] for line in lines[:3]), file=sys.stderr)
    return EXIT_MISTAKE
