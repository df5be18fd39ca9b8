"""Fully sharded training: weights, gradients, averages and optimizer state cut over the processes (PyTorch's FSDP2).

Lightning's ModelParallelStrategy with `fully_shard`; its FSDPStrategy wraps the older API, which has no CPU path and so
could not be tested. Every block of a trunk is one unit, and what is left of the module is another. Methods that a
training step calls on the module itself count as its forward passes.

A checkpoint is either assembled on process 0 and written as one file, or every process writes what it holds
(vtok/pieces.py). A run goes on from both with any number of processes, with another strategy, or is exported
(scripts/export.py).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vtok import pieces
from vtok.checkpoint import read_checkpoint
from vtok.ckpt_files import give_up_oldest, write_side

FORWARD_METHODS = ("loss",)  # further ones would nest, and the inner of three frees what the outer still needs


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Sharded(ModelParallelStrategy):
    """All processes hold one copy of the model together.

    process_group_backend: gloo on the CPU; null chooses. pieces: whether every process writes its part of a checkpoint.
    """

    def __init__(self, *, process_group_backend: str | None = None, pieces: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=pieces, process_group_backend=process_group_backend)
        self.pieces = pieces

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The whole state in one file, or the pieces first and a file that names them, through the atomic writer.
        Lightning's own calls collectives on some ranks."""
        path = Path(self.broadcast(filepath))
        if self.pieces:
            folder = path.with_name(f"{path.stem}.pieces")
            unnamed = folder.with_name(f"{folder.name}.tmp")
            checkpoint, tensors = pieces.split(checkpoint)
            try:
                files = pieces.write(tensors, unnamed)
            except OSError as error:
                if not self.broadcast(self.is_global_zero and give_up_oldest(path, error)):
                    raise
                files = pieces.write(tensors, unnamed)
            checkpoint[pieces.KEY] = {"folder": folder.name, "files": files}
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier timeline
                write_side(path, checkpoint)
                os.replace(unnamed, folder)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)
        self.barrier()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As an optimizer of one process has it, keys counted in its own order. Lightning's counts in the module's,
        which only it reads right."""
        options = StateDictOptions(cpu_offload=True) if self.pieces else WHOLE
        state = get_optimizer_state_dict(self.model, _inner(optimizer), options=options)
        if not (self.pieces or self.is_global_zero):
            return {}
        place = {name: i for i, name in enumerate(_names(state))}
        groups = [{**g, "params": [place[n] for n in g["params"]]} for g in state["param_groups"]]
        return {"state": {place[n]: v for n, v in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the file and keeps its parts. Nothing but weights is unpickled."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path, tensors=False)
        if (folder := pieces.folder_of(checkpoint, path)) is not None:
            return self._load_pieces(checkpoint, folder)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            names = _names(get_optimizer_state_dict(self.model, _inner(optimizer)))
            order = [i for group in saved["param_groups"] for i in group["params"]]
            assert len(names) == len(order), (len(names), len(order))
            name = dict(zip(order, names))
            groups = [{**g, "params": [name[i] for i in g["params"]]} for g in saved["param_groups"]]
            state = {"state": {name[i]: v for i, v in saved["state"].items()}, "param_groups": groups}
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, _inner(optimizer), state, options=options)
        return checkpoint

    def _load_pieces(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Every process reads its parts alone, wherever the pieces were cut."""
        empty = {"state_dict": get_model_state_dict(self.model), "optimizer_states": []}
        for optimizer in self.optimizers:
            state = get_optimizer_state_dict(self.model, _inner(optimizer))
            place = {name: i for i, name in enumerate(_names(state))}
            empty["optimizer_states"].append({"state": {place[n]: v for n, v in state["state"].items()}})
        tensors = pieces.split(empty)[1]
        pieces.read_into(tensors, folder)
        loaded = pieces.join(checkpoint, tensors)
        set_model_state_dict(self.model, loaded["state_dict"])
        for optimizer, saved in zip(self.optimizers, loaded["optimizer_states"]):
            name = dict(enumerate(_names(get_optimizer_state_dict(self.model, _inner(optimizer)))))
            groups = [{**g, "params": [name[i] for i in g["params"]]} for g in saved["param_groups"]]
            state = {"state": {name[i]: v for i, v in saved["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, _inner(optimizer), state)
        return loaded


def _names(state: dict[str, Any]) -> list[str]:
    return [name for group in state["param_groups"] for name in group["params"]]


def _inner(optimizer: Any) -> Optimizer:
    return getattr(optimizer, "_optimizer", optimizer)


def shard(modules: list[nn.Module], mesh: Any) -> None:
    """Cut the parameters of modules over a one-dimensional mesh of processes."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in modules:
        for part in module.modules():
            for block in getattr(part, "blocks", ()) if type(part).__name__ == "Trunk" else ():
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for name in FORWARD_METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be cut over processes, as all of it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def is_sharded(strategy: Any) -> bool:
    return isinstance(strategy, Sharded)
