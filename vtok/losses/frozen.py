"""Pretrained networks inside losses: they follow a module to its device, but no optimizer and no checkpoint knows them.

Their weights come from files that a user fetches once; nothing is downloaded here. A missing file is a ValueError that
names the file, its size, its source and where to put it.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What the weights-only unpickler raises on bytes that are no checkpoint: whatever the first of them happen to mean.
DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    ValueError,
    TypeError,
    struct.error,
)


class Frozen(nn.Module):
    """Holds `net` outside of parameters(), state_dict() and train(); gradients pass through it to its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        # not an attribute in the usual way: nn.Module would register it
        self.__dict__["net"] = net.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self.net._apply(fn)
        return self

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.net(*arguments, **options)


def weights_folder(weights_path: str | Path | None = None) -> Path:
    """Where downloaded weights lie: the argument, else $VTOK_WEIGHTS, else ~/.cache/vtok."""
    return Path(weights_path or os.environ.get("VTOK_WEIGHTS") or Path.home() / ".cache" / "vtok").expanduser()


def find_weights(weights_path: str | Path | None, name: str) -> Path:
    """The file that `weights_path` names, or the file `name` in the folder that it names or in `weights_folder()`."""
    path = weights_folder(weights_path)
    return path if path.is_file() else path / name


def read_weights(path: Path, *, who: str, size: str, source: str, remedy: str) -> dict[str, Tensor]:
    """The state dict of a .pth or .safetensors file.

    Raises ValueError where it is missing (who needs it, size, source, and `remedy`, the way to do without it) or
    damaged.
    """
    if not path.is_file():
        raise ValueError(
            f"{who} needs {path.name} ({size}) in {path.parent}: get it from {source}, "
            f"or say where it is by weights_path= or $VTOK_WEIGHTS, or {remedy}"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); fetch it anew") from None
