"""Write a published model, or a run of ours, as our folder: model.safetensors and config.json, with its tokenizer.

    python scripts/convert.py from=zoo:var-d16 out=outputs/var_d16
    python scripts/convert.py from=mine.pt family=llamagen kind=generator config=mine.json out=outputs/mine
    python scripts/convert.py from=outputs/my_run out=outputs/mine

The folder holds one set of weights, in float32, and can be moved, shared and loaded without this table or the original.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.export import export, free  # noqa: E402
from vtok.cli import entry  # noqa: E402


@entry("convert", ROOT / "configs")
def main(config: Any) -> None:
    convert(config)


def convert(config: Any) -> Path:
    """The command of configs/convert.yaml; returns the folder written."""
    from vgen.published import convert_file, entry_of, load_entry, load_generator
    from vtok.checkpoint import file_hash, save_folder
    from vtok.weight_files import read_weights

    out, source = Path(config["out"]), config["from"]
    if source is None:
        raise ValueError("from= is missing: a published file, or zoo:<name> (`python -m vgen.zoo` lists them)")
    free(out, config["overwrite"])
    consent = {"inside": config["inside"], "accept_license": bool(config["accept_license"])}
    if str(source).startswith("zoo:"):
        known = entry_of(source)
        if known.kind == "generator":
            loaded, shown = load_generator(source, config["weights"], config["tokenizer_from"], **consent)
            _save(shown, out / "tokenizer")
        else:
            loaded = load_entry(known, config["weights"], **consent)
        facts = {"reported_fid": getattr(known, "fid", known.rfid), "evaluator": getattr(known, "evaluator", None)}
        _save(loaded, out, sampling=getattr(known, "sampling", None), **facts)
    elif Path(source).is_dir() or (Path(source).suffix == ".ckpt" and config["family"] is None):
        export(Path(source), out, weights=config["weights"] or "ema", trust=config["trust"])
    else:
        if config["family"] is None or config["kind"] not in ("tokenizer", "generator"):
            raise ValueError("a file needs family=<converter> and kind=tokenizer or generator; or give from=zoo:<name>")
        arguments = json.loads(Path(config["config"]).read_text()) if config["config"] else {}
        state = read_weights(source, config["inside"] or "auto")
        module = convert_file(config["kind"], config["family"], state, arguments, Path(source))
        save_folder(module, out, converted_from={"file": Path(source).name, "sha256": file_hash(source)})
    print(f"wrote {out}")
    return out


def _save(loaded: Any, folder: Path, **extra: Any) -> None:
    from vtok.checkpoint import file_hash, save_folder

    entry = loaded.entry
    origin = {"zoo": entry.name, "place": entry.place, "licence": entry.licence, "sha256": file_hash(loaded.file)}
    save_folder(loaded.module, folder, converted_from=origin, **{k: v for k, v in extra.items() if v is not None})


if __name__ == "__main__":
    main()
