"""`python -m eval.vtbench`: a tokenizer on pictures that show what it loses: any pictures, fine detail, text.

    python -m eval.vtbench from=outputs/my_tokenizer pictures=photos detail=textures text=posters
    python -m eval.vtbench from=zoo:llamagen-vq16 detail=textures fit=tiles out=outputs/vtbench.json

The three tasks of VTBench (Lin et al. 2025, arXiv 2505.13439) on folders of yours. Every task: PSNR, SSIM, LPIPS where
its files are, and the share of fine detail that is left. Text: character and word error rates of what an OCR program
reads, on the copies and on the originals, since the program errs on those too. What differs from VTBench: pictures are
local, turned as their EXIF orientation says unless upright=false, a program and not a language model reads, 8-bit
rounding is to the nearest unless rounding=truncate, and there is no rFID, which a hundred pictures cannot give
(eval.reconstruction measures it on whole sets).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.drawing import results_folder, weights_hash
from eval.fid import CONFIGS
from eval.ocr import MISSING, ErrorRates, find_reader
from eval.pixels import SIGMA, WINDOW, PixelErrors
from eval.progress import progress_bar
from vtok.checkpoint import write_atomic, write_json
from vtok.cli import check_json, check_numbers, check_place, entry

TASKS = ("pictures", "detail", "text")
FITS = ("crop", "pad", "tiles")


def fine(images: Tensor) -> Tensor:
    """What a Gaussian blur (sigma 1.5, 11 x 11) takes away from images [B, C, H, W]; borders are reflected."""
    from torch.nn import functional

    place = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    bell = torch.exp(-(place**2) / (2 * SIGMA**2))
    bell, channels = bell / bell.sum(), images.shape[1]
    x = functional.pad(images, (WINDOW // 2,) * 4, mode="reflect")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = functional.conv2d(x, bell.view(shape).expand(channels, 1, *bell.view(shape).shape[2:]), groups=channels)
    return images - x


class Detail:
    """Energy of fine structure over a set. kept: that of the copies over that of the originals (1 = as much, 0 = none
    left, above 1 = invented); error: that of the difference over that of the originals (0 = the same structure)."""

    def __init__(self) -> None:
        self.original = self.copy = self.difference = 0.0

    def add(self, original: Tensor, copy: Tensor) -> None:
        """uint8 [B, H, W, 3]; left out where a side is below that of the blur."""
        if min(original.shape[1:3]) < WINDOW:
            return
        a, b = (fine(x.permute(0, 3, 1, 2).double() / 255) for x in (original, copy))
        self.original += float(a.square().sum())
        self.copy += float(b.square().sum())
        self.difference += float((a - b).square().sum())

    def result(self) -> dict[str, float]:
        if self.original == 0:
            return {}  # pictures of one colour have no detail to keep
        return {"detail_kept": self.copy / self.original, "detail_error": self.difference / self.original}


def fitted(picture: Any, side: int, fit: str) -> Any:
    """A PIL picture as the tokenizer gets it, LANCZOS: crop covers side x side and cuts the middle, pad shrinks or
    enlarges it to fit inside, tiles leaves it as it is."""
    from PIL import Image

    if fit == "tiles":
        return picture
    width, height = picture.size
    scale = side / (min if fit == "crop" else max)(width, height)
    size = [max(1, round(width * scale)), max(1, round(height * scale))]
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    if fit == "pad":
        return picture
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return picture.crop((left, top, left + side, top + side))


def to_bytes(image: Tensor, rounding: str) -> Tensor:
    """uint8 [H, W, 3] of float [3, H, W] in [-1, 1]; truncate cuts off, as VTBench does (0.5 grey levels darker)."""
    from vtok.data.transforms import to_uint8

    if rounding == "nearest":
        return to_uint8(image)
    return ((image.clamp(-1, 1) + 1) * 127.5).floor().to(torch.uint8).permute(1, 2, 0)


def text_of(picture: Path) -> Path:
    """The file that holds the text of a picture."""
    return picture.with_suffix(".txt")


def listed(task: str, folder: Path, *, read: bool) -> list[str]:
    """The pictures of a folder. ValueError where there are none, or, where they are to be read, a text is missing."""
    from vtok.data.files import list_images

    names = list_images(folder, task)
    if not names:
        raise ValueError(f"{task}={folder} holds no images")
    for name in names if read else ():
        if not (truth := text_of(folder / name)).is_file():
            raise ValueError(f"{truth} is missing: it holds the text of {name}; ocr=none measures pixels only")
    return names


def measure_task(
    task: str, names: Sequence[str], tokenizer: Any, config: Mapping[str, Any], reader: Any, lpips: Any
) -> dict[str, Any]:
    """Figures of the pictures `names` of one folder, keys without the task's name; saves original and copy side by side
    where asked. SSIM and detail are of those that the window of 11 fits, LPIPS of those of 16 pixels and more."""
    from PIL import Image

    from vtok.data.files import read_image
    from vtok.data.tiles import reconstruct
    from vtok.data.transforms import to_float
    from vtok.losses.reconstruction import LEAST_SIDE

    folder = Path(config[task])
    pixels, detail, perceptual, compared = PixelErrors(), Detail(), 0.0, 0
    rates = {"": ErrorRates(), "_originals": ErrorRates()}
    with progress_bar(task, len(names)) as advance:
        for n, name in enumerate(names):
            picture = read_image(folder / name, upright=config["upright"])
            shown = np.asarray(fitted(picture, tokenizer.spec.image_size, config["fit"]))
            decoded, _, _ = reconstruct(tokenizer, to_float(shown), batch=int(config["batch_size"]), seed=n)
            original, copy = torch.from_numpy(shown.copy())[None], to_bytes(decoded, config["rounding"])[None]
            pixels.add(original, copy)
            detail.add(original, copy)
            if lpips is not None and min(shown.shape[:2]) >= LEAST_SIDE:
                both = [to_float(x, channels_last=True) for x in (copy, original)]
                perceptual += float(lpips(*both))
                compared += 1
            if reader is not None:
                truth = text_of(folder / name)
                for side, image in (("", copy), ("_originals", original)):
                    rates[side].add(truth.read_text(encoding="utf-8"), reader(image[0].numpy()))
            if config["save"]:
                pair = Image.fromarray(np.concatenate([shown, copy[0].numpy()], axis=1))
                place = Path(config["save"], task, name).with_suffix(".png")
                write_atomic(place, lambda file, pair=pair: pair.save(file, "PNG"))
            advance(1)
    found: dict[str, Any] = {"count": len(names)} | pixels.result() | {"ssim_images": pixels.windowed} | detail.result()
    if compared:
        found |= {"lpips_vgg": perceptual / compared, "lpips_images": compared}
    if reader is not None:
        found |= {name + side: value for side, rate in rates.items() for name, value in rate.result().items()}
    return found


def load_tokenizer(config: Mapping[str, Any]) -> Any:
    """Of a run, checkpoint, exported folder, or zoo:<name>."""
    from vtok.data.codes import frozen

    source = str(config["from"])
    if not source.startswith("zoo:"):
        return frozen(source, config["weights"], trust=config.get("trust") or ())
    from vgen.published import entry_of, load_entry
    from vtok.zoo import TOKENIZERS

    given = None if config["weights"] in ("ema", "raw", None) else config["weights"]
    accept = bool(config.get("accept_license", False))
    return frozen(load_entry(entry_of(source, TOKENIZERS), given, accept_license=accept).module)


def evaluate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The command: measures the tasks whose folders are given, prints, writes JSON; returns what it wrote."""
    from eval.reconstruction import perceptual_distance
    from vgen.sampling import resolve_device

    folders = {task: Path(config[task]) for task in TASKS if config[task]}
    if not folders:
        raise ValueError(f"give a folder of pictures: {', '.join(f'{task}=<folder>' for task in TASKS)}")
    for key, known in (("fit", FITS), ("rounding", ("nearest", "truncate"))):
        if config[key] not in known:
            raise ValueError(f"{key}={config[key]}: choose {', '.join(known)}")
    check_numbers(config)
    out = Path(config["out"] or results_folder(str(config["from"])) / "vtbench.json")
    check_json("out", out)
    check_place("save", config["save"], folder=True)
    languages = [config["languages"]] if isinstance(config["languages"], str) else list(config["languages"])
    reader = find_reader(str(config["ocr"]), languages) if "text" in folders else None
    if "text" in folders and reader is None and config["ocr"] != "none":
        print(f"text: pixels only, {MISSING}")
    if config["save"] and Path(config["save"]).resolve() in [folder.resolve() for folder in folders.values()]:
        raise ValueError(f"save={config['save']} is a folder of the pictures: give another save=")
    names = {task: listed(task, folder, read=reader is not None and task == "text") for task, folder in folders.items()}
    tokenizer = load_tokenizer(config).to(resolve_device(config["device"]))
    lpips = perceptual_distance(config["lpips"], config["lpips_path"])
    metrics: dict[str, Any] = {}
    for task in folders:
        read = reader[1] if reader and task == "text" else None
        found = measure_task(task, names[task], tokenizer, config, read, lpips)
        metrics |= {f"{task}_{name}": value for name, value in found.items()}
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    result = {
        "metrics": metrics,
        "tokenizer": f"{config['from']} (sha256 {weights_hash(config)})",
        "weights": config["weights"],
        "image_size": tokenizer.spec.image_size,
        "folders": {task: str(folder) for task, folder in folders.items()},
        "ocr": reader[0] if reader else "none",
        **{key: config[key] for key in ("fit", "rounding", "upright")},
        "command": "python -m eval.vtbench " + " ".join(sys.argv[1:]),
    }
    print("\n".join(f"  {key}: {result[key]}" for key in ("tokenizer", "image_size", "fit", "rounding", "ocr")))
    write_json(out, result)
    print(f"wrote {out}")
    return result


@entry("eval_vtbench", CONFIGS, texts=("pictures", "detail", "text", "save", "ocr"), lists=("languages",))
def main(config: Any) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()
