"""Images packed into large files: WebDataset tars and Hugging Face parquet, read by index like any other source.

Both libraries stream, and streaming has no exact resume (webdataset#271). Here a file's index, made once and kept in
cache_dir, tells where every image lies, so the order stays a pure function of (seed, step) and a run goes on in the
middle of an epoch on any number of processes and workers. A tar is read at an offset, so any order costs the same. A
parquet file can only be read by row groups; there the order is shuffled in windows of row groups (`blocks`), of which
each worker keeps the newest few.

Nothing of an archive is ever written to disk: the names of its members are only names. Links and devices are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vtok.checkpoint import write_atomic
from vtok.data.files import ENDINGS, BadImage, EncodedImages, Names, OnBadImage, decode, one_at_a_time
from vtok.data.imagefolder import read_class_file
from vtok.data.module import WINDOW, ImageData
from vtok.data.sources import Sources
from vtok.data.transforms import Crop

OPEN_FILES = 128  # of a process
LABEL_ENDINGS = (".cls", ".json")
KEPT_ROW_GROUPS = WINDOW  # of a worker


class Packed(ImageData):
    """folder, train, val: where the files are, as patterns below `folder`. class_file: names in label order, or
    imagenet. num_classes: auto (highest label + 1), 0 to ignore labels, or how many there must be. on_bad_image,
    upright: see vtok.data.files.EncodedImages."""

    def __init__(
        self,
        *,
        folder: str,
        train: str,
        val: str,
        num_classes: int | str = "auto",
        class_file: str | None = None,
        image_size: int = 256,
        batch_size: int = 64,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        crop: Crop = "center",
        flip: bool = True,
        shift: int = 0,
        window: int | None = None,
        on_bad_image: OnBadImage = "error",
        upright: bool = False,
        cache_dir: str = "outputs/cache",
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        sampling = dict(batch_size=batch_size, accumulate=accumulate, workers=workers, seed=seed)
        look = dict(image_size=image_size, crop=crop, flip=flip, shift=shift, window=window)
        super().__init__(**look, **sampling, limit_train=limit_train, limit_val=limit_val)
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"data.on_bad_image={on_bad_image!r}: choose error or skip")
        if num_classes != "auto" and (not isinstance(num_classes, int) or num_classes < 0):
            raise ValueError(f"data.num_classes={num_classes!r}: give auto, 0 for no classes, or the number of classes")
        self.folder, self.patterns = Path(folder), {"train": train, "val": val}
        self.expected, self.class_file = num_classes, class_file
        self.on_bad_image, self.upright, self.cache_dir = on_bad_image, upright, Path(cache_dir)

    def open(self, files: list[Path]) -> PackedSource:
        raise NotImplementedError

    def prepare(self) -> Sources:
        parts = {split: self.open(self._files(split)) for split in self.patterns}
        for part in parts.values():
            part.on_bad_image, part.upright = self.on_bad_image, self.upright
        labels = [part.labels for part in parts.values()]
        names = list(parts["train"].class_names)
        known = max((int(x.max()) + 1 for x in labels if len(x)), default=0)
        if self.class_file:
            names = list(read_class_file(self.class_file).values())
        if self.expected not in (0, "auto") and known == 0:
            raise ValueError(
                f"{self.folder} has no labels, but data.num_classes={self.expected}; add labels, or use auto or 0"
            )
        if self.expected == 0 or known == 0:
            for part in parts.values():
                part.labels = np.zeros(len(part), np.int64)
            return Sources(parts["train"], parts["val"], [])
        if min(int(x.min()) for x in labels if len(x)) < 0:
            raise ValueError(f"{self.folder}: some images have no label; set data.num_classes=0 to ignore labels")
        count = known if self.expected == "auto" else int(self.expected)
        count = max(count, len(names)) if self.expected == "auto" else count
        if known > count or (names and len(names) != count):
            raise ValueError(
                f"{self.folder} has labels up to {known - 1} and {len(names)} class names, but "
                f"data.num_classes={self.expected}; use auto, or 0 to ignore labels"
            )
        return Sources(parts["train"], parts["val"], names or [str(i) for i in range(count)])

    def _files(self, split: str) -> list[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"folder {self.folder} does not exist; change data.folder")
        found = sorted(p for p in self.folder.glob(self.patterns[split]) if p.is_file())
        if not found:
            raise ValueError(f"{self.folder} holds no {self.patterns[split]}; change data.folder or data.{split}")
        return found


class PackedSource(EncodedImages):
    """What tars and parquet share."""

    blocks: tuple[int, ...] | None = None
    class_names: Sequence[str] = ()

    def __init__(self, files: Sequence[Path], names: Names, labels: np.ndarray) -> None:
        super().__init__(files[0].parent, names, labels)
        self.files = list(files)

    def encoded(self, index: int) -> tuple[bytes, str]:
        """The encoded image and the name under which a message speaks of it."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        data, name = self.encoded(index)
        return decode(io.BytesIO(data), name, self.upright)


