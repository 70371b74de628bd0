"""What a source of pictures is: a list of items, and the bytes of each.

In: paths as they stand in a folder or an archive. Out: `Item`s with split and category.

A path is read as `[SPLIT/][CATEGORY/]...NAME.suffix`: SPLIT is one of train, val, valid,
validation, test; CATEGORY is the first folder above the picture that is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from vae_dist.config.errors import ConfigError

READABLE = ("png", "jpg", "jpeg", "webp", "npy", "tif", "tiff")  # as the trainer reads them
CONVERTED = ("bmp", "gif", "ppm", "pgm")  # become PNG
SUFFIXES = (*READABLE, *CONVERTED)
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
MAX_FILE_BYTES = 1 << 30  # one picture; a larger one is refused before it is read


class Item(NamedTuple):
    """One picture of a source."""

    name: str  # as the source calls it, for messages and for the list of names
    place: Any  # where `Source.read` finds it; small, since plans hold one for each picture
    num_bytes: int  # roughly
    split: str | None = None  # train, validation, test; None: the source has no splits
    category: str | int | None = None  # name or number of its class
    extra: dict[str, Any] | None = None  # kept as .json


class Listing(NamedTuple):
    items: list[Item]
    refused: list[tuple[str, str]]  # (name, reason) of what is left out
    classes: tuple[str, ...] = ()  # names of the classes that are given as numbers


class Source(Protocol):
    """Where pictures come from. It is handed to other processes, so it holds no open file."""

    def list(self) -> Listing: ...

    def read(self, item: Item) -> tuple[str, bytes]:
        """Suffix and bytes of a picture. Raises DamagedSampleError."""
        ...


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def why_unsafe(name: str) -> str | None:
    """Why a member of an archive is refused by its name, or None."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or parts[0].endswith(":"):
        return "an absolute path"
    if ".." in parts:
        return "a path with .."
    return None


def is_hidden(name: str) -> bool:
    """Files that systems leave in folders and archives: .DS_Store, __MACOSX/._1.jpg."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def from_paths(paths: Iterable[tuple[str, Any, int]]) -> list[Item]:
    """Items of (path, place, bytes); a folder that all pictures share says nothing."""
    entries = [(PurePosixPath(path).parts, path, place, size) for path, place, size in paths]
    shared = 0
    while entries and all(
        len(parts) > shared + 1
        and parts[shared] == entries[0][0][shared]
        and parts[shared].lower() not in SPLITS
        for parts, *_ in entries
    ):
        shared += 1
    items = []
    for parts, path, place, size in entries:
        folders = parts[shared:-1]
        split = SPLITS.get(folders[0].lower()) if folders else None
        if split is not None:
            folders = folders[1:]
        items.append(Item(path, place, size, split, folders[0] if folders else None))
    return items


def numbered(listing: Listing) -> tuple[list[Item], tuple[str, ...]]:
    """Items whose category is a number or None, and the names of the numbers.

    Raises ConfigError when names and numbers are mixed.
    """
    categories = {item.category for item in listing.items if item.category is not None}
    names = sorted(category for category in categories if isinstance(category, str))
    if not names:
        return listing.items, listing.classes
    if len(names) < len(categories):
        raise ConfigError("source: some classes are named and some are numbers; use one kind")
    number = {name: i for i, name in enumerate(names)}
    items = [
        item if item.category is None else item._replace(category=number[str(item.category)])
        for item in listing.items
    ]
    return items, tuple(names)
