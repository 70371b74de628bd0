"""Pictures in folders, zip files and tars.

Members of archives are read into memory and never written by their names; those with an absolute
path or `..` are refused by name. A tar that is compressed is unpacked once into one plain tar in
the work folder, so that pictures can be read in any order. `NAME.mask.png` goes with NAME.png; of a
tar also `NAME.cls`, `NAME.json` and `NAME.txt`, and other members are left out by kind.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER
from vae_dist.data.tar import DamagedSampleError, files_of_tar
from vae_dist.packing.items import (
    MAX_FILE_BYTES,
    SUFFIXES,
    Item,
    Listing,
    from_paths,
    grouped,
    is_hidden,
    member_of,
    suffix_of,
    why_unsafe,
    why_wrong_size,
)
from vae_dist.packing.unpacked import write_once

COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
TAR_MEMBERS = ("cls", "json", MASK_MEMBER, "txt")  # of a sample, taken along with its picture
MAX_LABEL_BYTES = 32  # of a .cls


class FolderSource:
    """Pictures under a folder, at any depth."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    def list(self) -> Listing:
        found: list[Item] = []
        refused: list[tuple[str, str]] = []
        for folder, subfolders, names in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            for name in sorted(names):
                path = os.path.join(folder, name)
                inner = os.path.relpath(path, self.folder).replace(os.sep, "/")
                if suffix_of(name) not in SUFFIXES or is_hidden(name):
                    continue
                size, reason = _size_of(path)
                reason = reason or why_wrong_size(inner, size)
                if reason is None or member_of(inner)[1] == MASK_MEMBER:
                    found.append(Item(inner, None, size))
                else:
                    refused.append((inner, reason))
        pictures, alone = grouped(found, (MASK_MEMBER,))
        return Listing(from_paths(pictures), refused + alone)

    def read(self, item: Item) -> tuple[str, bytes]:
        try:
            with open(os.path.join(self.folder, item.name), "rb") as file:
                return suffix_of(item.name), file.read()
        except OSError as error:
            raise DamagedSampleError(f"cannot be read ({error.strerror})") from None


def _size_of(path: str) -> tuple[int, str | None]:
    """Bytes of a file, or why they are not known."""
    try:
        return os.stat(path).st_size, None
    except OSError as error:
        return 0, error.strerror or "cannot be read"


class ZipSource:
    """Pictures in a zip file."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by process

    def list(self) -> Listing:
        found: list[Item] = []
        refused: list[tuple[str, str]] = []
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ConfigError(f"source={self.path}: no readable zip file ({error})") from error
        for number, member in enumerate(members):
            name = member.filename
            if member.is_dir() or is_hidden_or_other(name):
                continue
            reason = why_unsafe(name) or why_wrong_size(name, member.file_size)
            if member.flag_bits & 1 and member_of(name)[1] != MASK_MEMBER:
                reason = "encrypted"
            if reason is not None:
                refused.append((name, reason))
            else:
                found.append(Item(name, number, member.file_size))
        pictures, alone = grouped(found, (MASK_MEMBER,))
        return Listing(from_paths(pictures), refused + alone)

    def read(self, item: Item) -> tuple[str, bytes]:
        try:
            archive = self._archive()
            with archive.open(archive.infolist()[item.place]) as file:  # names may be there twice
                data = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # BadZipFile, OSError, zlib.error and others
            raise DamagedSampleError(f"damaged in the zip file ({error})") from None
        return suffix_of(item.name), data

    def _archive(self) -> zipfile.ZipFile:
        """An archive of this process' own: a file that is shared by a fork shares its position."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}


class TarSource:
    """Pictures in one or more tars; `NAME.cls` beside `NAME.jpg` is its class."""

    def __init__(self, paths: list[str], *, work_folder: str | Path) -> None:
        self.paths = paths
        self.work_folder = Path(work_folder)
        self.plain: list[str] = []

    def list(self) -> Listing:
        self.plain = [plain_tar(path, self.work_folder) for path in self.paths]
        pictures: list[Item] = []
        refused: list[tuple[str, str]] = []
        for tar, path in enumerate(self.plain):
            found: list[Item] = []
            for name, at, size in files_of_tar(path):
                reason = why_unsafe(name) or why_wrong_size(name, size)
                if reason is not None:
                    refused.append((name, reason))
                elif not is_hidden(name):
                    found.append(Item(name, (tar, at, size), size))
            own, left_out = grouped(found, TAR_MEMBERS)
            pictures += own
            refused += left_out
        return Listing([self._labelled(item) for item in from_paths(pictures)], refused)

    def _labelled(self, item: Item) -> Item:
        """The item with its .cls for a category."""
        files = dict(item.companions)
        found = files.pop("cls", None)
        if found is None:
            return item
        tar, at, size = found.place
        text = self._read(tar, at, min(size, MAX_LABEL_BYTES))
        category: int | str
        try:
            category = int(text)
        except ValueError:
            category = text.decode("utf-8", "replace").strip()
        return item._replace(category=category, companions=tuple(files.items()))

    def read(self, item: Item) -> tuple[str, bytes]:
        data = self._read(*item.place)
        if len(data) < item.place[2]:
            raise DamagedSampleError("the tar ends inside this file")
        return suffix_of(item.name), data

    def _read(self, tar: int, at: int, size: int) -> bytes:
        with open(self.plain[tar], "rb") as file:
            file.seek(at)
            return file.read(size)


def is_hidden_or_other(name: str) -> bool:
    return suffix_of(name) not in SUFFIXES or (is_hidden(name) and why_unsafe(name) is None)


def plain_tar(path: str, work_folder: Path) -> str:
    """The tar itself, or where it lies uncompressed. Raises ConfigError."""
    with open(path, "rb") as file:
        magic = file.read(6)
    opened = next((way for mark, way in COMPRESSIONS.items() if magic.startswith(mark)), None)
    if opened is None:
        return path
    stat = os.stat(path)
    plain = work_folder / f"{Path(path).name}-{stat.st_size}-{stat.st_mtime_ns}.tar"
    if not plain.exists():
        try:
            with opened(path, "rb") as source:
                write_once(plain, lambda target: shutil.copyfileobj(source, target, 1 << 20))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ConfigError(f"source={path}: cannot be unpacked ({error})") from error
    return str(plain)
