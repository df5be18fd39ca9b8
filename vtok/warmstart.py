"""Start from the weights of another run: copy what fits, resize what can be, and say what stayed new.

Class tables take the rows of the classes that both know, by name where both have names, and the row for "no class".
Position tables are interpolated scale by scale on their grids, tables of levels keep the common rows. Everything else
must have the same shape to be copied. Nothing is left out silently: `WarmStart.table` lists every tensor that is not a
plain copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.checkpoint import (
    CheckpointError,
    best_weights,
    find_checkpoint,
    is_folder,
    load_module,
    read_checkpoint,
    read_config,
)

CLASS_TABLE = "conditioner.table.weight"


@dataclass
class WarmStart:
    """What happened to each tensor of the new module: name -> shapes or reason."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines for the terminal."""
        groups = {"loaded": self.loaded, "resized": self.resized, "new": self.new, "unused": self.unused}
        lines = [f"init_from {self.source}: " + ", ".join(f"{len(v)} {k}" for k, v in groups.items())]
        lines += [f"  resized  {name}  {how}" for name, how in self.resized.items()]
        lines += [f"  new      {name}  {why}" for name, why in self.new.items()]
        lines += [f"  unused   {name}" for name in self.unused]
        return "\n".join(lines)


def warm_start(
    module: nn.Module, source: str | Path, families: Mapping[str, str], *, class_names: Sequence[str] = ()
) -> WarmStart:
    """Copy weights of a run, .ckpt, folder, or the name of a run under outputs/ into `module`, in place.

    class_names: of the new data. Raises CheckpointError where the source cannot be read or nothing of it fits.
    """
    path = Path(source)
    if not path.exists() and (Path("outputs") / path).exists():
        path = Path("outputs") / path
    kind = best_weights(path)
    old = load_module(path, families, kind)
    result = WarmStart(f"{path}{'' if is_folder(path) else f' ({kind} weights)'}")
    before, after = old.state_dict(), module.state_dict()
    for name, value in after.items():
        shape = tuple(value.shape)
        if name not in before:
            result.new[name] = f"{shape}, not in the source"
            continue
        given = before[name]
        if name.endswith(CLASS_TABLE):
            made, how = _classes(given, value, _class_names(path), class_names)
        elif given.shape == value.shape:
            value.copy_(given)
            result.loaded.append(name)
            continue
        else:
            made, how = _resized(name, given, value, old, module)
        if made is None:
            result.new[name] = f"{shape}, the source has {tuple(given.shape)}"
        else:
            value.copy_(made)
            result.resized[name] = how
    result.unused = [k for k in before if k not in after]
    if not result.loaded and not result.resized:
        raise CheckpointError(f"init_from={source}: nothing in it fits a {type(module).__name__}")
    return result


def _class_names(path: Path) -> list[str]:
    described = read_config(path) if is_folder(path) else read_checkpoint(find_checkpoint(path))["module"]
    return list(described.get("class_names") or [])


def _classes(given: Tensor, value: Tensor, old: Sequence[str], new: Sequence[str]) -> tuple[Tensor | None, str]:
    """Rows of common classes and the last row, which stands for no class."""
    if given.shape[1:] != value.shape[1:]:
        return None, ""
    rows_old, rows_new = len(given) - 1, len(value) - 1
    if len(old) == rows_old and len(new) == rows_new:
        place = {name: i for i, name in enumerate(old)}
        pairs = [(place[name], i) for i, name in enumerate(new) if name in place]
        by = "by name"
    else:
        pairs, by = [(i, i) for i in range(min(rows_old, rows_new))], "by index"
    made = value.clone()
    for source, target in pairs:
        made[target] = given[source]
    made[-1] = given[-1]
    return made, f"{len(pairs)} of {rows_new} classes {by}, and the row for none"


def _resized(name: str, given: Tensor, value: Tensor, old: nn.Module, new: nn.Module) -> tuple[Tensor | None, str]:
    change = f"{tuple(given.shape)} -> {tuple(value.shape)}"
    same_rank = given.dim() == value.dim() and given.shape[-1] == value.shape[-1]
    if same_rank and given.dim() == 2 and "level" in name:
        rows = min(len(given), len(value))
        made = value.clone()
        made[:rows] = given[:rows]
        return made, f"{change}, the first {rows} rows"
    if same_rank and "position" in name and given.shape[:-2] == value.shape[:-2]:
        sides_old, sides_new = _sides(old, given.shape[-2]), _sides(new, value.shape[-2])
        if sides_old is not None and sides_new is not None and len(sides_old) == len(sides_new):
            return _interpolate(given, sides_old, sides_new), f"{change}, interpolated"
    return None, ""


def _sides(module: nn.Module, length: int) -> list[tuple[int, int]] | None:
    """Grids that a position table of `length` rows covers: those of the module's layout, or one square."""
    layout = getattr(module, "layout", None) or getattr(getattr(module, "spec", None), "layout", None)
    if layout is not None and sum(h * w for h, w in layout.sides) == length:
        return list(layout.sides)
    side = math.isqrt(length)
    return [(side, side)] if side * side == length else None


def _interpolate(table: Tensor, old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> Tensor:
    """Bicubic on every grid; table [.., L, D]. Of torch's two cubic kernels the antialiased one keeps a linear ramp."""
    parts, start = [], 0
    flat = table.reshape(-1, *table.shape[-2:]).float()
    for (h, w), size in zip(old, new):
        grid = flat[:, start : start + h * w].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        start += h * w
        if (h, w) != tuple(size):
            grid = F.interpolate(grid, size=tuple(size), mode="bicubic", antialias=True)
        parts.append(grid.flatten(2).transpose(1, 2))
    made = torch.cat(parts, 1)
    return made.reshape(*table.shape[:-2], *made.shape[-2:]).to(table.dtype)
