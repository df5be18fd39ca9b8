"""Shards of cached tokens, format vtok-shards/v1: memory-mapped arrays and a manifest that names their tokenizer.

A folder holds `recipe.json` (what was asked for), `tokenizer/` (the frozen tokenizer, as a shared folder), and for each
of `train/` and `val/`:

    codes-00000.npy ...  [n, crops, L] uint16 (vocabularies up to 65,536), uint32 (up to 2^32) or int64; continuous
                         tokens [n, crops, L, C] float16, or bfloat16 stored as uint16
    labels.npy           int32 [N]; ids.npy int64 [N], the hash of the name of each row's source image
    manifest.json        tokenizer description and SHA-256 of its weights, token spec, crop recipe, image size, rows,
                         bytes and CRC-32 of every shard, class names, versions; substitutes: how many rows are of the
                         next readable image, whose label and id they have (data.on_bad_image=skip)
    parts/               one note per finished shard, from which a killed extraction goes on

Every file is written beside its target and renamed. Reading checks each shard's size against the manifest and its .npy
header before it is mapped, and the CRC where asked to.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vtok.checkpoint import CheckpointError, write_atomic, write_json
from vtok.data.sources import Mapped
from vtok.tokenizer import TokenSpec

FORMAT = "vtok-shards/v1"
SPLITS = ("train", "val")
Crops = Literal["none", "flip", "ten"]
IDS = {"uint16": 1 << 16, "uint32": 1 << 32, "int64": 1 << 63}  # how many
STORED = {"uint16": np.uint16, "uint32": np.uint32, "int64": np.int64, "float16": np.float16, "bfloat16": np.uint16}


def id_of(name: str) -> int:
    """Row id of a source image: 63 bits of SHA-256 over its name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf8", "replace")).digest()[:8], "big") >> 1


def dtype_of(spec: TokenSpec, asked: str | None = None) -> str:
    """How tokens of a spec are stored: as asked, by default the smallest type. Raises ValueError where ids overflow."""
    if not spec.discrete:
        fits = ("float16", "bfloat16")
    else:
        largest = max(part.vocab_size for part in spec.parts)
        fits = tuple(name for name, most in IDS.items() if largest <= most)
    if asked not in (None, *fits):
        raise ValueError(f"dtype={asked} does not hold these tokens; choose {' or '.join(fits)}, or null")
    if not fits:
        raise ValueError(f"ids up to {largest - 1} do not fit 63 bits")
    return asked or fits[0]


def pack(tokens: Tensor, dtype: str) -> np.ndarray:
    """Tokens (int64 ids or float latents) as the array that is stored."""
    tokens = tokens.detach().cpu()
    if dtype == "bfloat16":
        return tokens.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return tokens.numpy().astype(STORED[dtype])


