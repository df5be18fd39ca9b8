"""Tables of key patterns: an original's state dict becomes ours by renaming, dropping, joining and splitting.

A table is a list of rules; the first whose pattern matches a whole key decides. A key that no rule names is an error,
and so is a missing part of a join: nothing is lost or left over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What happens to the keys that match `pattern` (a regular expression for the whole key).

    target: our key, with groups of the pattern as in re.sub, or a function of the match. A tuple of keys splits the
    tensor into equal parts along dimension 0. None drops the tensor: say so by its name, never by a wildcard.
    part: (i, n) makes the tensor the i-th of n that are joined along dimension 0 under the target.
    change: applied to the tensor first.
    """

    pattern: str
    target: str | tuple[str, ...] | Callable[[re.Match], str] | None
    part: tuple[int, int] | None = None
    change: Callable[[Tensor], Tensor] | None = None


def translate(state: Mapping[str, Tensor], rules: Sequence[Rule], source: str) -> dict[str, Tensor]:
    """The state dict that `rules` make of `state`. source: what the table is for, for messages.

    Raises ValueError for keys that no rule names, for two keys with one target, and for incomplete joins.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    found: dict[str, Tensor] = {}
    joins: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    unknown: list[str] = []
    for key in sorted(state):
        match, rule = next(((m, rule) for regex, rule in compiled if (m := regex.fullmatch(key))), (None, None))
        if match is None:
            unknown.append(key)
            continue
        if rule.target is None:
            continue
        tensor = rule.change(state[key]) if rule.change else state[key]
        if isinstance(rule.target, tuple):
            if tensor.shape[0] % len(rule.target):
                raise ValueError(f"{source}: {key} {tuple(tensor.shape)} does not split into {len(rule.target)} parts")
            for name, piece in zip(rule.target, tensor.chunk(len(rule.target))):
                _put(found, match.expand(name), piece, source)
            continue
        name = match.expand(rule.target) if isinstance(rule.target, str) else rule.target(match)
        if rule.part is None:
            _put(found, name, tensor, source)
        else:
            index, counts[name] = rule.part
            _put(joins.setdefault(name, {}), index, tensor, source)
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(f"{source}: {len(unknown)} unknown keys: {shown}")
    for name, parts in joins.items():
        if len(parts) != counts[name]:
            raise ValueError(f"{source}: {name} needs {counts[name]} parts, got {len(parts)}")
        _put(found, name, torch.cat([parts[i] for i in range(counts[name])]), source)
    return found


def highest(state: Mapping[str, Tensor], pattern: str, source: str) -> int:
    """1 + the largest number that the first group of `pattern` takes over all keys: how many blocks there are."""
    numbers = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    if not numbers:
        raise ValueError(f"{source}: no key looks like {pattern}; is this another model's file?")
    return 1 + max(numbers)


def shape(state: Mapping[str, Tensor], key: str, source: str) -> tuple[int, ...]:
    """Shape of state[key]; ValueError that names the key where it is missing."""
    if key not in state:
        raise ValueError(f"{source}: {key} is missing; is this another model's file?")
    return tuple(state[key].shape)


def check(arguments: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
    """ValueError where the original's constructor arguments, as far as given, differ from what the shapes tell."""
    for name, value in found.items():
        given = arguments.get(name, value)
        if (list(given) if isinstance(value, list) else given) != value:
            raise ValueError(f"{source}: {name}={given} in the config, but the weights have {value}")


def _put(found: dict, name: str | int, tensor: Tensor, source: str) -> None:
    if name in found:
        raise ValueError(f"{source}: two keys become {name}")
    found[name] = tensor
