"""Files of a source: what their names say, where their bytes lie, and how these are read.

A place is small, since plans hold one for each picture, and holds no open file, since processes
share it. What is compressed may unpack to `most_bytes`, so that no small file fills a disk.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zipfile
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vae_dist.data.decode import MASK_MEMBER
from vae_dist.data.tar import DamagedSampleError
from vae_dist.files import printable

# Suffixes of pictures; what the trainer does not read becomes PNG or JPEG. Of several pictures of
# one sample the first in this order is packed.
BY_CONTENT = ("jfif", "jpe", "avif", "heic", "heif", "jxl", "jp2")  # packed where Pillow can decode
PICTURES = (
    *("jpg", "jpeg", "webp", "png", "tif", "tiff", "npy", "bmp", "gif", "ppm", "pgm"),
    *BY_CONTENT,
)
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What systems and tools leave beside pictures: .DS_Store, __MACOSX/._1.jpg, 00000_stats.json, and
# what belongs to shards, to `pack` and to CelebA
LEFT_BEHIND = re.compile(
    r"(^|/)(\.(?!/|$)|__MACOSX|(thumbs\.db|desktop\.ini|(_info|shards|pack)\.json|names\.txt|"
    r"contact-sheet\.png|list_(eval_partition|attr_celeba)\.(txt|csv))$)|(_stats\.json|\.tar\.idx)$",
    re.IGNORECASE,
)
MAX_FILE_BYTES = 1 << 30  # one picture; a larger one is refused before it is read
NUM_OPEN_ZIPS = 64


class Place(NamedTuple):
    path: str
    at: int  # first byte, or the number of a member of a zip: a name may be there twice
    size: int  # bytes
    pixels: tuple[int, ...] = ()  # raw uint8, (H, W) or (C, H, W): they become PNG
    is_zipped: bool = False


class Item(NamedTuple):
    """One picture of a source, or another file of it."""

    name: str  # as the source calls it, for messages and for the list of names
    place: Place
    split: str | None = None  # train, validation, test; None: the source has no splits
    category: str | int | None = None  # name or number of its class
    extra: dict[str, Any] | None = None  # kept as .json
    companions: tuple[tuple[str, Item], ...] = ()  # (member of the sample, as mask.png; its file)


@dataclass
class Listing:
    """All that lies in a source."""

    items: list[Item] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # unreadable pictures: they count as damaged
    left_out: list[str] = field(default_factory=list)  # no picture, or not asked for
    classes: tuple[str, ...] = ()  # names of the classes that are given as numbers

    def lose(self, name: str, reason: str) -> None:
        self.lost.append(f"{printable(name)}: {reason}")

    def leave(self, name: str, reason: str) -> None:
        self.left_out.append(f"{printable(name)}: {reason}")


def read(place: Place) -> bytes:
    """The bytes of a file; raw pixels become PNG. Raises DamagedSampleError."""
    if place.size >= MAX_FILE_BYTES:
        raise DamagedSampleError("too large")
    try:
        if place.is_zipped:
            archive = _opened_zip(place.path, os.getpid())
            with archive.open(archive.infolist()[place.at]) as member:
                data = member.read(place.size)
        else:
            with open(place.path, "rb") as file:
                file.seek(place.at)
                data = file.read(place.size)
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        raise DamagedSampleError(f"cannot be read ({error})") from None
    if len(data) < place.size:
        raise DamagedSampleError("its archive ends inside this file")
    if not place.pixels:
        return data
    png = io.BytesIO()
    pixels = np.frombuffer(data, np.uint8).reshape(place.pixels)
    Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(png, "PNG")
    return png.getvalue()


@functools.lru_cache(maxsize=NUM_OPEN_ZIPS)
def _opened_zip(path: str, pid: int) -> zipfile.ZipFile:
    """By process: a file that is shared by a fork shares its position."""
    return zipfile.ZipFile(path)


def most_bytes(packed: int) -> int:
    """What so many bytes may unpack to: pictures hardly shrink, arrays and tables to a hundredth
    at most."""
    return max(1 << 26, 100 * packed)


# names


def suffix_of(name: str) -> str:
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last else ""


def stem_and_member(name: str, image_key: str = "") -> tuple[str, str]:
    """What pictures and companions of one sample share, and which member of it this file is."""
    for member in (MASK_MEMBER, image_key):
        if member and name.lower().endswith(f".{member}"):
            return name[: -len(member) - 1], member
    suffix = suffix_of(name)
    return name[: len(name) - len(suffix) - 1] if suffix else name, suffix


def split_of(name: str) -> str | None:
    """The split that the path of an archive or a table names: one of its folders, its first word,
    or the word before a number (test/0000.parquet, test-00000-of-00002, faces-val-000.tar)."""
    *folders, last = name.lower().split("/")
    words = re.split(r"[-_.]", last)
    numbered = [word for word, after in pairwise(words) if after.isdigit()]
    return next((SPLITS[word] for word in (*folders, words[0], *numbered) if word in SPLITS), None)
