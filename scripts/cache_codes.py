"""Encode a data set with a frozen tokenizer into shards that a generator trains from (format vtok-shards/v1).

    python scripts/cache_codes.py from=outputs/digits_vq data=digits out=outputs/codes/digits crops=flip

Restartable: finished shards are skipped. Several processes share the work without talking to each other: start n of
them with task_id=0..n-1 num_tasks=n, under torchrun, or as a SLURM array.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402


@entry("cache_codes", ROOT / "configs", whole={"shard_size": 1})
def main(config: Any) -> None:
    from vgen.sampling import resolve_device
    from vtok.config import instantiate
    from vtok.data.codes import frozen
    from vtok.data.extract import extract
    from vtok.data.module import ImageData
    from vtok.data.tasks import task_from_environment

    check_place("out", config.out, folder=True)
    device = resolve_device(config.device)
    task = task_from_environment(config.task_id, config.num_tasks, os.environ)
    data = instantiate(config.data)
    if not isinstance(data, ImageData):
        raise ValueError(
            f"data={type(data).__name__} gives no images to encode; choose digits, cifar10, imagefolder, ..."
        )
    complete = extract(
        data,
        frozen(config["from"], config.weights, trust=config.trust),
        config.out,
        crops=config.crops,
        batch=config.batch_size,
        shard_size=config.shard_size,
        device=device,
        dtype=config.dtype,
        task=task,
    )
    if complete:
        print(f"codes are in {config.out}; train on them with data=codes data.folder={config.out}")


if __name__ == "__main__":
    main()
