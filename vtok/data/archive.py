"""Unpacking a data archive without trusting it: no member may land outside the folder, and links are refused.

Checked before anything is written: absolute paths, `..`, drive letters, links and devices, the number of members and
their size once expanded.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

MAX_MEMBERS, MAX_BYTES = 5_000_000, 2**40


class UnsafeArchive(ValueError):
    """An archive that names a path outside its folder, a link, or more than the limits."""


def unpack(
    archive: str | os.PathLike, folder: str | os.PathLike, *, max_members: int = MAX_MEMBERS, max_bytes: int = MAX_BYTES
) -> int:
    """Unpack a .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip into `folder`; return the number of files.

    All members are checked first, so an unsafe archive leaves nothing behind. Raises UnsafeArchive, or ValueError for
    a file that is no such archive or is damaged.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise ValueError(f"archive {archive} does not exist")
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    try:
        _check(archive, members, max_members, max_bytes)
        files = 0
        for name, size, _, open_member in members(archive):
            target = folder / PurePosixPath(name)
            if size is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise UnsafeArchive(f"{archive}: {name!r} would be written through a link out of {folder}")
            target.unlink(missing_ok=True)
            with open_member() as source, open(target, "xb") as file:
                shutil.copyfileobj(source, file)
            files += 1
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error) as error:
        raise ValueError(f"{archive} is no tar or zip archive, or it is damaged ({error})") from None
    return files


# (name, size or None for a folder, fault or "", open)
Member = tuple[str, int | None, str, Callable[[], IO[bytes]]]


def _check(archive: Path, members: Callable[[Path], Iterator[Member]], max_members: int, max_bytes: int) -> None:
    total = 0
    for count, (name, size, fault, _) in enumerate(members(archive), start=1):
        total += size or 0
        windows = PureWindowsPath(name)
        if fault:
            raise UnsafeArchive(f"{archive}: {name!r} is {fault}; only files and folders are unpacked")
        if name.startswith("/") or windows.drive or windows.root or ".." in windows.parts or "\0" in name or not name:
            raise UnsafeArchive(f"{archive}: {name!r} leads out of the folder; nothing was unpacked")
        if count > max_members or total > max_bytes:
            raise UnsafeArchive(f"{archive} holds more than {max_members:,} members or {max_bytes:,} bytes")


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as tar:
        for info in tar:
            fault = "" if info.isfile() or info.isdir() else "a link" if info.islnk() or info.issym() else "a device"
            yield info.name, None if info.isdir() else info.size, fault, lambda info=info: tar.extractfile(info)


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as pack:
        for info in pack.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            fault = "a link or device" if kind not in (0, stat.S_IFREG, stat.S_IFDIR) else ""
            yield info.filename, None if info.is_dir() else info.file_size, fault, lambda info=info: pack.open(info)
