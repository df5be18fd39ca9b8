"""A run directory: may it be used, from which checkpoint does it go on, and what is written into it before training.

outputs/<name>/config.yaml overrides.txt versions.json metrics.csv checkpoints/ pictures/ tokenizer/
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from vtok import pieces
from vtok.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_folder,
    read_checkpoint,
    read_config,
    save_folder,
    weights_hash,
    write_atomic,
    write_json,
)
from vtok.ckpt_files import generations, link, newest_whole, remove, side, step_of, sweep, verify
from vtok.config import Configured, completed, describe, differences
from vtok.data.codes import meaning, unlike
from vtok.loggers import trim_rows

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "timm", "numpy", "pillow", "safetensors")

# key of configs/train.yaml -> (types, smallest value or None, whether null is allowed)
NUMBERS: dict[str, tuple[tuple[type, ...], float | None, bool]] = {
    "seed": ((int,), 0, False),
    "steps": ((int,), 1, False),
    "stop_after": ((int,), 1, True),
    "batch_size": ((int,), 1, False),
    "accumulate": ((int,), 1, False),
    "clip": ((int, float), 0, True),
    "ema": ((int, float), 0, True),
    "final_weight_decay": ((int, float), 0, True),
    "log_every": ((int,), 1, False),
    "val_every": ((int,), 1, False),
    "val_batches": ((int,), 1, True),
    "save_every": ((int,), 1, False),
    "save_minutes": ((int, float), 0, True),
    "data_timeout": ((int, float), 0, True),
    "picture_every": ((int,), 1, True),
    "schedule.warmup": ((int, float), 0, False),
    "schedule.final": ((int, float), 0, False),
}
# names and places: text, or null where their default is
TEXTS = ("name", "run_dir", "precision", "on_nan", "monitor", "monitor_mode", "tokenizer_weights")
OPTIONAL_TEXTS = ("resume", "ckpt_path", "init_from", "tokenizer_from")
SECTIONS = (
    "data", "tokenizer", "model", "objective", "trainer", "logger", "callbacks", "optimizer", "discriminator_optimizer",
    "schedule", "pictures",
)  # fmt: skip
SAME_BATCHES = ("data.workers",)  # under any number of them
SECTION_OF = {"tokenizer": "tokenizer", "generator": "model"}  # the group of what a run trains


def check_values(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a top-level value of the wrong type or below its smallest (Hydra checks neither)."""
    for name in (*TEXTS, *OPTIONAL_TEXTS):
        value = config[name]
        if not isinstance(value, str) and not (value is None and name in OPTIONAL_TEXTS):
            raise ValueError(f"{name}={value!r} must be text{' or null' if name in OPTIONAL_TEXTS else ''}")
    for name in SECTIONS:
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} is no group of settings: choose {name}=<name>, or set {name}.<key>")
    for name, (types, least, optional) in NUMBERS.items():
        value: Any = config
        for part in name.split("."):
            value = value[part]
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, types):
            wanted = "a whole number" if types == (int,) else "a number"
            raise ValueError(f"{name}={value!r} must be {wanted}{' or null' if optional else ''}")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def resume_from(
    folder: Path, resume: str | None, ckpt_path: str | None, overwrite: bool, *, say: Callable[[str], None] = print
) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; `folder` is the run directory.

    Raises ValueError where the run exists and nothing says what to do with it, CheckpointError where the named
    checkpoint is missing or damaged.
    """
    if resume and ckpt_path and resume != ckpt_path:
        raise ValueError(f"resume={resume} and ckpt_path={ckpt_path} mean the same: give one of them")
    wanted = resume or ckpt_path
    checkpoints = folder / "checkpoints"
    present = sorted(checkpoints.glob("*.ckpt"))
    if wanted and overwrite:
        raise ValueError(f"resume={wanted} and overwrite=true exclude each other")
    if not wanted:
        if present and not overwrite:
            raise ValueError(f"{folder} holds checkpoints: pass resume=auto, overwrite=true or another name=")
        return None
    if wanted == "auto":
        found, passed = newest_whole(checkpoints)
        for line in passed:
            say(f"resume=auto: {line}; trying an older one")
        if found is None and passed:
            raise CheckpointError(f"no checkpoint in {checkpoints} is whole: pass overwrite=true to start again")
        say(f"resume=auto: {'nothing to resume, starting fresh' if found is None else f'from {found}'}")
        return found
    found = find_checkpoint(folder if wanted == "last" else wanted)
    reason = verify(found)
    if reason is not None and side(found).is_file():
        raise CheckpointError(f"{found} {reason}; resume=auto takes an older one of {checkpoints}")
    return found


def check_same(
    path: Path, kind: str, description: Mapping[str, Any], keys: Collection[str], families: Mapping[str, str]
) -> int:
    """Raise CheckpointError unless the checkpoint is of this module; returns its optimizer step.

    keys: of the state that it will be loaded into, with the averages and the objective's networks. families: the table
    by which a description of an earlier version is completed (vtok.config.completed).
    """
    data = read_checkpoint(path, tensors=False)
    if missing := {"pytorch-lightning_version", "optimizer_states", "callbacks", "loops"} - set(data):
        raise CheckpointError(
            f"{path} is no checkpoint of a run ({', '.join(sorted(missing))} missing), so none can go on from it; "
            f"init_from={path} takes its weights"
        )
    found = data["module"]
    if found.get("kind") != kind:
        raise CheckpointError(f"{path} is of a {found.get('kind')}, this run trains a {kind}")
    if found["family"] != description["family"]:
        raise CheckpointError(f"{path} is of a {found['family']}, this run trains a {description['family']}")
    both = ({k: d[k] for k in ("family", "arguments")} for d in (found, description))
    theirs, ours = (completed(d, families) for d in both)
    for d in (theirs, ours) if kind == "generator" else ():  # the tokenizer is frozen: see keep_tokenizer
        d["arguments"] = {k: meaning(v) if k == "spec" else v for k, v in d["arguments"].items()}
    for name, there, here in differences(theirs, ours, SECTION_OF[kind]):
        raise CheckpointError(
            f"{path} was made with {name}={there!r:.120}, this run has {here!r:.120}; a resume cannot change the "
            "module: use init_from"
        )
    if pieces.folder_of(data, path) is None:
        lacks, more = sorted(set(keys) - set(data["state_dict"])), sorted(set(data["state_dict"]) - set(keys))
        if lacks or more:
            raise CheckpointError(
                f"{path} {'lacks' if lacks else 'has, unlike this run,'} {(lacks or more)[0]}: a resume cannot change "
                "which averages and networks there are (ema, objective, teacher); change them back, or use init_from"
            )
    return int(data["global_step"])


def prepare(
    folder: Path,
    *,
    config: str,
    overrides: Sequence[str],
    resumed: Path | None,
    step: int,
    overwrite: bool,
) -> None:
    """Write config.yaml, overrides.txt and versions.json, and clear what does not belong to this timeline.

    overwrite: remove checkpoints, metrics and pictures of the run that was here. resumed, step: where it goes on.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    sweep(checkpoints)
    if resumed is None:
        old = [*checkpoints.glob("*.ckpt"), *checkpoints.glob("*.sha256"), folder / "metrics.csv"]
        if overwrite:
            old += (folder / "pictures").glob("*.png")
        for path in old:
            path.unlink(missing_ok=True)
        sweep(checkpoints)
    else:
        trim_rows(folder / "metrics.csv", step)
        if resumed.parent == checkpoints:
            if resumed.name != "last.ckpt":
                link(resumed, checkpoints / "last.ckpt")
            for later in (p for p in generations(checkpoints) if step_of(p) > step):
                print(f"removing {later.name}: later than step {step}, from which the run goes on", flush=True)
                remove(later)
    for name, text in (("config.yaml", config), ("overrides.txt", "\n".join(overrides) + "\n")):
        write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))
    write_json(folder / "versions.json", versions())


