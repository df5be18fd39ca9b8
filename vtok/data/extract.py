"""Encode a data set once: the driver behind scripts/cache_codes.py.

The work is a list of shards; process t of n takes every n-th one, skips those that are finished and intact, and
never talks to the others. Whoever finds a split complete writes its manifest; doing so twice writes the same bytes. A
batch never spans two shards, so a restart computes exactly what the killed run would have.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vtok.checkpoint import is_folder, read_config, save_folder, weights_hash, write_json
from vtok.config import completed, describe, differences, imported
from vtok.data.codes import spec_at
from vtok.data.module import ImageData
from vtok.data.shards import Crops, dtype_of, finished, id_of, pack, write_manifest, write_shard
from vtok.data.sources import Source, name_given, sizes_hash
from vtok.data.transforms import center_crop, mirror, ten_crop, to_float, to_rgb
from vtok.decoding import encode_images, light_tokenizer
from vtok.models import FAMILIES
from vtok.noise import SampleNoise, key
from vtok.tokenizer import Tokenizer, TokenSpec

# count: crops per image; centre: which one is the plain centre crop; wide: side before cropping over image side
CROPS: dict[str, dict] = {
    "none": {"name": "none", "count": 1, "centre": 0, "wide": 1.0},
    "flip": {"name": "flip", "count": 2, "centre": 0, "wide": 1.0},
    "ten": {"name": "ten", "count": 10, "centre": 4, "wide": 1.1},
}


def extract(
    data: ImageData,
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    crops: Crops = "none",
    batch: int = 32,
    shard_size: int = 16384,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    task: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> bool:
    """Write the codes of both splits of `data` to `out`; the held-out split gets the centre crop only.

    batch: images encoded at once (times the crops). task: (this one, of how many). Returns whether all shards of all
    tasks are there now. Raises ValueError where `out` holds codes of another recipe.
    """
    if crops not in CROPS:
        raise ValueError(f"crops={crops!r}: choose none, flip or ten")
    if data.transform.crop == "var":
        raise ValueError(f"crops={crops} are ADM's, which data.crop=var does not change: leave data.crop=center")
    if batch < 1 or shard_size < 1:
        raise ValueError(f"batch={batch} and shard_size={shard_size} must be at least 1")
    if crops == "ten" and not data.sources.train.native:
        raise ValueError("crops=ten needs whole images, but the cache holds centre crops: set data.cache=false")
    out, spec = Path(out), spec_at(tokenizer, data.image_size)
    sources = {"train": (data.sources.train, CROPS[crops]), "val": (data.sources.val, CROPS["none"])}
    identity = {"description": describe(tokenizer), "sha256": weights_hash(tokenizer.state_dict())}
    common = {
        "tokenizer": identity,
        "spec": spec.to_config(),
        "image_size": data.image_size,
        "dtype": dtype_of(spec, dtype),
        "class_names": data.class_names,
    }
    recipe = {"crops": crops, "shard_size": shard_size, "data": {s: _names_hash(v[0]) for s, v in sources.items()}}
    if getattr(data, "upright", False):  # said where it is on only, so that folders begun without the option go on
        recipe["upright"] = True
    files = {split: sizes_hash(part[0]) for split, part in sources.items()}
    if None not in files.values():
        recipe["files"] = files
    if tokenizer.encoder_draws:
        recipe["seed"] = data.seed
    taken = [name for name in ("train", "val", "tokenizer") if (out / name).exists()]  # before another task begins it
    if taken and not (out / "recipe.json").is_file():
        raise ValueError(f"out={out} holds {', '.join(taken)} already, and no codes; choose another out=")
    claimed = claim(out, common | recipe)
    common = {name: claimed[name] for name in common}  # both manifests say the same, whichever version finishes them
    if not is_folder(out / "tokenizer") or read_config(out / "tokenizer").get("hash") != identity["sha256"]:
        save_folder(tokenizer, out / "tokenizer", kind="tokenizer")
    tokenizer = copy.deepcopy(tokenizer).to(device)  # the caller's keeps its weights as they are
    light_tokenizer(tokenizer, torch.float32)

    number, complete = 0, True
    for split, (source, cut) in sources.items():
        folder, count = out / split, -(-len(source) // shard_size)
        for index in range(count):
            rows = range(index * shard_size, min(len(source), (index + 1) * shard_size))
            mine, number = number % task[1] == task[0], number + 1
            if not mine:
                continue
            title = f"{split} shard {index + 1}/{count}"
            if finished(folder, index, len(rows)):
                say(f"{title}: finished earlier")
                continue
            dataset = Subset(CropDataset(source, data.image_size, cut["name"], data.seed), rows)
            made = _encode(dataset, tokenizer, spec, batch, data.workers, device, common["dtype"], title, say)
            substitutes = int((made[2] != [id_of(source.name(i)) for i in rows]).sum())
            if substitutes:
                say(f"{title}: {substitutes} unreadable; their rows hold the next image, with its label and id")
            write_shard(folder, index, *made, substitutes=substitutes)
        sizes = [min(shard_size, len(source) - i * shard_size) for i in range(count)]
        notes = [finished(folder, i, n, verify=False) for i, n in enumerate(sizes)]
        if all(notes):
            write_manifest(folder, notes, **common, crops=cut, split=split, versions=_versions())
        else:
            complete = False
            say(f"{split}: {notes.count(None)} of {count} shards are left to other tasks")
    return complete


class CropDataset(Dataset):
    """All crops of image i as {"image" uint8 [crops, S, S, 3], "label", "key", "id"}; label and id of the substitute
    where the image cannot be read and is skipped."""

    def __init__(self, source: Source, size: int, crops: Crops, seed: int) -> None:
        self.source, self.size, self.crops, self.seed = source, size, crops, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.source[index]
        image = to_rgb(image)
        if self.crops == "ten":
            images = ten_crop(image, self.size, CROPS["ten"]["wide"])
        else:
            centre = center_crop(image, self.size)
            images = [centre, mirror(centre)][: CROPS[self.crops]["count"]]
        keys = [key(self.seed, 0, index, crop) for crop in range(len(images))]
        stacked = np.stack([np.asarray(i) for i in images])
        name = name_given(self.source, index)
        return {"image": torch.from_numpy(stacked), "label": label, "key": torch.tensor(keys), "id": id_of(name)}


@torch.no_grad()
def _encode(
    dataset: Dataset,
    tokenizer: Tokenizer,
    spec: TokenSpec,
    batch: int,
    workers: int,
    device: str | torch.device,
    dtype: str,
    title: str,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, crops, L(, C)] as stored, labels and ids int64 [n]."""
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers, generator=torch.Generator())
    codes, labels, ids, start, last = [], [], [], time.monotonic(), time.monotonic()
    for item in loader:
        images = to_float(item["image"].to(device))
        rows, crops = images.shape[:2]
        noise = SampleNoise(item["key"].flatten().to(device))
        tokens = encode_images(tokenizer, images.flatten(0, 1), noise=noise)
        spec.check(tokens)
        codes.append(pack(tokens.unflatten(0, (rows, crops)), dtype))
        labels.append(item["label"].numpy())
        ids.append(item["id"].numpy())
        done, now = sum(map(len, labels)), time.monotonic()
        if now - last > 10 or done == len(dataset):
            last, rate = now, done / max(now - start, 1e-9)
            say(
                f"{title}: {done}/{len(dataset)} images, {rate:.0f} images/s, {(len(dataset) - done) / rate:.0f} s left"
            )
    return np.concatenate(codes), np.concatenate(labels), np.concatenate(ids)