# --- WebDataset tars -------------------------------------------------------------------------------------------------


class Tars(Packed):
    """WebDataset tars: members <key>.jpg and <key>.cls (a number) or <key>.json ({"label": number}). Needs no extra."""

    def open(self, files: list[Path]) -> TarSource:
        key = hashlib.sha256()
        for file in files:
            stat = file.stat()
            key.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        index = self.cache_dir / f"tars-{key.hexdigest()[:24]}.npz"
        if not index.is_file():
            with one_at_a_time(index.with_suffix(".lock")):
                if not index.is_file():  # another process of this machine has made it meanwhile
                    table = index_tars(files)
                    write_atomic(index, lambda out: np.savez(out, **table))
        with np.load(index, allow_pickle=False) as table:
            return TarSource(files, {k: table[k] for k in table.files})


class TarSource(PackedSource):
    """files with an index of `index_tars`; each process opens a file when it first reads from it."""

    def __init__(self, files: Sequence[Path], table: dict[str, np.ndarray]) -> None:
        names = Names([])
        names.data, names.ends = table["names"], table["ends"]
        super().__init__(files, names, table["labels"])
        self.places = table["places"]
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def file_size(self, index: int) -> int:
        """Of the image in the tar."""
        return int(self.places[index, 2])

    def encoded(self, index: int) -> tuple[bytes, str]:
        shard, offset, size = (int(v) for v in self.places[index])
        if shard not in self._open:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
        data = os.pread(self._open[shard], size, offset)  # takes its own offset: a forked worker may share the file
        return data, f"{self.names[index]} in {self.files[shard]}"


