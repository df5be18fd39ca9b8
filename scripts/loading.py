"""Measure how many images a second the training's loader gives from each data format, from the same pictures.

    python scripts/loading.py folder=data/imagenet/train count=1000

Formats: image files, WebDataset tars, parquet (where pyarrow is installed), the pictures resized once (JPEG q95, for
training only), the decoded cache, and cached codes: 16,384 rows of ten crops in 64 shards, a batch of 256 at a time.
Everything is read in the shuffled order of training, images with the centre crop and flips, in batches of 64, once in
this process and once by `workers` others. Seconds are CPU seconds of this process and the workers together, so that
other jobs do not count; files are in the page cache.

The second table sets against it what training consumes: how many cores keep one GPU fed and how many keep `gpus` of
them, for each generator of `consumers`, at `mfu` of the bf16 rate that the maker of `gpu` states. What encodes online
consumes less, since the encoder takes its share of the GPU.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import entry, is_list, own_folder  # noqa: E402

ROWS, SHARDS = 16384, 64  # of the cached codes
IMAGES, CODES = 64, 256  # a batch
LEAST = 32  # images


@entry(
    "loading",
    ROOT / "configs",
    whole={"count": LEAST, "image_size": 1, "workers": 0, "gpus": 1},
    numbers={"seconds": (0.01, 3600), "mfu": (0.01, 1)},
)
def main(config: Any) -> None:
    if config.workers and not Path("/proc/self/stat").exists():
        raise ValueError(
            f"workers={config.workers}: CPU seconds of workers are read from Linux's /proc, elsewhere set workers=0"
        )
    import torch

    from vtok.checkpoint import write_json
    from vtok.data.imagefolder import ImageFolder
    from vtok.data.packed import Parquet, Tars

    torch.set_num_threads(1)
    names, consumed = listed(config), consumption(config)
    out, size = own_folder("out", config.out, ".loading"), int(config.image_size)
    files = pictures(config, names, out)
    shared = dict(image_size=size, batch_size=IMAGES, flip=True, cache_dir=str(out / "cache"))
    folder = dict(val_fraction=0.01, num_classes=0, scan="none", **shared)
    pack_tar(files, out / "tar" / "0.tar")
    small = resized(files, out / "small", size)
    made: dict[str, Callable[[], Any]] = {
        "image files": lambda: ImageFolder(folder=str(files[0].parent), **folder),
        "WebDataset tar": lambda: Tars(folder=str(out / "tar"), train="*.tar", val="*.tar", **shared),
        "image files, resized once": lambda: ImageFolder(folder=str(small), **folder),
        "decoded cache": lambda: ImageFolder(folder=str(files[0].parent), cache=True, **folder),
    }
    if pack_parquet(files, out / "parquet" / "0.parquet"):
        made["parquet"] = lambda: Parquet(folder=str(out / "parquet"), train="*.parquet", val="*.parquet", **shared)
    made["codes, 256 tokens"] = lambda: codes(out / "codes")
    found, counts = {}, sorted({0, config.workers})
    for name, build in made.items():
        data = build()
        found[name] = [measure(data, workers, config.seconds) for workers in counts]
    bytes_of = sum(f.stat().st_size for f in files) / len(files)
    print(f"{len(files)} images of {bytes_of / 1024:.0f} KiB on average, {size} px, images a second and core\n")
    print("| format |" + "".join(f" workers={workers} |" for workers in counts) + "\n|---|" + "---|" * len(counts))
    for name, speeds in found.items():
        print(f"| {name} |" + "".join(f" {speed:,.0f} |" for speed in speeds))
    if consumed:
        print("\n" + needed(found, consumed, config))
    facts = {"workers": counts, "images": len(files), "mean_bytes": bytes_of}
    write_json(out / "loading.json", {"images_per_second": found, "consumed_per_second": consumed, **facts})


def consumption(config: Any) -> dict[str, float]:
    """Images a second at which one GPU trains each of `consumers`. ValueError for an unknown GPU or model, and for a
    model whose operations have no closed form."""
    import torch
    from hydra import compose
    from hydra.errors import MissingConfigException

    from vtok.acceleration import PEAKS, training_operations
    from vtok.config import instantiate

    if config.gpu not in PEAKS:
        raise ValueError(f"gpu={config.gpu}: its rate is not known; choose from {', '.join(PEAKS)}")
    rate, found = config.mfu * PEAKS[config.gpu], {}
    pairs = [] if config.consumers is None else config.consumers
    if not is_list(pairs) or not all(is_list(pair) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"consumers={config.consumers}: give a list of [<model>, <tokenizer>]")
    for model, tokenizer in pairs:
        try:
            made = compose("eval_throughput", overrides=[f"model={model}", f"tokenizer={tokenizer}"])
        except MissingConfigException as error:
            raise ValueError(f"consumers=[[{model},{tokenizer}]]: {str(error).splitlines()[0]}") from None
        with torch.device("meta"):
            spec = instantiate(made.tokenizer, _convert_="all").spec
            generator = instantiate(made.model, _convert_="all", _partial_=True)(spec=spec, num_classes=1000)
        operations = training_operations(generator)
        if operations is None:
            raise ValueError(f"consumers=[[{model},{tokenizer}]]: the operations of its step have no closed form")
        found[model] = rate / operations
    return found


def needed(found: dict[str, list[float]], consumed: dict[str, float], config: Any) -> str:
    """A table of the cores that each format needs, at the better of its figures, for one GPU and for all."""
    lines = [
        f"cores that keep one {config.gpu} fed at {config.mfu:.0%} MFU, and {config.gpus} of them\n",
        "| model | images/s of one |" + "".join(f" {name} |" for name in found),
        "|---|---|" + "---|" * len(found),
    ]
    for model, rate in consumed.items():
        cores = [rate / max(speeds) for speeds in found.values()]
        cells = "".join(f" {short(one)}, {short(config.gpus * one)} |" for one in cores)
        lines.append(f"| {model} | {rate:,.0f} |{cells}")
    return "\n".join(lines)


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def measure(data: Any, workers: int, seconds: float) -> float:
    """Items a CPU second of the training's loader, after those that are read while the workers start."""
    data.workers = workers
    batches = iter(data.train_dataloader())
    for _ in range(2 * workers + 2):
        next(batches)
    pids = [worker.pid for worker in batches._workers] if workers else []
    count, began = 0, cpu_seconds(pids)
    while (spent := cpu_seconds(pids) - began) < seconds:
        count += len(next(batches)["index"])
    return count / spent


