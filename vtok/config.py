"""From plain data to objects: recorded constructor arguments, family names, and the only call of Hydra's instantiate.

Two doors. `describe` and `build` serve shared folders and checkpoints: a family name from a table of ours plus plain
constructor arguments, so a downloaded config cannot name code. `instantiate` serves the user's own Hydra configs and
refuses targets outside an allow-list (Hydra's instantiate on untrusted configs is CVE-2026-68508). A family of the
user's own is described as "module:Class"; neither door imports its module unless the user names that in `trust`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ALLOWED_MODULES = ("vtok.", "vgen.", "eval.")
ALLOWED_TARGETS = (
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "lightning.Trainer",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.profilers.SimpleProfiler",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.strategies.DDPStrategy",
)


OWN_PACKAGES = ("vtok", "vgen", "eval")


class Families(dict):
    """A table of families, and "module:Class" for the modules in `trust` and below them."""

    def __init__(self, families: Mapping[str, str], trust: Sequence[str] = ()) -> None:
        super().__init__(families)
        self.trust = tuple(getattr(families, "trust", ())) + tuple(trust)

    def __contains__(self, name: object) -> bool:
        module = str(name).partition(":")[0]
        return super().__contains__(name) or (":" in str(name) and _trusted(module, self.trust))

    def __missing__(self, name: str) -> str:
        if name not in self:
            raise KeyError(name)
        return name


class Configured:
    """Records the arguments of the outermost constructor call in `self.arguments`, so that a module can be rebuilt."""

    arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if "arguments" not in self.__dict__:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                self.__dict__["arguments"] = {k: v for k, v in list(bound.arguments.items())[1:]}
            original(self, *args, **kwargs)

        cls.__init__ = init


def describe(module: Configured) -> dict:
    """Plain data from which `build` makes the same module (weights apart): {"family", "arguments"}.

    family: the class's name, "module:Class" where it is not of this toolkit.
    """
    cls = type(module)
    ours = cls.__module__.partition(".")[0] in OWN_PACKAGES
    family = cls.__name__ if ours else f"{cls.__module__}:{cls.__qualname__}"
    return {"family": family, "arguments": {k: _plain(v) for k, v in module.arguments.items()}}


def build(description: Mapping, families: Mapping[str, str]) -> Any:
    """Make the module of a description. `families` maps a family name to "module:Class".

    With `Families(table, trust)` a description may name a class of the user's own; it must be a Configured one.
    """
    if not isinstance(description, Mapping) or set(description) != {"family", "arguments"}:
        raise ValueError(f"a module's description holds `family` and `arguments`, got {description!r:.200}")
    name = description["family"]
    cls = family_class(name, families)
    arguments = {k: _built(v, families) for k, v in description["arguments"].items()}
    unknown = set(arguments) - set(inspect.signature(cls.__init__).parameters)
    if unknown:
        raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}")
    return cls(**arguments)


def family_class(name: Any, families: Mapping[str, str]) -> type[Configured]:
    """The class of a family name. Raises ValueError where it is in no module of the table or of those trusted."""
    if not isinstance(name, str) or name not in families:
        if isinstance(name, str) and ":" in name:
            module = name.partition(":")[0]
            raise ValueError(f"family {name!r} is code outside this toolkit; if you trust it pass trust=[{module}]")
        raise ValueError(f"unknown family {name!r}; known are {', '.join(sorted(families))}")
    module, _, attribute = families[name].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"family {name!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    if not (isinstance(cls, type) and issubclass(cls, Configured)):
        raise ValueError(f"family {name!r} is no tokenizer, generator or part of one")
    return cls


def imported(families: Mapping[str, str], description: Mapping[str, Any]) -> Families:
    """The table, trusting the modules of a description's families too where this process has imported them: for parts
    that a module takes over from one made under `trust`, as a next-scale generator its tokenizer's quantizer."""
    found = (name.partition(":") for name in _families(description) if ":" in name)
    return Families(families, [module for module, _, own in found if hasattr(sys.modules.get(module), own)])


