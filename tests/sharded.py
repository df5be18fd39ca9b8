"""Every generator family cut over a mesh of one process: losses and gradients must not change (run as a program)."""

from __future__ import annotations

import copy
import os
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from generators import FAMILIES, also_read, make, tokens_of  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

from vtok.fsdp import shard, whole  # noqa: E402

# Two losses read one hidden state, and the hooks of the cut blocks add up their gradients in another order.
ROUNDING = {"llamagen_repa": 1e-6}


def alike(plain: torch.Tensor | None, cut: torch.Tensor | None, rounding: float) -> bool:
    if plain is None or cut is None:
        return plain is cut
    return bool((plain - whole(cut)).abs().max() <= rounding * plain.abs().max())


def main() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    mesh, wrong = init_device_mesh("cpu", (1,)), []
    for name in FAMILIES:
        plain = make(name).train()
        cut = copy.deepcopy(plain)
        shard([cut], mesh)
        batch = {"tokens": tokens_of(plain, 4), "label": torch.arange(4) % 5, "key": torch.arange(4)}
        batch |= also_read(plain, 4)
        for model in (plain, cut, plain, cut):  # twice each: gradients add up
            torch.manual_seed(1)
            model.loss(batch, progress=0.3)["loss"].backward()
        for (key, a), (_, b) in zip(plain.named_parameters(), cut.named_parameters()):
            if not alike(a.grad, b.grad, ROUNDING.get(name, 0)):
                wrong.append(f"{name}: {key}")
    dist.destroy_process_group()
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
