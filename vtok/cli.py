"""One door for every command: Hydra's main, with a user's mistake reported in at most three lines and exit code 2.

A mistake is an error that names what to change (ValueError, a missing file, a wrong key). Anything else is a bug of
ours and keeps its traceback. Heavy imports belong inside the task, so that --help and --cfg answer at once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_MISTAKE = 2


def entry(
    config_name: str,
    configs: Path,
    *,
    whole: Mapping[str, int | None] | None = None,
    numbers: Mapping[str, tuple[float, float]] | None = None,
    texts: Sequence[str] = (),
    lists: Sequence[str] = (),
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorator that turns `task(config)` into the main function of a command.

    config_name: file in the folder `configs` without its ending. whole, numbers, texts: keys of this command alone,
    beside WHOLE, NUMBERS and TEXTS: with the least that they may be, or from what to what. lists: keys that are a text
    or a list of texts. All are checked before the task, and may be null only where their default is.
    """

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def guarded(config: Any) -> Any:
            try:
                if not is_list(trust := config.get("trust", [])):
                    raise ValueError(f"trust={trust} must be a list of modules: trust=[my.module]")
                usual = usual_values(configs, config_name)
                check_values(config, usual, whole=whole or {}, numbers=numbers or {}, texts=texts, lists=lists)
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
                wrong = _no_choice(error, configs) or _no_slurm(error)
                if wrong is None and not _mistake(error):
                    raise
                error = wrong or error
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


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless the value of key `name` is a finite number from `low` to `high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        span = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
        raise ValueError(f"{name}={value}: give a number{span}")


# keys that mean the same in every command of sampling and evaluation that has them -> the least that they may be
WHOLE = {
    "batch_size": 1, "accumulate": 1, "seed": None, "per_class": 1, "num_images": 1, "images": 1, "train_images": 1,
    "chunk": 1, "decode_chunk": 1, "steps": 1, "solver_steps": 1, "top_k": 0, "sample_size": 1, "splits": 1,
    "permutation": None, "block": 1, "task_id": 0, "num_tasks": 1,
}  # fmt: skip
NUMBERS = ("guidance", "temperature", "top_p")
NEVER_NULL = ("batch_size", "accumulate", "seed", "per_class")
# files and folders
TEXTS = (
    "from", "in", "out", "samples", "reference", "tokenizer_from", "save_reference", "weights_path", "lpips_path",
    "preview", "npz", "grid", "image", "mask", "style", "folder", "archive", "dir", "peers", "table", "plot",
)  # fmt: skip
SWITCHES = ("apart", "packed", "manifold", "lpips", "bar", "corrections")  # whose default is null; beside those of bool


def check_numbers(config: Mapping[str, Any], least: Mapping[str, int | None] = WHOLE) -> None:
    """Raise ValueError, naming the key, where one of `least` or NUMBERS is no such number."""
    for name, value in least.items():
        if name in config and (config[name] is not None or name in NEVER_NULL):
            check_whole_number(name, config[name], value)
    for name in NUMBERS:
        if config.get(name) is not None:
            check_number(name, config[name])


def usual_values(configs: Path, name: str) -> dict[str, Any]:
    """The defaults of a command's own keys, and of the commands that its config extends."""
    from omegaconf import OmegaConf

    own = OmegaConf.to_container(OmegaConf.load(configs / f"{name}.yaml"))
    extended = [part for part in own.pop("defaults", ()) if isinstance(part, str) and part != "_self_"]
    own.pop("hydra", None)
    return {k: value for part in extended for k, value in usual_values(configs, part).items()} | own


def check_values(
    config: Any,
    usual: Mapping[str, Any],
    *,
    whole: Mapping[str, int | None],
    numbers: Mapping[str, tuple[float, float]],
    texts: Sequence[str],
    lists: Sequence[str],
) -> None:
    """Raise ValueError, naming the key, where one of a command's own keys is of the wrong type or out of its range.

    usual: their defaults. A number in the place of a text is a name: it becomes text in `config`.
    """
    from omegaconf import OmegaConf

    for name, default in usual.items():
        if OmegaConf.is_missing(config, name) or (default == "???" and config.get(name) is None):
            raise ValueError(f"{name} is not given: pass {name}=<value>")
    for name in (*whole, *numbers, *texts, *lists, *TEXTS):
        if name in config and config[name] is None and usual.get(name) is not None:
            raise ValueError(f"{name}=null: give {name}=<value>; its default is {usual[name]}")
    check_numbers(config, WHOLE | dict(whole))
    for name, span in numbers.items():
        if config.get(name) is not None:
            check_number(name, config[name], *span)
    for name, default in usual.items():
        value = config.get(name)
        if (isinstance(default, bool) or name in SWITCHES) and value is not None and not isinstance(value, bool):
            raise ValueError(f"{name}={value}: choose true or false")
    for name in (*TEXTS, *texts):
        if name in usual and name not in (*whole, *lists) and config.get(name) is not None:
            config[name] = _text(name, config[name])
    for name in lists:
        value = config.get(name)
        if value is not None and not isinstance(value, str) and not is_list(value):
            raise ValueError(f"{name}={value}: give a list, {name}=[...,...]")
        if is_list(value):
            config[name] = [_text(name, one) for one in value]


def is_list(value: Any) -> bool:
    """Whether a key's value is a list; a text, whose letters are a sequence too, is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{name}={value}: give one text")
    return str(value)


def check_place(name: str, path: str | Path | None, *, folder: bool = False, endings: Sequence[str] = ()) -> None:
    """Raise ValueError where the file (or folder) that key `name` gives cannot be written, or has none of `endings`:
    before the work, not after it. None is no place."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() and not folder:
        raise ValueError(f"{name}={path} is a folder: give a file")
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{name}={path}: the ending must be {' or '.join(endings)}")
    start = path if folder else path.parent
    there = next((place for place in (start, *start.parents) if place.exists()), Path())
    if not there.is_dir():
        raise ValueError(f"{name}={path}: {there} is a file, no folder; give another {name}=")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{name}={path}: {there} cannot be written to; give another {name}=")


def own_folder(name: str, path: str | Path, mark: str, *, empty: bool = False) -> Path:
    """Make the folder that key `name` gives, where a command replaces what is in it; empty: do that now. Raises
    ValueError where it holds anything, but not the file `mark`, by which the command knows it again."""
    check_place(name, path, folder=True)
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise ValueError(
            f"{name}={path} holds files that are not of this command: give an empty {name}=, or delete them"
        )
    if empty:
        shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    (path / mark).touch()
    return path


def check_json(name: str, path: str | Path, key: str | None = None) -> dict[str, Any]:
    """What the JSON file that is written to key `name` holds so far; {} where there is none. Raises ValueError where it
    cannot be written, or is another file that would be lost: no JSON, or without `key`."""
    check_place(name, path)
    if not (path := Path(path)).is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or (key is not None and not isinstance(found.get(key), list)):
        what = "no JSON object" if not isinstance(found, dict) else f"no JSON with {key}"
        raise ValueError(f"{name}={path} is there and holds {what}: give another {name}=")
    return found


def root_of(error: BaseException) -> BaseException:
    """What a constructor raised, where Hydra has wrapped it."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _mistake(error: BaseException) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if os.environ.get("VTOK_TRACEBACK"):
        return False
    root = root_of(error)
    wrong_argument = root is not error and isinstance(root, TypeError)  # a key that the constructor does not have
    return wrong_argument or isinstance(root, (HydraException, OmegaConfBaseException, ValueError, OSError))


def _no_choice(error: BaseException, configs: Path) -> ValueError | None:
    """What Hydra stumbles over where a group of configs is given something else than names."""
    if not _raised_in(error, "hydra._internal") and not str(error).startswith("Config group override must be"):
        return None
    for name, equals, value in (argument.partition("=") for argument in sys.argv[1:]):
        if equals and re.match(r"[\[{]|(null|true|false|-?[\d.]+)$", value) and (configs / name.lstrip("+")).is_dir():
            return ValueError(f"{name}={value} is no choice: pass {name}=<name>, or set {name}.<key>")
    return None


def _no_slurm(error: BaseException) -> ValueError | None:
    """What submitit says where no jobs can be submitted."""
    if isinstance(error, RuntimeError) and _raised_in(error, "submitit.") and shutil.which("srun") is None:
        return ValueError(
            "launcher=submitit_slurm submits jobs, and there is no srun here: run this on a login node of the "
            "cluster, or leave launcher= out"
        )
    return None


def _raised_in(error: BaseException, package: str) -> bool:
    """Whether the module that raised it has a name that begins so."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(package)


def report(error: BaseException) -> int:
    """Print a mistake in at most three lines on stderr; return the exit code."""
    parts: list[str] = []
    seen: BaseException | None = root_of(error)
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
