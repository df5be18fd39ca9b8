"""Names, shapes and dtypes of published checkpoints, from the originals' own classes built at full size.

    python scripts/manifests.py <folder with checkouts named owner+name> tests/references/manifests [zoo name ...]

A checkout of each original is needed here only; the manifests are facts and the tests run without it. Modules are built
with parameters on the meta device and the constructor arguments of the zoo's entry (`scripts/originals.py`). Packages
that are not installed, and that a class imports but does not build anything of, are replaced by empty stand-ins;
transformers must be there for TiTok's BERT and DetailFlow's SigLIP2.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.abc
import importlib.machinery
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STUBS = {"flash_attn", "kornia", "cv2", "refile", "lmdb", "msgpack", "nori2", "pytorch_lightning", "accelerate"}
STUBS |= {"scipy", "transformers", "open_clip", "webdataset", "albumentations", "diffusers", "decord", "torch_fidelity"}
STUBS |= {"ruamel", "pyiqa"}


class Empty(types.ModuleType):
    """A module that has whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importing a package of STUBS that is not installed, or a part of it, gives an empty object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STUBS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def write(name: str, original: str, out: Path) -> str:
    """One manifest, in this process; returns a line about it."""
    from scripts.originals import build
    from vgen.zoo import ZOO
    from vtok.weight_files import without_weights

    entry = ZOO[name]
    with without_weights(), contextlib.redirect_stdout(io.StringIO()):
        module = build(entry)
    state = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in module.state_dict().items()}
    count = sum(p.numel() for k, p in module.named_parameters() if not any(re.fullmatch(d, k) for d in entry.drop))
    text = json.dumps({"name": name, "original": original, "parameters": count, "state": state})
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return f"{name}: {len(state)} keys, {count:,} parameters"


def write_all(names: list[str], original: str, checkouts: Path, out: Path) -> None:
    """The manifests of entries of one original, in this process, a line each; one that fails ends in its error."""
    import torch

    sys.meta_path.append(StandIns())  # last: what is installed comes first
    sys.path.insert(0, str((checkouts / original).resolve()))
    torch.nn.Module.cuda = lambda self, *a, **k: self
    for name in names:
        print(write(name, original.split("/")[0], out), flush=True)


def main() -> None:
    from scripts.originals import checkout
    from vgen.zoo import ZOO

    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    checkouts, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if not checkouts.is_dir():
        raise SystemExit(f"error: {checkouts} is no folder: give the one with the checkouts")
    if unknown := [name for name in names if name not in ZOO]:
        raise SystemExit(f"error: the zoo has no {unknown[0]}: `python -m vgen.zoo` lists its models")
    groups: dict[str, list[str]] = {}
    for name in names or ZOO:
        if original := checkout(ZOO[name]):
            groups.setdefault(original, []).append(name)
    if names and len(groups) == 1:
        write_all(names, next(iter(groups)), checkouts, out)
        return
    for original, chosen in groups.items():  # a process each: the originals use the same module names
        if not (checkouts / original).is_dir():
            print(f"{original}: no checkout")
            continue
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:3], *chosen], capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            print(f"{original}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)


if __name__ == "__main__":
    main()
