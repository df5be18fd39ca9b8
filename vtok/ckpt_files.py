"""Checkpoint files that survive a kill at any moment, and finding the newest one that is whole.

Files are written beside their target, flushed to disk and renamed (Lightning's own writer goes through $TMPDIR and was
seen to tear when that is another file system), with a SHA-256 in a file beside them. The hash is written first: at
every moment the side file knows the checkpoint that stands under the name. A checkpoint in pieces (vtok/pieces.py) has
those of its pieces there too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vtok import pieces
from vtok.checkpoint import FULL, CheckpointError, file_hash, read_checkpoint, write_atomic

PATTERN = "step_*.ckpt"


def side(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def verify(path: Path) -> str | None:
    """Why a checkpoint must not be used, or None where it is whole."""
    if not path.is_file():
        return "does not exist"
    if not side(path).is_file():
        return f"has no {side(path).name} beside it"
    own, parts = _hashes(path)
    if file_hash(path) not in own:
        return "differs from its SHA-256, it is damaged or truncated"
    for name, digest in parts.items():
        if not (path.parent / name).is_file():
            return f"lacks {name}"
        if file_hash(path.parent / name) != digest:
            return f"differs from the SHA-256 of {name}, it is damaged or truncated"
    return None


def _hashes(path: Path) -> tuple[list[str], dict[str, str]]:
    """What the side file knows: hashes of the checkpoint, and of its pieces by name."""
    lines = side(path).read_text().splitlines() if side(path).is_file() else []
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    parts = {name: digest for digest, name in (p for p in pairs if len(p) == 2 and "/" in p[1])}
    return [pair[0] for pair in pairs if len(pair) < 2 or "/" not in pair[1]], parts


def step_of(path: Path) -> int:
    number = path.name.removeprefix("step_").removesuffix(".ckpt")
    return int(number) if number.isdigit() else -1


def generations(folder: Path) -> list[Path]:
    """step_N.ckpt files, newest first."""
    return sorted(folder.glob(PATTERN), key=step_of, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verifies, and what was passed over on the way, for the user."""
    passed: list[str] = []
    for path in [folder / "last.ckpt", *generations(folder)]:
        reason = verify(path)
        if reason is None:
            try:
                read_checkpoint(path, tensors=False)
                return path, passed
            except CheckpointError as error:
                reason = str(error)
        if path.exists():
            passed.append(f"{path.name} {reason}")
    return None, passed


def sweep(folder: Path) -> list[Path]:
    """Remove what killed writers left (*.tmp.PID of processes that are gone); returns the removed paths."""
    stale = [p for p in folder.glob("*.tmp.*") if not _alive(p.name.rpartition(".")[2])]
    for path in stale:
        path.unlink(missing_ok=True)
    pieces.sweep(folder)
    return stale


def remove(path: Path) -> None:
    """Delete a checkpoint, with its pieces where no other one has the same."""
    path.unlink(missing_ok=True)
    side(path).unlink(missing_ok=True)
    pieces.sweep(path.parent)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system has no hard links."""
    digest = file_hash(source)
    old, old_parts = _hashes(target)
    parts = _hashes(source)[1]
    # for a moment both hashes stand there: whichever file a kill leaves, it verifies
    _write_side(target, [digest, *old[:1]], parts | old_parts)
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)
    _write_side(target, [digest], parts)


def write_side(path: Path, checkpoint: dict[str, Any]) -> None:
    """Name the pieces of a checkpoint that is about to be written."""
    _write_side(path, [], _parts(checkpoint))


def _parts(checkpoint: dict[str, Any]) -> dict[str, str]:
    found = checkpoint.get(pieces.KEY)
    return {f"{found['folder']}/{name}": digest for name, digest in found["files"].items()} if found else {}


def _write_side(path: Path, digests: list[str], parts: dict[str, str]) -> None:
    text = "".join(f"{digest}  {path.name}\n" for digest in digests)
    text += "".join(f"{digest}  {name}\n" for name, digest in parts.items())
    write_atomic(side(path), lambda file: file.write(text.encode()))


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def give_up_oldest(path: Path, error: OSError) -> bool:
    """Whether, after the error of a full disk, a generation beside `path` was removed: the oldest, never the newest or
    the best."""
    old = [p for p in generations(path.parent)[1:] if p.stat().st_nlink == 1]
    if error.errno not in FULL or not old:
        return False
    print(f"warning: no space left for {path}; removing {old[-1].name} and trying again", flush=True)
    remove(old[-1])
    return True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file layer with atomic writes and a SHA-256 beside every checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        try:
            self._write(checkpoint, path)
        except OSError as error:
            if not give_up_oldest(path, error):
                raise
            self._write(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        data = torch.load(path, map_location=map_location, weights_only=True)
        folder = pieces.folder_of(data, Path(path))
        return data if folder is None else pieces.join(data, pieces.read_whole(folder))

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        def write(file: Any) -> None:
            torch.save(checkpoint, file)
            file.flush()
            _write_side(path, [file_hash(Path(file.name))], _parts(checkpoint))

        write_atomic(path, write, size=bytes_of(checkpoint))


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in nested data: nearly the size of a checkpoint of it."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(bytes_of(item) for item in value.values())
    return sum(bytes_of(item) for item in value) if isinstance(value, (list, tuple)) else 0