def index_tars(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Where the images of tars lie: places int64 [N, 3] of (file, offset, bytes), labels int64 [N] (-1 without one),
    and names as `Names` keeps them. Raises ValueError naming the file that is damaged or holds a link."""
    names, places, labels = [], [], []
    for shard, file in enumerate(files):
        images: OrderedDict[str, tuple[str, int, int]] = OrderedDict()
        found: dict[str, int] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    if not member.isfile():
                        raise ValueError(f"{file}: {member.name!r} is a link or a device; only files are read")
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key, ending = f"{folder}/{stem}", f".{ending.lower()}"
                    if ending in ENDINGS:
                        if key in images:
                            raise ValueError(f"{file}: two images are called {key!r}")
                        images[key] = (member.name, member.offset_data, member.size)
                    elif ending in LABEL_ENDINGS and member.size < 1 << 20:
                        found[key] = _label(tar.extractfile(member).read(), ending, file, member.name, found.get(key))
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{file} is no uncompressed tar archive, or it is damaged ({error})") from None
        size = file.stat().st_size
        for key, (name, offset, length) in images.items():
            if offset + length > size:
                raise ValueError(f"{file} is truncated: {name} ends behind its end")
            names.append(f"{file.name}/{name}")
            places.append((shard, offset, length))
            labels.append(found.get(key, -1))
    packed = Names(names)
    return {
        "names": packed.data,
        "ends": packed.ends,
        "places": np.array(places, np.int64).reshape(-1, 3),
        "labels": np.array(labels, np.int64),
    }


def _label(data: bytes, ending: str, file: Path, name: str, known: int | None) -> int:
    try:
        if ending == ".cls":
            return int(data.decode().strip())
        value = json.loads(data)
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
        return int(value) if value is not None else -1 if known is None else known
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {name} holds no class number ({str(error)[:80]})") from None


# --- Hugging Face parquet --------------------------------------------------------------------------------------------


LABELS = ("integer", "floating", "boolean", "null")  # types of the column `label`; its numbers are whole


class Parquet(Packed):
    """Parquet of the Hugging Face hub: a column `image` of {bytes, path} and a column `label`. Needs the extra hf."""

    def open(self, files: list[Path]) -> ParquetSource:
        return ParquetSource(files)


class ParquetSource(PackedSource):
    """Rows of parquet files in order; one row group is read at a time, and the newest KEPT_ROW_GROUPS are kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError("data=parquet needs pyarrow: pip install 'vtok-vgen[hf]', or pack tars") from None
        groups, labels, blocks = [], [], []
        for number, file in enumerate(files):
            try:
                with parquet.ParquetFile(file) as opened:
                    columns = opened.schema_arrow.names
                    if "image" not in columns:
                        raise ValueError(f"{file} has no column `image` but {', '.join(columns)[:100]}")
                    for group in range(opened.num_row_groups):
                        rows = opened.metadata.row_group(group).num_rows
                        groups.append((number, group))
                        blocks.append(rows)
                    has = "label" in columns
                    kind = opened.schema_arrow.field("label").type if has else None
                    column = opened.read(columns=["label"]).column("label").to_pylist() if has else []
                    numbers = not has or any(getattr(pyarrow.types, f"is_{name}")(kind) for name in LABELS)
                    if not numbers or any(v is not None and v != v // 1 for v in column):
                        raise ValueError(f"{file}: column `label` holds {kind}, expected class numbers")
                    filled = [-1 if v is None else int(v) for v in column]
                    labels.append(np.array(filled if has else [-1] * opened.metadata.num_rows, np.int64))
                    if not number:
                        self.class_names = _class_names(opened.schema_arrow.metadata)
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0][:120]
                raise ValueError(f"{file} is no parquet file, or it is damaged ({reason})") from None
        super().__init__(files, Names([]), np.concatenate(labels))
        self.groups, self.blocks, self.starts = groups, tuple(blocks), np.cumsum([0, *blocks])
        self.sizes = [file.stat().st_size for file in files]
        self._kept: OrderedDict[int, list] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": OrderedDict()}

    def group(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        group = self.group(index)
        number, within = self.groups[group]
        return f"{self.files[number].name}/{within}/{index - int(self.starts[group])}"

    def file_size(self, index: int) -> int:
        """Of the parquet file."""
        return self.sizes[self.groups[self.group(index)][0]]

    def encoded(self, index: int) -> tuple[bytes, str]:
        import pyarrow
        import pyarrow.parquet as parquet

        group = self.group(index)
        if group not in self._kept:
            number, within = self.groups[group]
            try:
                with parquet.ParquetFile(self.files[number]) as opened:
                    column = opened.read_row_group(within, columns=["image"]).column("image")
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0][:120]
                raise ValueError(f"{self.files[number]} is damaged in row group {within} ({reason})") from None
            self._kept[group] = column.combine_chunks()
            while len(self._kept) > KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
        value = self._kept[group][index - int(self.starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadImage(
                f"cannot read image {self.name(index)}: it holds no bytes; download the data set with images"
            )
        return data, self.name(index)


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return [str(n) for n in features["info"]["features"]["label"]["names"]]
    except (ValueError, KeyError, TypeError):
        return []
