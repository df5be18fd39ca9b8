"""Encode and decode images of any size: the copies as PNG, the ids beside them, sizes kept.

    python scripts/reconstruct.py from=outputs/cifar10_tokenizer in=pictures out=outputs/copies

A picture is padded to whole tiles of the tokenizer's image size. With whole=true it is padded to the stride only and
computed at once, by tokenizers that have more tokens for a larger image. The padding is cut off again.

A run that was stopped goes on: images whose copy and ids are in `out` are measured as they are there, not made again,
unless their pixels changed or overwrite=true. `out` belongs to one tokenizer and one way to decode (recipe.json). Many
processes share the images under torchrun, as a SLURM array, or with task_id=0..n-1 num_tasks=n; each writes a report.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402


def made_of(ids: Path) -> tuple[str, str]:
    """The hashes of original and recipe that an .npz carries; empty where it is missing, damaged or has none."""
    import numpy as np

    try:
        with np.load(ids, allow_pickle=False) as arrays:
            return str(arrays["original_sha256"]), str(arrays["recipe_sha256"])
    except Exception:  # damage can raise anything
        return "", ""


@entry("reconstruct", ROOT / "configs", whole={"keep": 1})
def main(config: Any) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from eval.pixels import PixelErrors
    from eval.progress import progress_bar
    from vgen.sampling import resolve_device
    from vtok.checkpoint import weights_hash, write_atomic, write_json
    from vtok.config import describe
    from vtok.data.codes import frozen
    from vtok.data.extract import claim
    from vtok.data.files import BadImage, list_images, read_image
    from vtok.data.shards import id_of
    from vtok.data.tasks import task_from_environment
    from vtok.data.tiles import check_whole, reconstruct
    from vtok.data.transforms import to_float, to_uint8
    from vtok.decoding import light_tokenizer
    from vtok.noise import key

    task, tasks = task_from_environment(config.task_id, config.num_tasks, os.environ)
    source, out = Path(config["in"]), Path(config.out)
    names = [source.name] if source.is_file() else list_images(source, "in")
    folder = source.parent if source.is_file() else source
    if not names:
        raise ValueError(f"in={source} holds no images; change in")
    if config.on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={config.on_bad_image!r}: choose error or skip")
    check_place("out", out, folder=True)
    places = {}
    for name in names:
        place = out / Path(name).with_suffix("")
        if place in places:
            raise ValueError(
                f"{places[place]} and {name} would both become {place}.png; rename one, or pass one folder"
            )
        if place.with_name(place.name + ".png").resolve() == (folder / name).resolve():
            raise ValueError(f"out={out} would replace {folder / name} by its copy; give out=<another folder>")
        places[place] = name
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"out={out} lies in in={source}: run again, it would copy its copies; give out=<another folder>"
        )
    files = (place.with_name(place.name + ending) for place in places for ending in (".png", ".npz"))
    taken = next((file for file in files if file.exists()), None)
    if taken and not (out / "recipe.json").exists() and not config.overwrite:
        raise ValueError(f"{taken} is there and no copy of this command; give out=<another folder>, or overwrite=true")
    tokenizer = frozen(config["from"], config.weights, trust=config.trust).to(resolve_device(config.device))
    if config.keep is not None and not tokenizer.prefixes:
        raise ValueError(f"keep={config.keep}: {type(tokenizer).__name__} decodes whole images only; leave keep away")
    if config.whole:
        check_whole(tokenizer, config.keep)
    elif config.keep is not None:  # a number that the family does not decode raises before `out` is taken for it
        reconstruct(tokenizer, torch.zeros(3, 1, 1), keep=config.keep)
    if config.overwrite:
        (out / "recipe.json").unlink(missing_ok=True)
    identity = {"description": describe(tokenizer), "sha256": weights_hash(tokenizer.state_dict())}
    recipe = {"tokenizer": identity, "keep": config.keep, "seed": config.seed}
    if config.whole:
        recipe["whole"] = True
    if tokenizer.encoder_draws or tokenizer.decoder_draws:  # earlier versions drew the same for every picture
        recipe["noise"] = "keyed by name"
    recipe = claim(out, recipe, what="copies")  # as the folder has it: a later version goes on with the same hash
    light_tokenizer(tokenizer, torch.float32)  # its hash is taken
    recipe_hash = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    how = dict(batch=config.batch_size, keep=config.keep, whole=bool(config.whole))
    errors, bad, done, earlier = PixelErrors(), [], 0, 0

    def measure(original: np.ndarray, copy: np.ndarray) -> None:
        errors.add(*(torch.from_numpy(np.array(pixels))[None] for pixels in (original, copy)))

    mine = list(places.items())[task::tasks]
    with progress_bar("reconstructing", len(mine)) as advance:
        for place, name in mine:
            picture, ids = place.with_name(place.name + ".png"), place.with_name(place.name + ".npz")
            try:
                original = np.asarray(read_image(folder / name, upright=True))
            except BadImage as error:
                if config.on_bad_image == "error":
                    raise BadImage(f"{error}, or set on_bad_image=skip") from None
                bad.append(name)
                advance(1)
                continue
            hashes = hashlib.sha256(str(original.shape).encode() + original.tobytes()).hexdigest(), recipe_hash
            if picture.is_file() and made_of(ids) == hashes and not config.overwrite:
                earlier += 1
                measure(original, np.asarray(read_image(picture)))
                advance(1)
                continue
            image = to_float(original)
            copy, tokens, tiling = reconstruct(tokenizer, image, seed=key(config.seed, id_of(name)), **how)
            pixels = to_uint8(copy)
            shape = [tiling.height, tiling.width, tiling.side, tiling.rows, tiling.columns]
            arrays = {"tokens": tokens.numpy(), "height_width_side_rows_columns": np.array(shape)}
            arrays |= dict(zip(("original_sha256", "recipe_sha256"), map(np.array, hashes)))
            picture.unlink(missing_ok=True)  # ids and an older copy would be taken for a pair
            write_atomic(ids, lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
            made = Image.fromarray(pixels.numpy())
            write_atomic(picture, lambda file, made=made: made.save(file, "PNG"))
            measure(original, pixels.numpy())
            done += 1
            advance(1)
    figures = errors.result() if errors.count else {}
    report = {
        "tokenizer": str(config["from"]),
        "images": done,
        "finished_earlier": earlier,
        "unreadable": bad,
        "measured": errors.count,
        "ssim_images": errors.windowed,
        **figures,
    }
    write_json(out / ("report.json" if tasks == 1 else f"report_{task}_of_{tasks}.json"), report)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
    if errors.windowed < errors.count:
        shown += f", SSIM of {errors.windowed} of {errors.count}"
    print(f"{done} images reconstructed ({shown or 'none measured'}), {earlier} done earlier, {len(bad)} unreadable")
    for name in bad[:10]:
        print(f"  unreadable: {name}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
