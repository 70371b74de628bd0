"""Pictures of a source: what they are called, and how their bytes are read.

In: names and places. Out: `Item`s, `Listing`s, bytes. A place is small, since plans hold one for
each picture, and holds no open file, since processes share it.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zipfile
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vae_dist.data.decode import MASK_MEMBER
from vae_dist.data.tar import DamagedSampleError

READABLE = ("png", "jpg", "jpeg", "webp", "npy", "tif", "tiff")  # as the trainer reads them
CONVERTED = ("bmp", "gif", "ppm", "pgm")  # become PNG
BY_CONTENT = ("jfif", "jpe", "avif", "heic", "heif", "jxl", "jp2")  # decoded where Pillow can
PICTURES = (*READABLE, *CONVERTED, *BY_CONTENT)
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
METADATA = ("_info.json", "shards.json", "thumbs.db", "desktop.ini")
MAX_FILE_BYTES = 1 << 30  # one picture; a larger one is refused before it is read

Named = tuple[str, str]  # (name, reason)


class InFile(NamedTuple):
    """Bytes of a file, all of them by default; with `pixels`, raw ones of that shape."""

    path: str
    at: int = 0
    size: int = -1
    pixels: tuple[int, ...] = ()  # (H, W) or (C, H, W), uint8


class InZip(NamedTuple):
    path: str
    number: int  # of the member: a name may be there twice


class Item(NamedTuple):
    """One picture of a source, or another file of it."""

    name: str  # as the source calls it, for messages and for the list of names
    place: InFile | InZip
    num_bytes: int  # roughly
    split: str | None = None  # train, validation, test; None: the source has no splits
    category: str | int | None = None  # name or number of its class
    extra: dict[str, Any] | None = None  # kept as .json
    companions: tuple[tuple[str, Item], ...] = ()  # (member of the sample, as mask.png; its file)


class Listing(NamedTuple):
    items: list[Item]
    lost: list[Named]  # pictures that cannot be read: they count as damaged ones do
    left_out: list[Named]  # what is no picture, or is not asked for
    classes: tuple[str, ...] = ()  # names of the classes that are given as numbers
    notes: tuple[str, ...] = ()  # what a user wants to know of what is packed


# reading


def read(place: InFile | InZip) -> bytes:
    """The bytes of a file; raw pixels become PNG. Raises DamagedSampleError."""
    if isinstance(place, InZip):
        return _read_member(place)
    try:
        with open(place.path, "rb") as file:
            file.seek(place.at)
            data = file.read(place.size)
    except OSError as error:
        raise DamagedSampleError(f"cannot be read ({error.strerror})") from None
    if len(data) < place.size:
        raise DamagedSampleError("its archive ends inside this file")
    return _png(data, place.pixels) if place.pixels else data


def _read_member(place: InZip) -> bytes:
    try:
        archive = _opened_zip(place.path, os.getpid())
        with archive.open(archive.infolist()[place.number]) as file:
            return file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # BadZipFile, OSError, zlib.error and others
        raise DamagedSampleError(f"damaged in the zip file ({error})") from None


@functools.lru_cache(maxsize=4)
def _opened_zip(path: str, pid: int) -> zipfile.ZipFile:
    """By process: a file that is shared by a fork shares its position."""
    return zipfile.ZipFile(path)


def _png(data: bytes, shape: tuple[int, ...]) -> bytes:
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    file = io.BytesIO()
    Image.fromarray(pixels if len(shape) == 2 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


# names


def one_line(name: str) -> str:
    """A name without the characters that end a line or a column."""
    return name.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def shown_name(name: str) -> str:
    """A name as every terminal can show it: names of files need not be UTF-8."""
    return one_line(name).encode("utf-8", "backslashreplace").decode()


def suffix_of(name: str) -> str:
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last else ""


def stem_and_member(name: str) -> tuple[str, str]:
    """What pictures and companions of one sample share, and which member of it this file is."""
    mask = f".{MASK_MEMBER}"
    if name.lower().endswith(mask):
        return name[: -len(mask)], MASK_MEMBER
    suffix = suffix_of(name)
    return name[: len(name) - len(suffix) - 1] if suffix else name, suffix


def why_unsafe(name: str) -> str | None:
    """Why a member of an archive is refused by its name, or None."""
    parts = name.split("/")
    if name.startswith("/") or parts[0].endswith(":"):
        return "an absolute path"
    return "a path with .." if ".." in parts else None


def why_wrong_size(file: Item) -> str | None:
    """Why a picture is refused by its size, or None."""
    if 0 < file.num_bytes <= MAX_FILE_BYTES:
        return None
    return "an empty file" if file.num_bytes == 0 else "too large"


def is_hidden(name: str) -> bool:
    """Files that systems and tools leave behind: .DS_Store, __MACOSX/._1.jpg, 00000_stats.json."""
    parts = [part for part in name.split("/") if part != "."]
    return any(part.startswith((".", "__MACOSX")) for part in parts) or (
        parts[-1].lower() in METADATA or parts[-1].endswith(("_stats.json", ".tar.idx"))
    )


def split_of(name: str) -> str | None:
    """The split that the path of an archive or a table names: one of its folders, its first word,
    or the word before a number (test/0000.parquet, test-00000-of-00002, faces-val-000.tar)."""
    *folders, last = name.lower().split("/")
    words = re.split(r"[-_.]", last)
    numbered = [word for word, after in pairwise(words) if after.isdigit()]
    return next((SPLITS[word] for word in (*folders, words[0], *numbered) if word in SPLITS), None)