def defaults(target: Any) -> dict[str, Any]:
    """What a class or function takes for the arguments that it is not given, as plain data."""
    parameters = inspect.signature(target).parameters.values()
    return {p.name: _plain(p.default) for p in parameters if p.default is not p.empty}


def completed(data: Any, families: Mapping[str, str]) -> Any:
    """Plain data in which every description, and every section with a `_target_` of this toolkit, however deep, names
    all arguments of its class: those that came after it was written stand at their defaults, which do what was done
    without them. A family that the table does not know stays as it is."""
    if isinstance(data, (list, tuple)):
        return [completed(value, families) for value in data]
    if not isinstance(data, Mapping):
        return data
    found = {k: completed(v, families) for k, v in data.items()}
    if _is_description(found) and found["family"] in families:
        known = defaults(family_class(found["family"], families))
        return {**found, "arguments": known | found["arguments"]}
    if str(found.get("_target_", "")).startswith(ALLOWED_MODULES):
        module, _, attribute = found["_target_"].rpartition(".")
        try:
            return defaults(getattr(importlib.import_module(module), attribute)) | found
        except (ImportError, AttributeError):  # of a version that had it under another name
            return found
    return found


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of every single value in which nested plain data differ, as `quantizer.beta` or
    `parts[0].scale`: arguments of descriptions go by the name of what they describe. What one lacks is None."""
    if _is_description(old) and _is_description(new):
        if old["family"] != new["family"]:
            return [(name, old["family"], new["family"])]
        old, new = old["arguments"], new["arguments"]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(f"{name}.{key}" if name else str(key), old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and dict in map(type, old):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(old, new))]
    else:
        return [] if old == new else [(name, old, new)]
    return [found for key, a, b in pairs for found in differences(a, b, key)]


def instantiate(config: Any, *args: Any, trust: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Hydra's instantiate, for targets of this toolkit, a few of torch's and Lightning's, and modules in `trust`."""
    from hydra.utils import instantiate as hydra_instantiate

    for target in _targets(config):
        module = target.rpartition(".")[0]
        if target not in ALLOWED_TARGETS and not target.startswith(ALLOWED_MODULES) and not _trusted(module, trust):
            raise ValueError(f"_target_ {target!r} is not allowed; to trust its module pass trust=[{module}]")
    return hydra_instantiate(config, *args, **kwargs)


def _trusted(module: str, trust: Sequence[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in trust if name)


def _targets(config: Any) -> list[str]:
    if isinstance(config, Mapping) or hasattr(config, "items"):
        found = [str(config["_target_"])] if "_target_" in config else []
        return found + [t for value in config.values() for t in _targets(value)]
    if isinstance(config, (list, tuple)) or type(config).__name__ == "ListConfig":
        return [t for value in config for t in _targets(value)]
    return []


def _is_description(value: Any) -> bool:
    keys = isinstance(value, Mapping) and set(value) == {"family", "arguments"}
    return keys and isinstance(value["family"], str) and isinstance(value["arguments"], Mapping)


def _families(data: Any) -> list[str]:
    """Names of the families of all descriptions in plain data."""
    if isinstance(data, (list, tuple)):
        return [name for value in data for name in _families(value)]
    if not isinstance(data, Mapping):
        return []
    own = [data["family"]] if _is_description(data) else []
    return own + [name for value in data.values() for name in _families(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, Configured):
        return describe(value)
    if hasattr(value, "to_config"):
        return value.to_config()
    if isinstance(value, Mapping) or type(value).__name__ == "DictConfig":
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a constructor argument of type {type(value).__name__} cannot be written to a config file")


def _built(value: Any, families: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        if "family" in value or "arguments" in value:
            return build(value, families)
        return {k: _built(v, families) for k, v in value.items()}
    return [_built(v, families) for v in value] if isinstance(value, list) else value
