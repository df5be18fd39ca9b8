"""Checkpoints of trainer=fsdp in pieces: every process writes what it holds, as safetensors, and nothing is assembled.

step_N.ckpt is then a small file without tensors; it names the files of the folder step_N.pieces and their SHA-256. The
format is PyTorch's distributed checkpoint with its safetensors storage (its default storage keeps a pickle, which a
loader that refuses code cannot read): each file knows the place of its parts, so any number of processes reads them.
The folder takes its name before the .ckpt is written: a kill leaves the checkpoint before, and a folder to sweep.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

KEY = "pieces"  # of a checkpoint: {"folder": name beside it, "files": {name: SHA-256}}


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint without its tensors, and those by name. Scalars stay: all processes have the same."""
    tensors = {f"state_dict.{k}": v for k, v in checkpoint["state_dict"].items() if v.dim()}
    scalars = {k: v for k, v in checkpoint["state_dict"].items() if not v.dim()}
    optimizers = []
    for o, optimizer in enumerate(checkpoint["optimizer_states"]):
        state: dict[int, dict[str, Any]] = {}
        for i, values in optimizer["state"].items():
            large = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.dim()}
            tensors |= {f"optimizer.{o}.{i}.{k}": v for k, v in large.items()}
            state[i] = {k: v for k, v in values.items() if k not in large}
        optimizers.append({**optimizer, "state": state})
    return {**checkpoint, "state_dict": scalars, "optimizer_states": optimizers}, tensors


def join(checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `split`, with those of the tensors that are given."""
    whole = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    whole["optimizer_states"] = [{**o, "state": {i: dict(v) for i, v in o["state"].items()}} for o in
                                 checkpoint["optimizer_states"]]  # fmt: skip
    for name, value in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "state_dict":
            whole["state_dict"][rest] = value
        else:
            o, i, k = rest.split(".", 2)
            whole["optimizer_states"][int(o)]["state"][int(i)][k] = value
    return whole


def write(tensors: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Every process writes its parts into `folder` (a collective call); SHA-256 of all files by name.

    A full disk is an OSError on every process, and nothing is left in `folder` then.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    from vtok.checkpoint import file_hash, full_disk, no_space

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True))
    except CheckpointException as error:  # on all processes
        held = [v.to_local() if isinstance(v, DTensor) else v for v in tensors.values()]
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, sum(v.numel() * v.element_size() for v in held))  # nobody writes any more
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        number = next((n for e, *_ in error.failures.values() if (n := full_disk(e)) is not None), None)
        if number is None:
            raise
        raise no_space(number, folder, sum(sizes), shutil.disk_usage(folder.parent).free) from None
    own = sorted(folder.glob(f"shard-{dist.get_rank() + 1:05d}-*"))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {path.name: file_hash(path) for path in own})
    return {name: digest for part in found for name, digest in part.items()}


def read_into(tensors: dict[str, Tensor], folder: Path, *, alone: bool = False) -> None:
    """Fill tensors, cut over the processes or whole, from pieces. alone: without the other processes."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def read_whole(folder: Path, kinds: tuple[str, ...] = ("state_dict", "optimizer")) -> dict[str, Tensor]:
    """All tensors of those kinds, whole, on the CPU."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.split(".", 1)[0] in kinds
    }
    read_into(tensors, folder, alone=True)
    return tensors


def folder_of(checkpoint: Mapping[str, Any], path: Path) -> Path | None:
    """Where the pieces of a checkpoint that was read from `path` are; None where it is whole."""
    return path.parent / Path(checkpoint[KEY]["folder"]).name if KEY in checkpoint else None


def sweep(folder: Path) -> None:
    """Remove the pieces that no checkpoint in `folder` names any more."""
    named = "".join(side.read_text() for side in folder.glob("*.ckpt.sha256"))
    for pieces in folder.glob("*.pieces*"):
        if f"  {pieces.name}/" not in named:
            shutil.rmtree(pieces, ignore_errors=True)