def cpu_seconds(pids: list[int]) -> float:
    """Of this process and those."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return time.process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def listed(config: Any) -> list[str]:
    """At most `count` image files of `folder`; none where there is no folder. ValueError where they are below LEAST."""
    from vtok.data.files import list_images

    if not config.folder:
        return []
    names = list_images(Path(config.folder), "folder")[: config.count]
    if len(names) < LEAST:
        raise ValueError(f"folder={config.folder} holds {len(names)} images: at least {LEAST} are needed")
    return names


def pictures(config: Any, names: list[str], out: Path) -> list[Path]:
    """The image files `names` of the folder, copied flat; or drawn ones."""
    import numpy as np
    from PIL import Image

    place = out / "pictures"
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    if config.folder:
        for i, name in enumerate(names):
            (place / f"{i:06d}{Path(name).suffix.lower()}").write_bytes((Path(config.folder) / name).read_bytes())
    else:
        draw = np.random.default_rng(0)
        for i in range(config.count):
            coarse = Image.fromarray(draw.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i:06d}.jpg", quality=90)
    return sorted(place.iterdir())


def pack_tar(files: list[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for file in files:
            for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def pack_parquet(files: list[Path], path: Path) -> bool:
    """Row groups of 100, as the hub's; False where pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        print("pyarrow is not installed: parquet is left out", file=sys.stderr)
        return False
    rows = [{"bytes": f.read_bytes(), "path": f.name} for f in files]
    table = pyarrow.table({"image": rows, "label": [0] * len(rows)})
    names = json.dumps({"info": {"features": {"label": {"names": ["all"]}}}})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({"huggingface": names}), path, row_group_size=100)
    return True


def resized(files: list[Path], folder: Path, size: int) -> Path:
    from vtok.data.files import read_image
    from vtok.data.transforms import center_crop

    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        center_crop(read_image(file), size).save(folder / f"{file.stem}.jpg", quality=95)
    return folder


def codes(folder: Path) -> Any:
    """A split of random codes, ten crops of 256 tokens, as training data."""
    import numpy as np

    from vtok.data.codes import KeyedCodes
    from vtok.data.module import StepData
    from vtok.data.shards import open_split, write_manifest, write_shard
    from vtok.layout import SequenceLayout
    from vtok.tokenizer import Part, TokenSpec

    layout = SequenceLayout.raster(16, 16)
    spec = TokenSpec(layout, (Part(256, 16384, 8),), 256)
    draw, rows, notes = np.random.default_rng(0), ROWS // SHARDS, []
    for shard in range(SHARDS):
        drawn = draw.integers(0, 16384, (rows, 10, 256), dtype=np.uint16)
        ids = np.arange(shard * rows, (shard + 1) * rows)
        write_shard(folder, shard, drawn, np.zeros(rows, np.int64), ids)
        notes.append(json.loads((folder / "parts" / f"{shard:05d}.json").read_text()))
    recipe = {"name": "ten", "count": 10, "centre": 4, "wide": 1.1}
    common = dict(spec=spec.to_config(), dtype="uint16", image_size=256, class_names=[], tokenizer={"sha256": ""})
    write_manifest(folder, notes, **common, crops=recipe, split="train")
    dataset = KeyedCodes(open_split(folder), seed=0, augment=True)

    class Drawn(StepData):
        def train_dataset(self) -> KeyedCodes:
            return dataset

    return Drawn(batch_size=CODES)


if __name__ == "__main__":
    main()
