"""The images that an evaluation judges: files as they are, or a run that draws them while they are read.

A zoo model is drawn with its paper's settings unless the command says otherwise; what was taken is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eval.sources import Images, from_run, open_images

DEFAULT_IMAGES = 1000  # drawn from a run when `images` is not given
EVALUATED = 256  # px, of the ImageNet protocols


def results_folder(source: str) -> Path:
    """Where results about `from` go by default: into the run, or outputs/eval/<name> for models that have a name."""
    for prefix in ("zoo:", "hf:"):
        if source.startswith(prefix):
            return Path("outputs/eval", source.removeprefix(prefix).replace("/", "+"))
    path = Path(source)
    return (path if path.is_dir() else path.parent) / "eval"


def weights_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the weight file of `from`, without loading it."""
    from vgen.pipeline import local
    from vgen.sampling import checkpoint_hash
    from vtok.checkpoint import file_hash

    source = str(config["from"])
    if source.startswith("zoo:"):
        from vgen.published import entry_of, locate

        given = None if config["weights"] in ("ema", "raw", None) else config["weights"]
        return file_hash(locate(entry_of(source), given, accept_license=bool(config.get("accept_license", False))))
    return checkpoint_hash(local(source))


def sample_size(config: Mapping[str, Any]) -> int | None:
    """Side that drawn images are brought to: as asked, else as the paper of a zoo model evaluates it, else as drawn."""
    from vgen.sampling import published_evaluation

    if config.get("sample_size"):
        return int(config["sample_size"])
    known = published_evaluation(str(config["from"]))
    if not known.get("resize"):
        return None
    if known["resize"] != "bicubic":
        raise ValueError(f"{known['name']} was evaluated after {known['resize']}: pass sample_size=<side> for bicubic")
    print(f"{known['name']}: drawn at {known['image_size']} px, brought to {EVALUATED} px (bicubic) as in the paper")
    return EVALUATED


def samples_of(
    config: Mapping[str, Any], device: torch.device, pipeline: Any | None = None
) -> tuple[Images, dict[str, Any]]:
    """The images to judge, and the protocol's fields that say how they came about.

    pipeline: of `from`, where it is loaded already.
    """
    given = [key for key in ("samples", "from") if config[key]]
    if len(given) != 1:
        raise ValueError("give exactly one of samples=<npz or folder> and from=<run, exported folder or zoo:<name>>")
    if config["samples"]:
        images = open_images(config["samples"]).first(config["images"])
        facts = dict.fromkeys(("seed", "guidance", "rule", "weights"))
        return images, {**facts, "labels": "given", "rounding": "as stored", "source": images.name}
    from vgen.sampling import SPEED, load_pipeline, rule_and_guidance, settings

    drawn, size = settings(config), sample_size(config)
    pipeline = pipeline or load_pipeline(config, device)
    if drawn["steps"]:
        pipeline.generator.set_steps(int(drawn["steps"]))
    rule, guide = rule_and_guidance(drawn)
    pipeline.check(guide, rule)
    extra = "".join(f", {k} {v}" for k, v in drawn["schedule_options"].items())
    steps = "".join(f", {k} {drawn[k]}" for k in ("steps", "solver_steps", "solver") if drawn[k])
    speed = {k: config.get(k, usual) for k, usual in SPEED.items() if k != "cuda_graphs"}  # which draws the same
    said = "".join(f", {k} {v}" for k, v in speed.items() if v != SPEED[k])
    named = str(config["from"]).startswith("zoo:") and config["weights"] != "raw"
    hashed, count = weights_hash(config), int(config["images"] or DEFAULT_IMAGES)
    facts = {
        "seed": int(config["seed"]),
        "guidance": f"{drawn['schedule']} {float(drawn['guidance']):g}{extra}",
        "rule": f"temperature {rule.temperature:g}, top_k {rule.top_k}, top_p {rule.top_p:g}{steps}, "
        f"chunk {pipeline.chunk_of(count)}, {config['dtype']}{said}",
        "weights": "published" if named else config["weights"],
        "labels": config["labels"] if pipeline.generator.num_classes else "none",
        "rounding": "nearest" if size is None else f"nearest, after bicubic to {size} px",
        "source": f"{config['from']} (checkpoint sha256 {hashed})",
    }
    images = from_run(
        pipeline,
        name=str(config["from"]),
        count=count,
        plan=config["labels"],
        seed=int(config["seed"]),
        guidance=guide,
        rule=rule,
        size=size,
        identity=hashed,
    )
    return images, facts
