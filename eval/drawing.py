"""The images that an evaluation judges: files as they are, or a run that draws them while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from eval.sources import Images, from_run, open_images

DEFAULT_IMAGES = 1000  # drawn from a run when `images` is not given


def load_pipeline(config: Mapping[str, Any], device: torch.device) -> Any:
    """The generator of `from` with its tokenizer."""
    from vgen.pipeline import Pipeline
    from vgen.sampling import resolve_dtype

    pipeline = Pipeline.load(
        config["from"],
        weights=config["weights"],
        tokenizer=config["tokenizer_from"],
        device=device,
        dtype=resolve_dtype(config["dtype"]),
        chunk=int(config["chunk"]),
        trust=config.get("trust") or (),
    )
    if config.get("steps"):
        pipeline.generator.set_steps(int(config["steps"]))
    return pipeline


def samples_of(
    config: Mapping[str, Any], device: torch.device, pipeline: Any | None = None
) -> tuple[Images, dict[str, Any]]:
    """The images to judge, and the protocol's fields that say how they came about.

    pipeline: of `from`, where it is loaded already.
    """
    given = [key for key in ("samples", "from") if config[key]]
    if len(given) != 1:
        raise ValueError("give exactly one of samples=<npz or folder> and from=<run or exported folder>")
    if config["samples"]:
        images = open_images(config["samples"]).first(config["images"])
        facts = dict.fromkeys(("seed", "guidance", "rule", "weights"))
        return images, {**facts, "labels": "given", "rounding": "as stored", "source": images.name}
    from vgen.sampling import checkpoint_hash, rule_and_guidance

    pipeline = pipeline or load_pipeline(config, device)
    rule, guide = rule_and_guidance(config)
    scale, schedule, options = float(config["guidance"]), config["schedule"], dict(config["schedule_options"])
    extra = "".join(f", {k} {v}" for k, v in options.items())
    steps = "".join(f", {k} {config.get(k)}" for k in ("steps", "solver_steps", "solver") if config.get(k))
    hashed = checkpoint_hash(config["from"])
    facts = {
        "seed": int(config["seed"]),
        "guidance": f"{schedule} {scale:g}{extra}",
        "rule": f"temperature {rule.temperature:g}, top_k {rule.top_k}, top_p {rule.top_p:g}{steps}, "
        f"chunk {config['chunk']}, {config['dtype']}",
        "weights": config["weights"],
        "labels": config["labels"] if pipeline.generator.num_classes else "none",
        "rounding": "nearest",
        "source": f"{config['from']} (checkpoint sha256 {hashed})",
    }
    images = from_run(
        pipeline,
        name=str(config["from"]),
        count=int(config["images"] or DEFAULT_IMAGES),
        plan=config["labels"],
        seed=int(config["seed"]),
        guidance=guide,
        rule=rule,
        identity=hashed,
    )
    return images, facts
