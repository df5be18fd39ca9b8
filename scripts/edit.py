"""Draw a part of an image anew: in-painting, out-painting, another class, the same prefix, another image's style.

    python scripts/edit.py from=outputs/cifar10_var image=cat.png mask=mask.png task=inpaint composite=true out=edit.png

White in the mask is drawn anew, black is kept. Beside the edit stands a sheet: original | mask | edited (| composite).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, check_whole_number, entry  # noqa: E402

TASKS = ("inpaint", "outpaint", "class", "prefix", "style")
TINT = (255, 0, 255)  # of what is drawn anew, in the sheet
DRAWING = (
    "guidance",
    "schedule",
    "schedule_options",
    "temperature",
    "top_k",
    "top_p",
    "steps",
    "solver_steps",
    "solver",
)


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the keys that the task needs are given, and no others."""
    task = config["task"]
    if task not in TASKS:
        raise ValueError(f"task={task!r}: choose {', '.join(TASKS)}")
    needed = {"prefix": ("keep",), "style": ("style",), "class": ("class",)}.get(task, ())
    foreign = {"keep": ("prefix",), "style": ("style",), "mask": TASKS[:3], "box": TASKS[:3], "keep_scales": TASKS[:3]}
    foreign |= dict.fromkeys(DRAWING, TASKS[:4])
    for name in needed:
        if config[name] is None:
            raise ValueError(f"task={task} needs {name}=")
    for name, tasks in foreign.items():
        if config[name] is not None and task not in tasks:
            raise ValueError(f"{name}= belongs to task={' or '.join(tasks)}; leave it away for task={task}")
    if task in TASKS[:3] and (config["mask"] is None) == (config["box"] is None):
        raise ValueError(f"task={task} needs mask= (white = drawn anew) or box=[left,top,right,bottom], one of them")
    if task in TASKS[3:] and config["composite"]:
        raise ValueError(f"composite=true needs a region that is kept; task={task} has none")
    for name, least in (("count", 1), ("keep", 0), ("keep_scales", 0)):
        if config[name] is not None:
            check_whole_number(name, config[name], least)
    if task == "style" and (config["class"] is not None or config["count"] != 1):
        raise ValueError("task=style draws nothing: leave class= and count= away")
    if config["box"] is not None:
        box = list(config["box"]) if isinstance(config["box"], Sequence) else []
        numbers = len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(
                f"box={config['box']}: give [left, top, right, bottom] as shares with left < right and top < bottom"
            )


