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

FORWARD_METHODS = ("loss", "encode", "decode", "embed", "log_prob")


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