def unpack_row(row: np.ndarray, dtype: str) -> Tensor:
    """Stored rows, one or several, as int64 ids [.., L] or float32 latents [.., L, C]."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(row).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(row.astype(np.float32 if dtype == "float16" else np.int64))


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def save_array(path: Path, array: np.ndarray) -> None:
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False), size=array.nbytes)


# --- writing ---------------------------------------------------------------------------------------------------------


def shard_name(index: int) -> str:
    return f"codes-{index:05d}.npy"


def write_shard(
    folder: Path, index: int, codes: np.ndarray, labels: np.ndarray, ids: np.ndarray, *, substitutes: int = 0
) -> None:
    """One shard, then its note; the note is what makes it finished. substitutes: how many rows, see above."""
    path = folder / shard_name(index)
    save_array(path, codes)
    save_array(folder / "parts" / f"{index:05d}.npy", np.stack([labels.astype(np.int64), ids]))
    note = {"file": path.name, "rows": len(codes), "bytes": path.stat().st_size, "crc32": crc32(path)}
    note |= {"substitutes": substitutes} if substitutes else {}
    write_json(folder / "parts" / f"{index:05d}.json", note)


def finished(folder: Path, index: int, rows: int, *, verify: bool = True) -> dict | None:
    """The note of a shard that is there in full (verify: and whose CRC is right), else None."""
    path = folder / shard_name(index)
    try:
        note = json.loads((folder / "parts" / f"{index:05d}.json").read_text())
        table = np.load(folder / "parts" / f"{index:05d}.npy", allow_pickle=False)
        whole = note["rows"] == rows and table.shape == (2, rows) and path.stat().st_size == note["bytes"]
        return note if whole and (not verify or crc32(path) == note["crc32"]) else None
    except Exception:  # a damaged note or table can raise anything
        return None


def write_manifest(folder: Path, notes: list[dict], **fields: Any) -> None:
    """labels.npy, ids.npy and manifest.json of a split whose shards are all finished."""
    tables = [np.load(folder / "parts" / f"{i:05d}.npy", allow_pickle=False) for i in range(len(notes))]
    labels, ids = np.concatenate(tables, axis=1)
    save_array(folder / "labels.npy", labels.astype(np.int32))
    save_array(folder / "ids.npy", ids)
    counts = {"rows": len(labels), "substitutes": sum(note.get("substitutes", 0) for note in notes)}
    write_json(folder / "manifest.json", {"format": FORMAT, **counts, **fields, "shards": notes})


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """One split, read lazily: `row(i, crop)` gives tokens, `labels` int32 [N]."""

    manifest: dict
    labels: np.ndarray
    starts: np.ndarray  # first row of every shard
    maps: tuple[Mapped, ...]

    @property
    def crops(self) -> int:
        return int(self.manifest["crops"]["count"])

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int, crop: int) -> Tensor:
        if not 0 <= index < len(self) or not 0 <= crop < self.crops:
            raise IndexError((index, crop))
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return unpack_row(self.maps[shard].array[index - self.starts[shard], crop], self.manifest["dtype"])

    def rows(self, indices: np.ndarray, crops: np.ndarray) -> Tensor:
        """`row` of many, [n, L(, C)]: one read of each shard in which some of them lie."""
        if not ((indices >= 0) & (indices < len(self)) & (crops >= 0) & (crops < self.crops)).all():
            raise IndexError((indices, crops))
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        cells, order = (indices - self.starts[shards]) * self.crops + crops, np.argsort(shards, kind="stable")
        touched, begin = np.unique(shards[order], return_index=True)
        bounds = itertools.pairwise([*begin.tolist(), len(order)])
        first = self.maps[0].array
        found, cells = np.empty((len(order), *first.shape[2:]), first.dtype), cells[order]
        for shard, (a, b) in zip(touched.tolist(), bounds):
            rows = np.asarray(self.maps[shard].array).reshape(-1, *first.shape[2:])
            np.take(rows, cells[a:b], axis=0, out=found[a:b], mode="clip")  # in range: with "raise" it would buffer
        return unpack_row(found[np.argsort(order)], self.manifest["dtype"])


def open_split(folder: str | os.PathLike, *, verify: bool = False) -> Shards:
    """Open train/ or val/ of a codes folder. verify: also compute every shard's CRC (reads all of it).

    Raises CheckpointError naming the file that is missing, truncated or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    spec = TokenSpec.from_config(manifest["spec"])
    tail = (int(manifest["crops"]["count"]), spec.layout.length) + (() if spec.discrete else (spec.parts[0].channels,))
    starts, maps, total = [], [], 0
    for note in manifest["shards"]:
        path = folder / note["file"]
        if path.name != note["file"]:
            raise CheckpointError(f"{folder / 'manifest.json'} names {note['file']!r}, which is no file of the folder")
        _check_array(path, (note["rows"], *tail), STORED[manifest["dtype"]], note["bytes"])
        if verify and crc32(path) != note["crc32"]:
            raise CheckpointError(f"{path} was altered: its CRC differs from the manifest's; extract it again")
        starts.append(total)
        maps.append(Mapped(path))
        total += note["rows"]
    _check_array(folder / "labels.npy", (manifest["rows"],), np.int32)
    if total != manifest["rows"] or not total:
        raise CheckpointError(f"{folder / 'manifest.json'}: shards hold {total} rows, `rows` says {manifest['rows']}")
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    return Shards(manifest, labels, np.array(starts), tuple(maps))


def read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        hint = "run the extraction again: it goes on where it stopped" if (folder / "parts").is_dir() else ""
        raise CheckpointError(f"{path} is missing: {folder} holds no finished codes; {hint or 'change data.folder'}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    needed = {"format", "rows", "tokenizer", "spec", "crops", "image_size", "dtype", "class_names", "shards"}
    missing = needed - set(manifest) if isinstance(manifest, dict) else needed
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
    if manifest["dtype"] not in STORED:
        raise CheckpointError(f"{path} has dtype {manifest['dtype']!r}, known are {', '.join(STORED)}")
    return manifest


def _check_array(path: Path, shape: tuple[int, ...], dtype: type, size: int | None = None) -> None:
    """Shape and dtype from the .npy header, and both against the size of the file, before anything is mapped."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f".npy version {version}")
            found, order, found_dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; extract it again") from None
    except Exception as error:  # numpy reads a header as Python: damage can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is no array ({reason:.100}); extract it again") from None
    if tuple(found) != tuple(shape) or order or found_dtype != np.dtype(dtype):
        raise CheckpointError(f"{path} is {found_dtype} {found}, expected {np.dtype(dtype)} {shape} by the manifest")
    expected, actual = header + int(np.prod(shape)) * np.dtype(dtype).itemsize, path.stat().st_size
    if actual != expected or size not in (None, actual):
        raise CheckpointError(f"{path} has {actual} bytes, expected {expected}: it is truncated; extract it again")
