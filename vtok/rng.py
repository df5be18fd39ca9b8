"""The state of all global random number generators of a process: read it, set it, or leave it untouched.

Lightning's checkpoints hold none of it (its resume was measured to change every loss), and pictures or validation in
the middle of training must not move it. The state is plain tensors, ints and lists, so a weights-only load reads it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_state() -> dict[str, Any]:
    """State of torch (CPU, and this process's CUDA device where it is in use), numpy and python."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *[float(v) for v in rest]],
        "python": [version, list(internal), gauss],
    }


def set_state(state: dict[str, Any]) -> None:
    """Inverse of `get_state`. A CUDA state is left out where there is no such device."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_all(seed: int) -> None:
    """Seed torch on every device, numpy and python with a 63-bit key."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def untouched(seed: int | None = None) -> Iterator[None]:
    """Run the body with the global generators seeded (or as they are), and put their state back afterwards."""
    state = get_state()
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        set_state(state)