def claim(out: Path, recipe: dict, *, what: str = "codes") -> dict:
    """The recipe.json of a folder of `what`, which is `recipe` in a new one.

    Raises ValueError where the folder was begun with another one. A tokenizer is known by its weights and its
    description; one that an earlier version wrote is completed (vtok.config.completed), one that it left out is taken
    for the same, and written now. A seed counts where `recipe` names one, sizes of files where the folder does.
    """
    path, recipe = out / "recipe.json", json.loads(json.dumps(recipe, default=str))
    if not path.is_file():
        write_json(path, recipe)
        return recipe
    try:
        found = json.loads(path.read_text())
        known = "description" in found["tokenizer"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another out=") from None
    families = imported(FAMILIES, recipe)
    made, now = (completed(r, families) for r in (found, recipe))
    made["tokenizer"] = now["tokenizer"] | made["tokenizer"]
    if "seed" not in now:
        made.pop("seed", None)
    if "files" not in made:
        now.pop("files", None)
    different = differences(made, now)
    if different:
        weights = [d for d in different if d[0] == "tokenizer.sha256"]
        name, *values = (weights or different)[0]
        there, asked = (str(v)[:16] if weights else str(v)[:80] for v in values)
        name = name.replace("tokenizer.sha256", "tokenizer").replace("tokenizer.description", "tokenizer")
        raise ValueError(f"out={out} holds {what} with {name}={there}, asked for {asked}; choose another out=")
    if known:
        return found
    write_json(path, recipe)
    return recipe


def _names_hash(source: Source) -> str:
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.name(i).encode("utf8", "replace") + b"\n")
    return digest.hexdigest()


def _versions() -> dict[str, str | None]:
    try:
        own = importlib.metadata.version("vtok-vgen")
    except importlib.metadata.PackageNotFoundError:
        own = None
    return {"vtok": own, "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