def check_files(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the pictures that are given can be read, and the mask has the image's size."""
    from vtok.data.files import read_image

    sizes = {name: read_image(config[name], upright=True).size for name in ("image", "mask", "style") if config[name]}
    if sizes.get("mask", sizes["image"]) != sizes["image"]:
        mask, image = f"mask={config['mask']} is {sizes['mask']}", f"the image {sizes['image']}"
        raise ValueError(f"{mask}, {image}: they must be one size")


def cropped(path: str, size: int) -> Any:
    """uint8 [size, size, 3], the centre of the upright image at `path`."""
    import numpy as np

    from vtok.data.files import read_image
    from vtok.data.transforms import center_crop

    return np.asarray(center_crop(read_image(path, upright=True), size)).copy()


def kept_pixels(config: Mapping[str, Any], size: int) -> Any:
    """bool [size, size]: the pixels that are kept. Raises ValueError where that is all of them."""
    import torch

    if config["mask"] is not None:
        kept = torch.from_numpy(cropped(config["mask"], size).mean(2) < 127.5)
    else:
        left, top, right, bottom = (round(value * size) for value in config["box"])
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        kept = inside if config["task"] == "outpaint" else ~inside
    if bool(kept.all()):
        name = "box" if config["mask"] is None else "mask"
        how = (
            "white is drawn anew" if name == "mask" else "outpaint draws what is outside it, other tasks what is in it"
        )
        raise ValueError(f"{name}={config[name]} leaves no pixel of {size} x {size} to draw anew: {how}")
    return kept


def edits(out: Path, count: int) -> list[Path]:
    """The files of `count` edits."""
    return [out if i == 0 else out.with_stem(f"{out.stem}_{i}") for i in range(count)]


def edit(config: Mapping[str, Any]) -> Path:
    """The command of configs/edit.yaml; returns the file written."""
    import torch
    from PIL import Image

    from vgen import editing
    from vgen.previews import tiled
    from vgen.sampling import load_pipeline, plan, resolve_device, rule_and_guidance, settings
    from vtok.checkpoint import file_hash, write_atomic, write_json
    from vtok.data.transforms import to_float, to_uint8
    from vtok.noise import SampleNoise, sample_seeds

    check(config)
    out, task, count = Path(config["out"]), config["task"], config["count"]
    check_place("out", out, endings=(".png",))
    if config["class"] is None and config["guidance"] not in (None, 1):
        raise ValueError("guidance needs class=: without a class both of its rows are the same; pass guidance=1")
    for name in ("schedule", "schedule_options"):
        if config["class"] is None and config[name]:
            raise ValueError(f"{name}={config[name]} is of the guidance, which needs class=: leave it away")
    check_files(config)
    written = {path.resolve() for path in (*edits(out, count), out.with_stem(f"{out.stem}_sheet"))}
    for name in ("image", "mask", "style"):
        if config[name] and Path(config[name]).resolve() in written:
            raise ValueError(f"out={out} would replace {name}={config[name]}; give another out=")
    drawn = settings({} if task == "style" else config)  # which draws nothing
    if config["class"] is None:
        drawn |= {"guidance": 1.0, "schedule": "constant", "schedule_options": {}}
    rule, guide = rule_and_guidance(drawn)
    pipeline = load_pipeline(config, resolve_device(config["device"]))
    pipeline.check(guide, rule)
    generator, tokenizer = pipeline.generator, pipeline.tokenizer
    if config["class"] is not None and generator.num_classes == 0:
        raise ValueError(f"class={config['class']}: this model is unconditional: leave class= away (task=inpaint)")
    if drawn["steps"] is not None:
        generator.set_steps(int(drawn["steps"]))
    if config["keep_scales"] and len(generator.spec.layout.sides) == 1:
        raise ValueError(f"keep_scales={config['keep_scales']}: this model's tokens have one scale; leave it away")
    size = generator.spec.image_size
    original = cropped(config["image"], size)
    keep = kept_pixels(config, size) if task in TASKS[:3] else None

    def encoded(pixels: Any) -> Any:
        return tokenizer.encode(to_float(pixels)[None].to(pipeline.device))

    tokens = encoded(original).repeat(count, *[1] * (1 if tokenizer.spec.discrete else 2))
    seeds = sample_seeds(int(config["seed"]), 0, count)
    labels = torch.full((count,), generator.num_classes)
    if config["class"] is not None:
        labels = plan([config["class"]], count, None, generator.num_classes, pipeline.class_names, grid=False)
    if task == "style":
        style = cropped(config["style"], size)
        tokens = editing.swap_parts(tokenizer.spec, tokens, encoded(style))
        edited = to_uint8(pipeline.decode(tokens, seeds)).cpu()
    else:
        noise = SampleNoise(seeds.to(pipeline.device))
        if task == "prefix":
            canvas = editing.prefix(generator, tokens, noise, config["keep"], rule.temperature)
        else:
            scales = 1 if config["keep_scales"] is None else config["keep_scales"]
            canvas = editing.region(generator, tokens, noise, keep.to(pipeline.device), scales, rule.temperature)
            if canvas.known is not None and bool(canvas.known.all()):
                raise ValueError("no token has half of its cell or more in the region to draw anew: make it larger")
        edited = editing.complete(pipeline, canvas, labels, seeds, guide=guide, rule=rule)
    columns = {"original": [original] * count}
    if keep is not None:
        tint = original // 2 + torch.tensor(TINT, dtype=torch.uint8).numpy() // 2
        columns["mask"] = [torch.where(keep[..., None], *map(torch.from_numpy, (original, tint))).numpy()] * count
    if task == "style":
        columns["style"] = [style]
    columns["edited"] = list(edited.numpy())
    if config["composite"]:
        edited = editing.composite(edited, torch.from_numpy(original), keep)
        columns["composite"] = list(edited.numpy())
    for path, pixels in zip(edits(out, len(edited)), edited.numpy(), strict=True):
        picture = Image.fromarray(pixels)
        write_atomic(path, lambda file, picture=picture: picture.save(file, "PNG"))
    sheet = tiled(list(zip(*columns.values())), list(columns))
    write_atomic(out.with_stem(f"{out.stem}_sheet"), lambda file: sheet.save(file, "PNG"))
    names = ("from", "image", "task", "mask", "class", "keep", "keep_scales", "style", "composite", "count", "seed")
    names += ("weights", "dtype")
    record = {name: config[name] for name in names} | ({} if task == "style" else drawn)
    record |= {"box": None if config["box"] is None else list(config["box"])}
    record |= {"command": "python scripts/edit.py " + " ".join(sys.argv[1:])}
    write_json(out.with_suffix(".metadata.json"), record | {"checkpoint_sha256": file_hash(pipeline.weight_file)})
    print(f"wrote {out} and {out.stem}_sheet.png")
    return out


@entry("edit", ROOT / "configs", whole={"count": 1})
def main(config: Any) -> None:
    edit(config)


if __name__ == "__main__":
    main()
