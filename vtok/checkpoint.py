"""Files of weights: atomic writing, shared folders (model.safetensors + config.json), and loading what a run left.

A shared folder holds weights without pickle and a description of plain data. A run directory holds Lightning
checkpoints, whose extra key `module` is the same description, so a .ckpt loads without its YAML. Loading is strict and
weights-only. Everything is written beside its target and renamed: a reader sees the old file or the new one, never a
part (Lightning's own writer moves through $TMPDIR and can tear).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from vtok import pieces
from vtok.config import Configured, build, describe
from vtok.layers.packed import HalfLinear, PackedLinear

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space on the disk, in the quota, in a file
Weights = Literal["ema", "raw"]
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint or folder that cannot be used; the message names the file and what to do."""


def write_atomic(path: str | os.PathLike, write: Callable[[Any], None], *, size: int | None = None) -> None:
    """Call `write(file)` on a temporary binary file beside `path`, flush it to disk, and rename it to `path`.

    size: how many bytes it will be, where that is known: a full disk is then an OSError that says how many are needed.
    What stood under the name before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        temporary, opened = _beside(path)
        with opened as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        number = full_disk(error)
        if number is None:
            raise
        free = shutil.disk_usage(path.parent).free + (0 if temporary is None else temporary.stat().st_size)
        raise no_space(number, path, size, free) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _beside(path: Path) -> tuple[Path, BinaryIO]:
    """A new file path.tmp.PID. Where another machine's process of the same number, as in containers, writes the same
    path, or a killed one left its file, path.tmp.1.PID and so on."""
    number = 0
    while True:
        temporary = path.with_name(f"{path.name}.tmp.{f'{number}.' if number else ''}{os.getpid()}")
        try:
            return temporary, open(temporary, "xb")
        except FileExistsError:
            number += 1


def no_space(number: int, path: Path, size: int | None, free: int) -> OSError:
    """The error of a disk too full for `size` bytes at `path`."""
    need = f"it needs {size:,} bytes" if size else "it needs more than that"
    return OSError(
        number, f"no space left to write {path}: {need}, {free:,} bytes are free; what was there is untouched"
    )


def full_disk(error: BaseException | None) -> int | None:
    """The error number of a full disk behind what a writer raised, or None. torch.save raises a RuntimeError of its
    own in the course of it, and numpy's of a short write has no number."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or "requested and" in str(error)):
            return error.errno or errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    text = json.dumps(data, indent=1, default=str) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict: the identity of a tokenizer in manifests."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_folder(module: Configured, folder: str | os.PathLike, **extra: Any) -> Path:
    """Write model.safetensors and config.json ({"format", "family", "arguments", **extra}) to `folder`.

    ValueError where weights are packed (vtok/layers/packed.py): they would be missing.
    """
    from safetensors.torch import save

    if any(isinstance(m, (PackedLinear, HalfLinear)) for m in module.modules()):
        name = type(module).__name__
        raise ValueError(f"{name} has weights packed for sampling, which are not saved: load it with packed=False")
    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    payload = save(state, metadata={"format": "pt"})
    write_atomic(folder / "model.safetensors", lambda file: file.write(payload))
    write_json(folder / "config.json", {"format": FORMAT, **describe(module), "hash": weights_hash(state), **extra})
    return folder


