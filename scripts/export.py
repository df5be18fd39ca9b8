"""Write the weights of a run as one safetensors folder for sharing: no optimizer state, no paths, no pickle.

    python scripts/export.py from=outputs/imagenet_var out=exported/var

A generator's folder holds its tokenizer too. Checkpoints of trainer=fsdp are whole files like any other's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import entry  # noqa: E402


@entry("export", ROOT / "configs")
def main(config: Any) -> None:
    from vgen.models import FAMILIES
    from vtok.checkpoint import find_checkpoint, load_module, read_checkpoint, save_folder

    out, file = Path(config.out), find_checkpoint(config["from"])
    if out.exists() and any(out.iterdir()) and not config.overwrite:
        raise ValueError(f"out={out} exists; pass overwrite=true or another out=")
    described = read_checkpoint(file)["module"]
    module = load_module(file, FAMILIES, config.weights)
    extra = {"kind": described.get("kind"), "weights": config.weights}
    if described.get("class_names"):
        extra["class_names"] = list(described["class_names"])
    if described.get("kind") == "generator":
        place = file.parent.parent / "tokenizer"
        save_folder(load_module(place, FAMILIES), out / "tokenizer", kind="tokenizer")
    save_folder(module, out, **extra)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
