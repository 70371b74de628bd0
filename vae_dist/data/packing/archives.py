"""Pictures in folders, zip files and tars.

Members of archives are read into memory and never written by their names; those with an absolute
path or `..` are refused by name. A tar that is compressed is unpacked once into one plain tar in
the work folder, so that pictures can be read in any order.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.data.packing.items import (
    MAX_FILE_BYTES,
    SUFFIXES,
    Item,
    Listing,
    from_paths,
    is_hidden,
    suffix_of,
    why_unsafe,
)
from vae_dist.data.tar import DamagedSampleError, files_of_tar

COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class FolderSource:
    """Pictures under a folder, at any depth."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    def list(self) -> Listing:
        found: list[tuple[str, Any, int]] = []
        refused: list[tuple[str, str]] = []
        for folder, subfolders, names in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            for name in sorted(names):
                path = os.path.join(folder, name)
                inner = os.path.relpath(path, self.folder).replace(os.sep, "/")
                if suffix_of(name) not in SUFFIXES or is_hidden(name):
                    continue
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    refused.append((inner, error.strerror or "cannot be read"))
                    continue
                if 0 < size <= MAX_FILE_BYTES:
                    found.append((inner, None, size))
                else:
                    refused.append((inner, "an empty file" if size == 0 else "too large"))
        return Listing(from_paths(found), refused)

    def read(self, item: Item) -> tuple[str, bytes]:
        try:
            with open(os.path.join(self.folder, item.name), "rb") as file:
                return suffix_of(item.name), file.read()
        except OSError as error:
            raise DamagedSampleError(f"cannot be read ({error.strerror})") from None


class ZipSource:
    """Pictures in a zip file."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by process

    def list(self) -> Listing:
        found: list[tuple[str, Any, int]] = []
        refused: list[tuple[str, str]] = []
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ConfigError(f"source={self.path}: no readable zip file ({error})") from error
        for member in members:
            name = member.filename
            if member.is_dir() or is_hidden_or_other(name):
                continue
            reason = why_unsafe(name)
            if member.flag_bits & 1:
                reason = "encrypted"
            elif member.file_size == 0:
                reason = "an empty file"
            elif member.file_size > MAX_FILE_BYTES:
                reason = "too large"
            if reason is not None:
                refused.append((name, reason))
            else:
                found.append((name, None, member.file_size))
        return Listing(from_paths(found), refused)

    def read(self, item: Item) -> tuple[str, bytes]:
        try:
            with self._archive().open(item.name) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, KeyError) as error:
            raise DamagedSampleError(f"damaged in the zip file ({error})") from None
        except Exception as error:  # zlib.error and others of the decompressors
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
        found: list[tuple[str, Any, int]] = []
        refused: list[tuple[str, str]] = []
        labels: dict[tuple[int, str], tuple[int, int]] = {}
        for tar, path in enumerate(self.plain):
            for name, at, size in files_of_tar(path):
                if suffix_of(name) == "cls":
                    labels[tar, name.rpartition(".")[0]] = (at, size)
                    continue
                if is_hidden_or_other(name):
                    continue
                reason = why_unsafe(name)
                if size == 0 or size > MAX_FILE_BYTES:
                    reason = "an empty file" if size == 0 else "too large"
                if reason is not None:
                    refused.append((name, reason))
                else:
                    found.append((name, (tar, at, size), size))
        items = from_paths(found)
        return Listing([self._labelled(item, labels) for item in items], refused)

    def _labelled(self, item: Item, labels: dict[tuple[int, str], tuple[int, int]]) -> Item:
        found = labels.get((item.place[0], item.name.rpartition(".")[0]))
        if found is None:
            return item
        text = self._read(item.place[0], found[0], min(found[1], 32))
        try:
            return item._replace(category=int(text))
        except ValueError:
            return item._replace(category=text.decode("utf-8", "replace").strip())

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
        work_folder.mkdir(parents=True, exist_ok=True)
        partial = plain.with_name(f".{plain.name}.{os.getpid()}.tmp")
        try:
            with opened(path, "rb") as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.replace(partial, plain)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ConfigError(f"source={path}: cannot be unpacked ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
    return str(plain)