def changes(folder: Path, config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What differs between the configuration that started a run and the one that resumes it, for the user."""
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    old = OmegaConf.to_container(OmegaConf.load(path))
    before, now = (completed({n: c.get(n) for n in names}, {}) for c in (old, config))
    found = [change for change in differences(before, now) if change[0] not in SAME_BATCHES]
    return [f"{name}: {there} -> {here}" for name, there, here in found]


def keep_tokenizer(tokenizer: Configured, folder: Path, *, resumed: bool) -> None:
    """Store the frozen tokenizer of a generator's run in it; a resumed run must still have the same."""
    place = folder / "tokenizer"
    if resumed and is_folder(place):
        kept = read_config(place)
        if kept.get("hash") != weights_hash(tokenizer.state_dict()):
            raise CheckpointError(f"tokenizer_from is not the tokenizer that this run started with, {place}")
        for name, there, here in unlike({k: kept[k] for k in ("family", "arguments")}, describe(tokenizer)):
            raise CheckpointError(
                f"tokenizer_from has {name}={here!r:.60}, the tokenizer that this run started with, {place}, had "
                f"{there!r:.60}: set it as it was"
            )
        return
    save_folder(tokenizer, place)


def versions() -> dict[str, Any]:
    """Package versions, python, and the git commit of the working directory (null outside of a repository)."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("vtok-vgen", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # tells the CUDA build, which the package version does not
    return {**found, "git_commit": git("rev-parse", "HEAD"), "git_changed": bool(git("status", "--porcelain", "-uno"))}


def git(*arguments: str) -> str | None:
    """Output of a git command, None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
