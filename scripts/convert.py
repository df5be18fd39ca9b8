"""Write a published model, or a run of ours, as our folder: model.safetensors and config.json, with its tokenizer.

    python scripts/convert.py from=zoo:var-d16 out=outputs/var_d16
    python scripts/convert.py from=vq.pt family=llamagen kind=tokenizer config=vq.json out=outputs/vq
    python scripts/convert.py from=mine.pt family=llamagen kind=generator config=mine.json tokenizer_from=outputs/vq \
      out=outputs/mine
    python scripts/convert.py from=outputs/my_run out=outputs/mine
    python scripts/convert.py from=model.safetensors family=siglip2 start=detailflow_128 out=outputs/start

The last one writes what a training starts from (init_from=<folder>): an untrained tokenizer of configs/tokenizer whose
encoder (family=siglip2, for detailflow_*) or frozen VAE (family=flextok_vae, for flextok_*, with the config.json that
lies beside the VAE's file) is the file's.

A folder holds one set of weights, in float32, and can be moved, shared and loaded without this table or the original.
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

STARTS = {"flextok_vae": "FlexTokTokenizer", "siglip2": "DetailFlowTokenizer"}  # family: what it is a part of


@entry(
    "convert",
    ROOT / "configs",
    whole={"image_size": 1},
    texts=("config", "weights", "family", "kind", "start", "inside"),
)
def main(config: Any) -> None:
    convert(config)


def convert(config: Any) -> Path:
    """The command of configs/convert.yaml; returns the folder written."""
    from vgen.published import convert_file, entry_of, load_entry, load_generator, on_tokens_of
    from vtok.checkpoint import file_hash, save_folder
    from vtok.tokenizer import Tokenizer
    from vtok.weight_files import read_weights

    out, source = Path(config["out"]), config["from"]
    if source is None:
        raise ValueError("from= is missing: a published file, or zoo:<name> (`python -m vgen.zoo` lists them)")
    zoo = str(source).startswith("zoo:")
    free(out, config["overwrite"], Path((zoo and config["weights"]) or source))
    consent = {"inside": config["inside"], "accept_license": bool(config["accept_license"])}
    if zoo:
        known = entry_of(source)
        if known.kind == "generator":
            loaded, shown = load_generator(source, config["weights"], config["tokenizer_from"], **consent)
            _save(shown, out / "tokenizer")
        else:
            loaded = load_entry(known, config["weights"], **consent)
        facts = {"reported_fid": getattr(known, "fid", known.rfid), "evaluator": getattr(known, "evaluator", None)}
        _save(loaded, out, sampling=getattr(known, "sampling", None), **facts)
    elif not Path(source).exists():
        raise ValueError(f"from={source} does not exist: give a published file, a run of ours, or zoo:<name>")
    elif Path(source).is_dir() or (Path(source).suffix == ".ckpt" and config["family"] is None):
        export(Path(source), out, weights=config["weights"] or "ema", trust=config["trust"])
    else:
        if config["family"] is None or config["kind"] not in ("tokenizer", "generator"):
            raise ValueError("a file needs family=<converter> and kind=tokenizer or generator; or give from=zoo:<name>")
        arguments = arguments_of(config["config"]) if config["config"] else {}
        state = read_weights(source, config["inside"] or "auto")
        if config["family"] in STARTS:
            module = started(config, state, arguments)
        else:
            module = convert_file(config["kind"], config["family"], state, arguments, Path(source))
        if config["kind"] == "generator" and (place := config["tokenizer_from"]):
            tokenizer = Tokenizer.load(place, trust=config["trust"])
            module = on_tokens_of(module, tokenizer)
            save_folder(tokenizer, out / "tokenizer")
        elif any(value.isnan().any() for name, value in module.state_dict().items() if name.startswith("quantizer.")):
            raise ValueError(f"{source} lacks the codebook that it reads: pass tokenizer_from=<run or folder of it>")
        save_folder(module, out, converted_from={"file": Path(source).name, "sha256": file_hash(source)})
    print(f"wrote {out}")
    return out


def arguments_of(path: str) -> dict[str, Any]:
    """The object that the JSON file of `config` holds."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"config={path} is no JSON file that can be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"config={path} holds no object: give {{class: {{argument: value}}}}")
    return found


def started(config: Any, state: Any, arguments: Any) -> Any:
    """An untrained tokenizer of configs/tokenizer whose pretrained part is the file's."""
    from omegaconf import OmegaConf

    from vtok.config import instantiate
    from vtok.convert.detailflow import start_from_siglip2
    from vtok.convert.flextok import convert_vae

    family, size = config["family"], config["image_size"]
    path = ROOT / "configs" / "tokenizer" / f"{config['start']}.yaml"
    if not path.is_file() or STARTS[family] not in path.read_text():
        named = f"one of configs/tokenizer/{'flextok' if family == 'flextok_vae' else 'detailflow'}_*"
        raise ValueError(f"family={family} needs start=<{named}>, got {config['start']}")
    section = OmegaConf.create({"data": {"image_size": size}, "tokenizer": OmegaConf.load(path)}).tokenizer
    if family == "siglip2":
        return start_from_siglip2(instantiate(section, _convert_="all"), state)
    if "scaling_factor" not in arguments:
        raise ValueError("family=flextok_vae needs config=<the config.json of the VAE>, for its scaling_factor")
    scale = arguments["scaling_factor"]
    print(f"train on it with init_from={config['out']} tokenizer.vae.quantizer.scale={scale} objective.pixel_weight=0")
    section.vae = None
    return instantiate(section, _partial_=True, _convert_="all")(vae=convert_vae(state, scale=scale, image_size=size))


def _save(loaded: Any, folder: Path, **extra: Any) -> None:
    from vtok.checkpoint import file_hash, save_folder

    entry = loaded.entry
    origin = {"zoo": entry.name, "place": entry.place, "licence": entry.licence, "sha256": file_hash(loaded.file)}
    save_folder(loaded.module, folder, converted_from=origin, **{k: v for k, v in extra.items() if v is not None})


if __name__ == "__main__":
    main()
