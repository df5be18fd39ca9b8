"""The sampling command: which images to draw, drawing them chunk by chunk, and writing them with how they were made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vgen.chunks import Chunks, begun
from vgen.guidance import Guidance, guidance
from vgen.heads import DrawRule
from vgen.pipeline import Pipeline, local
from vgen.previews import Previews
from vtok.acceleration import SLOW_BF16, cpu_has_bf16, keep_memory
from vtok.checkpoint import file_hash, find_checkpoint, is_folder, read_config, write_atomic, write_json
from vtok.cli import check_numbers, check_place
from vtok.data.tasks import task_from_environment
from vtok.low_bit import SLOW_LOW_BIT
from vtok.noise import sample_seeds
from vtok.sharing import without_places

GRID_CLASSES = 10
FILES = (".png", ".npz")  # endings of out= that mean one file; anything else is a folder
SPEED = {  # keys of how weights are stored and run, with their defaults; kept in records
    "quant": None, "packed": None, "compile": False, "cuda_graphs": False, "decoder_dtype": "float32",
    "decode_chunk": None,
}  # fmt: skip
PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")  # which nobody means as a folder


def sample(config: Mapping[str, Any]) -> Path:
    """Run the command of configs/sample.yaml; returns the file or folder written."""
    check_numbers(config)
    out = Path(config["out"])
    task = task_from_environment(config.get("task_id"), config.get("num_tasks"), os.environ)
    single = out.suffix in FILES  # a dot in the name of a folder is no ending: outputs/cfg1.5
    if out.suffix.lower() in PICTURES:
        raise ValueError(f"out={out}: give <name>.png (a grid), <name>.npz, or a folder")
    if config.get("preview") and not single:
        raise ValueError("preview= goes with a grid or an npz file: give out=<name>.png")
    if task[1] > 1 and single:
        raise ValueError(f"out={out} is one file, and {task[1]} processes share the work: give out=<folder>")
    if out.exists() and not config["overwrite"] and single:
        raise ValueError(f"{out} exists; pass overwrite=true or another out=")
    if config.get("preview"):
        strip = Path(config["preview"])
        if strip.resolve() == out.resolve():
            raise ValueError(f"preview={strip} is out= too: give two files")
        if strip.exists() and not config["overwrite"]:
            raise ValueError(f"{strip} exists; pass overwrite=true or another preview=")
        check_place("preview", strip)
    check_place("out", out, folder=not single)
    device = resolve_device(config["device"])
    drawn = settings(config)
    rule, guide = rule_and_guidance(drawn)
    pipeline = load_pipeline(config, device)
    pipeline.check(guide, rule)  # before an older folder is emptied
    if drawn["steps"] is not None:
        pipeline.generator.set_steps(int(drawn["steps"]))
    given, sides = config.get("sides"), {}
    if given is not None:
        sides["sides"] = [given] if isinstance(given, (int, str)) else list(given)
        pipeline.set_sides(sides["sides"])
        if pipeline.generator.greedy_sides:
            sides["greedy_sides"] = list(pipeline.generator.greedy_sides)
            print(f"sides {sides['greedy_sides']} are none of the model's own: drawn greedily, as in the paper's code")
    known, names = pipeline.generator.num_classes, pipeline.class_names
    labels = plan(config["classes"], config["per_class"], config["num_images"], known, names, grid=out.suffix == ".png")
    seeds, chunk = sample_seeds(int(config["seed"]), 0, len(labels)), pipeline.chunk_of(len(labels))
    evaluation = published_evaluation(config["from"])
    preview = Previews(pipeline, config["preview"], seeds) if config.get("preview") else None
    record = {
        "command": "python sample.py " + without_places(" ".join(sys.argv[1:])),
        "from": without_places(str(config["from"])),
        "checkpoint_sha256": file_hash(pipeline.weight_file),
        "tokenizer_sha256": file_hash(pipeline.tokenizer_file),
        "weights": config["weights"],
        "num_images": len(labels),
        "classes": labels.tolist(),
        "seed": int(config["seed"]),
        "seeds": "vtok.noise.sample_seeds(seed, 0, num_images)",
        "dtype": config["dtype"],
        "chunk": chunk,
        **{k: config[k] for k in SPEED if k in config},
        **drawn,
        **sides,
        "device": device.type,
        "torch": torch.__version__,
        **({"evaluation": evaluation} if evaluation else {}),
    }
    if not single:
        if config["chunk"] is None:  # a folder begun in other chunks is finished in them
            record["chunk"] = chunk = begun(out, record) or chunk
        chunks = Chunks(out, labels, size=chunk, task=task)
        chunks.claim(record, overwrite=bool(config["overwrite"]))
        todo = chunks.left()
        with progress_bar(sum(stop - start for start, stop in todo)) as advance:
            for start, stop in todo:
                part = pipeline(labels[start:stop], seeds[start:stop], guidance=guide, rule=rule, chunk=chunk)
                chunks.write(start, part.numpy())
                advance(len(part))
        made, there = sum(stop - start for start, stop in todo), len(labels) - chunks.missing()
        rest = "" if there == len(labels) else f", {there} of {len(labels)} are there"
        print(f"wrote {made} images to {out}{rest}")
        return out
    with progress_bar(len(labels)) as advance:
        images = pipeline(
            labels, seeds, guidance=guide, rule=rule, on_chunk=lambda start, part: advance(len(part)), on_tokens=preview
        ).numpy()
    write(out, images, labels, names, record)
    if preview is not None:
        preview.write(images)
    print(f"wrote {len(images)} images to {out}")
    return out


def load_pipeline(config: Mapping[str, Any], device: torch.device) -> Pipeline:
    """The generator of `from` with its tokenizer, for sampling: stored and run as the keys of SPEED say, or by default.
    Says what is slow or slow to start."""
    speed = SPEED | {k: config[k] for k in SPEED if k in config}
    kinds = {"dtype": config["dtype"], "decoder_dtype": speed["decoder_dtype"]}
    dtypes = {k: resolve_dtype(v) for k, v in kinds.items()}
    rounded = [k for k, v in dtypes.items() if v == torch.bfloat16]
    if device.type == "cpu" and rounded and not cpu_has_bf16():
        print(SLOW_BF16.format(" ".join(f"{k}=float32" for k in rounded)), flush=True)
    chunk = config.get("chunk")
    pipeline = Pipeline.load(
        config["from"],
        weights=config["weights"],
        tokenizer=config["tokenizer_from"],
        device=device,
        chunk=None if chunk is None else int(chunk),
        accept_license=bool(config.get("accept_license", False)),
        trust=config.get("trust") or (),
        quant=speed["quant"],
        packed=speed["packed"],
        compile=bool(speed["compile"]),
        cuda_graphs=bool(speed["cuda_graphs"]),
        decode_chunk=speed["decode_chunk"],
        **dtypes,
    )
    if speed["quant"] and not speed["compile"]:
        print(SLOW_LOW_BIT.format(speed["quant"]), flush=True)
    if speed["compile"]:
        print("compile=true: the first steps take half a minute, less where PyTorch kept what it compiled", flush=True)
    return pipeline


PLAIN = {"guidance": 1.0, "schedule": "constant", "schedule_options": {}, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
PLAIN |= {"steps": None, "solver_steps": None, "solver": None}


def settings(config: Mapping[str, Any], *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """How to draw: what the config says, else what the paper of a zoo model says (printed), else PLAIN.

    A schedule given without schedule_options has none: the paper's belong to its own schedule. guidance=1 is off, and
    the paper's schedule goes with it. Raises ValueError for steps below 1, and for a schedule of the guidance where
    there is none.
    """
    chosen, found = {k: config.get(k) for k in PLAIN}, dict(PLAIN)
    name, paper = published_settings(config.get("from"))
    if paper:
        found |= paper
        if chosen["schedule"] is not None:
            found["schedule_options"] = {}
        elif chosen["guidance"] == 1 and chosen["schedule_options"] is None:
            found |= {"schedule": "constant", "schedule_options": {}}
    found |= {k: v for k, v in chosen.items() if v is not None}
    if not isinstance(found["schedule_options"], Mapping):
        raise ValueError(f"schedule_options={found['schedule_options']}: give {{option: value}}")
    found["schedule_options"] = dict(found["schedule_options"])
    moved = found["schedule"] != "constant" or found["schedule_options"]
    if moved and chosen["guidance"] is None and rule_and_guidance(found)[1].streams == 1:
        given = " ".join(f"{k}={chosen[k]}" for k in ("schedule", "schedule_options") if chosen[k])
        raise ValueError(f"{given} has no effect without guidance: pass guidance=<scale>, or leave it away")
    if found["steps"] is not None and int(found["steps"]) < 1:
        raise ValueError(f"steps={found['steps']}: at least one step is taken; null = as many as the model says")
    if name:
        mine = ", ".join(k for k, v in chosen.items() if v is not None)
        shown = ", ".join(f"{k}={v}" for k, v in found.items() if v is not None and v != {})
        source = "the paper's settings" if paper else "no settings of this model are published"
        say(f"{name}: {shown} ({source}{f'; yours: {mine}' if mine else ''})")
    return found


def published_settings(source: str | os.PathLike | None) -> tuple[str, dict[str, Any]]:
    """(name, the paper's settings or {}) of a zoo model, or of a folder (also on the hub) that scripts/convert.py wrote
    from one."""
    if str(source).startswith("zoo:"):
        from vgen.published import entry_of

        entry = entry_of(source)
        return entry.name, dict(getattr(entry, "sampling", None) or {})
    described = _described(source)
    return str((described.get("converted_from") or {}).get("zoo") or ""), dict(described.get("sampling") or {})


def published_evaluation(source: str | os.PathLike) -> dict[str, Any]:
    """What a zoo model, or a folder converted from one, was reported with: size, how it was brought to 256 px,
    evaluator, FID. Empty for others."""
    name, _ = published_settings(source)
    if not name:
        return {}
    from vgen.published import entry_of

    entry = entry_of(f"zoo:{name}")
    names = ("image_size", "resize", "evaluator", "fid", "inception_score", "source")
    return {"name": entry.name, **{name: getattr(entry, name, None) for name in names}}


def _described(source: str | os.PathLike | None) -> dict[str, Any]:
    """config.json of an exported folder, here or on the hub; {} for anything else."""
    place = None if source is None else local(source)
    return read_config(place) if place is not None and is_folder(place) else {}


def rule_and_guidance(drawn: Mapping[str, Any]) -> tuple[DrawRule, Guidance]:
    """What the keys temperature, top_k, top_p, solver, solver_steps, guidance, schedule and schedule_options say."""
    solver = {"solver_steps": drawn.get("solver_steps"), "solver": drawn.get("solver")}
    rule = DrawRule(float(drawn["temperature"]), int(drawn["top_k"]), float(drawn["top_p"]), **solver)
    return rule, guidance(float(drawn["guidance"]), drawn["schedule"], **drawn["schedule_options"])


def plan(
    classes: Sequence[int | str] | int | str | None,
    per_class: int,
    num_images: int | None,
    known: int,
    names: Sequence[str],
    *,
    grid: bool,
) -> Tensor:
    """Labels int64 [N] in the order they are drawn: class by class, or balanced round-robin with num_images."""
    if per_class < 1 or (num_images is not None and num_images < 1):
        raise ValueError(f"per_class={per_class}, num_images={num_images}: at least one image is drawn")
    if known == 0:
        if classes is not None:
            raise ValueError("this model is unconditional: leave out classes=")
        return torch.zeros(num_images or per_class, dtype=torch.int64)
    if classes is None:
        chosen = list(range(known if not grid or num_images else min(known, GRID_CLASSES)))
    else:
        listed = [classes] if isinstance(classes, (int, str)) else list(classes)
        chosen = [_class_index(c, known, names) for c in listed]
    if not chosen:
        raise ValueError("classes=[] names no class; leave it out for all")
    if num_images is not None:
        return torch.tensor(chosen).repeat(-(-num_images // len(chosen)))[:num_images]
    return torch.tensor(chosen).repeat_interleave(per_class)


def _class_index(value: int | str, known: int, names: Sequence[str]) -> int:
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    if isinstance(value, int) and 0 <= value < known:
        return value
    shown = f" or a name ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""
    raise ValueError(f"unknown class {value!r}: choose 0..{known - 1}{shown}")


def write(out: Path, images: np.ndarray, labels: Tensor, names: Sequence[str], record: Mapping[str, Any]) -> None:
    """Images uint8 [N, H, W, 3] as the ending of `out` (of FILES) says, with the record beside them."""
    if out.suffix == ".png":
        picture = labelled_grid(images, labels.tolist(), names)
        write_atomic(out, lambda file: picture.save(file, "PNG"))
    else:
        write_atomic(out, lambda file: np.savez_compressed(file, arr_0=images, arr_1=labels.numpy()))
    write_json(out.with_suffix(".metadata.json"), record)


def labelled_grid(
    images: np.ndarray, labels: Sequence[int], names: Sequence[str] = (), columns: int = 8
) -> Image.Image:
    """One row a class (or several, of `columns` images) in the order in which classes first come, the class's name on
    the left. images: uint8 [N, H, W, 3]."""
    order = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    rows: list[tuple[int, list[np.ndarray]]] = []
    for image, label in sorted(zip(images, labels), key=lambda pair: order[pair[1]]):
        if not rows or rows[-1][0] != label or len(rows[-1][1]) == columns:
            rows.append((label, []))
        rows[-1][1].append(image)
    height, width = images.shape[1:3]
    zoom = max(1, 64 // height)
    cell_h, cell_w, gap = height * zoom, width * zoom, 2
    texts = [f"{names[label]}" if names and label < len(names) else f"{label}" for label, _ in rows]
    margin = 12 + 6 * max(len(text) for text in texts)
    wide = max(len(row) for _, row in rows)
    canvas = Image.new("RGB", (margin + wide * (cell_w + gap), len(rows) * (cell_h + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for r, ((_, row), text) in enumerate(zip(rows, texts)):
        pen.text((6, r * (cell_h + gap) + cell_h // 2 - 6), text, fill="black")
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + c * (cell_w + gap), r * (cell_h + gap)))
    return canvas


def resolve_device(name: str) -> torch.device:
    """auto picks cuda, then mps, then cpu; a device that is not there is an error. cuda without a number is the GPU of
    this process: torchrun gives each process one. On the CPU the process keeps what memory it frees
    (vtok/acceleration.py)."""
    device = _device(name)
    if device.type == "cpu":
        keep_memory()
    return device


def _device(name: str) -> torch.device:
    if str(name) in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("mps" if have["mps"] else "cpu")
    kind = str(name).split(":")[0]
    if kind not in have:
        raise ValueError(f"device={name!r}: choose auto, cpu, cuda or mps")
    if not have[kind]:
        raise ValueError(f"device={name}: torch sees no {kind} device here; choose device=cpu or auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device={name!r}: choose auto, cpu, cuda or mps, or one of several by cuda:<number>"
        ) from None
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: torch sees {torch.cuda.device_count()}; choose cuda:0 and so on, or auto")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise ValueError(f"dtype={name!r}: choose {' or '.join(kinds)}")
    return kinds[name]


def checkpoint_hash(path: str | os.PathLike) -> str:
    """SHA-256 of the weight file that `path` means."""
    file = Path(path) / "model.safetensors" if is_folder(path) else find_checkpoint(path)
    return file_hash(file)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, silence otherwise; yields advance(n)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("drawing", total=total)
        yield lambda n: progress.advance(task, n)