def read_config(folder: str | os.PathLike) -> dict:
    """config.json of a shared folder. Raises CheckpointError where it is missing, broken or of a newer format."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is not a folder written by this toolkit") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict) or not {"format", "family", "arguments"} <= set(config):
        raise CheckpointError(f"{path} lacks `format`, `family` or `arguments`")
    if config["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {config['format']}, this version reads {FORMAT}: update the toolkit")
    return config


def load_folder(folder: str | os.PathLike, families: Mapping[str, str]) -> Any:
    """Rebuild the module of a shared folder with its weights, strictly, in eval mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder)
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error})") from None
    if "hash" in config and weights_hash(state) != config["hash"]:
        raise CheckpointError(f"{path} does not hold the weights that config.json names by hash: copy the folder again")
    module = _rebuild(config, families, path)
    load_strict(module, state, path)
    return module.eval()


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """load_state_dict that names the first keys that do not fit, as a CheckpointError."""
    own = module.state_dict()
    missing, left = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or left:
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} keys missing {missing[:3]}, {len(left)} unknown {left[:3]}"
        )
    wrong = [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        k = wrong[0]
        raise CheckpointError(f"{source} does not fit: {k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}")
    hollow = any(tensor.is_meta for tensor in own.values())  # built without memory: take the tensors as they are
    module.load_state_dict(state, assign=hollow)


def read_checkpoint(path: str | os.PathLike, *, tensors: bool = True) -> dict:
    """A Lightning .ckpt of ours, weights-only, on the CPU. Raises CheckpointError for anything else.

    tensors: of a checkpoint in pieces (vtok/pieces.py), whether the state dict is put together.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than weights or is damaged, nothing in it was run ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({str(error).splitlines()[0]:.120})") from None
    if not isinstance(data, dict) or "module" not in data or "state_dict" not in data:
        raise CheckpointError(f"{path} is not a checkpoint of this toolkit (no `module` key)")
    folder = pieces.folder_of(data, path)
    if folder is None or not tensors:
        return data
    if not folder.is_dir():
        raise CheckpointError(f"{path} is in pieces, and {folder} is missing: copy that folder too")
    return pieces.join(data, pieces.read_whole(folder, ("state_dict",)))


def find_checkpoint(path: str | os.PathLike, name: str = "last") -> Path:
    """The .ckpt that a user means by a run directory (its checkpoints/<name>.ckpt) or by a file."""
    path = Path(path)
    if path.is_file():
        return path
    for candidate in (path / "checkpoints" / f"{name}.ckpt", path / f"{name}.ckpt"):
        if candidate.is_file():
            return candidate
    if not path.exists():
        place, _, name = str(path).partition(":")
        make = {"zoo": f"python scripts/convert.py from={path} out=", "hf": f"hf download {name} --local-dir "}
        if place in make:
            raise CheckpointError(
                f"{path} is read here from a folder: `{make[place]}<folder>` makes it once, then give that folder "
                "(tokenizer/ in it, where a generator's tokenizer is meant)"
            )
        raise CheckpointError(f"{path} does not exist: give a run directory, a .ckpt file or an exported folder")
    raise CheckpointError(f"{path} holds no checkpoints/{name}.ckpt and no config.json")


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a shared folder (model.safetensors + config.json) rather than a run or a .ckpt."""
    return (Path(path) / "config.json").is_file()


def load_module(path: str | os.PathLike, families: Mapping[str, str], weights: Weights = "ema") -> Any:
    """The module in a shared folder, a run directory or a .ckpt, in eval mode.

    weights: "ema" takes the averaged weights and falls back to nothing: a checkpoint without them is an error that
    names weights=raw. Shared folders hold one set and ignore it.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}: choose ema or raw")
    if is_folder(path):
        return load_folder(path, families)
    file = find_checkpoint(path)
    data = read_checkpoint(file)
    prefix = "ema." if weights == "ema" else "module."
    state = {k[len(prefix) :]: v for k, v in data["state_dict"].items() if k.startswith(prefix)}
    if not state:
        raise CheckpointError(f"{file} holds no {weights} weights; pass weights={'raw' if weights == 'ema' else 'ema'}")
    module = _rebuild(data["module"], families, file)
    load_strict(module, state, file)
    return module.eval()


def best_weights(path: str | os.PathLike) -> Weights:
    """What `load_module` should take where both are as good: "ema" if a folder, run or .ckpt has it, else "raw"."""
    if is_folder(path):
        return "ema"
    names = read_checkpoint(find_checkpoint(path))["state_dict"]
    return "ema" if any(name.startswith("ema.") for name in names) else "raw"


def _rebuild(description: Mapping, families: Mapping[str, str], source: Path) -> Any:
    try:
        return build({k: description[k] for k in ("family", "arguments")}, families)
    except Exception as error:  # a damaged description can raise anything
        raise CheckpointError(f"{source} describes a module that cannot be built: {error}") from None
