"""Fully sharded training: weights, gradients, averages and optimizer state cut over the processes (PyTorch's FSDP2).

Lightning's ModelParallelStrategy with `fully_shard`; its FSDPStrategy wraps the older API, which has no CPU path and so
could not be tested. Every block of a trunk is one unit, and what is left of the module is another. Methods that a
training step calls on the module itself count as its forward passes.

Checkpoints are assembled on process 0 and written as the one file that every other command reads, so a run goes on
with any number of processes, with another strategy, or is exported (scripts/export.py). PyTorch's sharded format keeps
pickles, which a loader that refuses code cannot read.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

FORWARD_METHODS = ("loss",)  # further ones would nest, and the inner of three frees what the outer still needs


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Sharded(ModelParallelStrategy):
    """All processes hold one copy of the model together. process_group_backend: gloo on the CPU; null chooses."""

    def __init__(self, *, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The whole state in one file, through the atomic writer. Lightning's own calls collectives on some ranks."""
        path = self.broadcast(filepath)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)
        self.barrier()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As an optimizer of one process has it, keys counted in its own order. Lightning's counts in the module's,
        which only it reads right."""
        state = get_optimizer_state_dict(self.model, _inner(optimizer), options=WHOLE)
        if not self.is_global_zero:
            return {}
        place = {name: i for i, name in enumerate(_names(state))}
        groups = [{**g, "params": [place[n] for n in g["params"]]} for g in state["param_groups"]]
        return {"state": {place[n]: v for n, v in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the file and keeps its parts. Nothing but weights is unpickled."""
        path = self.broadcast(checkpoint_path)
        checkpoint = self.checkpoint_io.load_checkpoint(path)
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
