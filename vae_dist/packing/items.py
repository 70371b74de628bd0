"""What a source of pictures is: a list of items, and the bytes of each.

In: paths as they stand in a folder or an archive. Out: `Item`s with split and category.

A path is read as `[SPLIT/][CATEGORY/]...NAME.suffix`: SPLIT is one of train, val, valid,
validation, test; CATEGORY is the first folder above the picture that is left. `NAME.mask.png`
beside a picture says which of its pixels are missing: it goes with it and is no picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER

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
    companions: tuple[tuple[str, Item], ...] = ()  # (member of the sample, as mask.png; its file)


class Listing(NamedTuple):
    items: list[Item]
    refused: list[tuple[str, str]]  # (name, reason) of what is left out
    classes: tuple[str, ...] = ()  # names of the classes that are given as numbers


class Source(Protocol):
    """Where pictures come from. It is handed to other processes, so it holds no open file."""

    def list(self) -> Listing: ...

    def read(self, item: Item) -> tuple[str, bytes]:
        """Suffix and bytes of a picture or of a companion. Raises DamagedSampleError."""
        ...


def suffix_of(name: str) -> str:
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last else ""


def member_of(name: str) -> tuple[str, str]:
    """What pictures and companions of one sample share, and which member of it this file is."""
    mask = f".{MASK_MEMBER}"
    if name.lower().endswith(mask):
        return name[: -len(mask)], MASK_MEMBER
    return name.rpartition(".")[0], suffix_of(name)


def why_wrong_size(name: str, num_bytes: int) -> str | None:
    """Why a picture is refused by its size, or None; a companion goes with its picture."""
    if member_of(name)[1] not in SUFFIXES or 0 < num_bytes <= MAX_FILE_BYTES:
        return None
    return "an empty file" if num_bytes == 0 else "too large"


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
    parts = [part for part in name.split("/") if part != "."]
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def grouped(
    files: Iterable[Item], members: Sequence[str]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """The pictures among the files of one folder or archive, with their companions.

    members: kinds of companions that are taken along. What goes with no picture is left out by
    name, or by kind where it is no mask.
    """
    pictures: list[Item] = []
    companions: dict[str, dict[str, Item]] = {}  # by stem, by member
    num_others: Counter[str] = Counter()
    for file in files:
        stem, member = member_of(file.name)
        if member in members:
            companions.setdefault(stem, {})[member] = file
        elif member in SUFFIXES:
            pictures.append(file)
        else:
            num_others[member] += 1
    stems = [member_of(picture.name)[0] for picture in pictures]
    items = [
        picture._replace(companions=tuple(sorted(companions.get(stem, {}).items())))
        for picture, stem in zip(pictures, stems, strict=True)
    ]
    masks = []
    for stem in sorted(companions.keys() - set(stems)):
        mask = companions[stem].pop(MASK_MEMBER, None)
        masks += [(mask.name, "the mask of no picture")] if mask else []
        num_others.update(companions[stem].keys())
    return items, masks + _left_out(num_others, members)


def _left_out(num_files: Counter[str], members: Sequence[str]) -> list[tuple[str, str]]:
    reason = f"only .{', .'.join(members)} of a picture's name are taken along"
    return [
        (f"*.{kind}" if kind else "files without suffix", f"{count} files; {reason}")
        for kind, count in sorted(num_files.items())
    ]


def from_paths(files: Iterable[Item]) -> list[Item]:
    """Items with split and category; a folder that all pictures share says nothing."""
    entries = [(PurePosixPath(file.name).parts, file) for file in files]
    shared = 0
    while entries and all(
        len(parts) > shared + 1
        and parts[shared] == entries[0][0][shared]
        and parts[shared].lower() not in SPLITS
        for parts, *_ in entries
    ):
        shared += 1
    items = []
    for parts, file in entries:
        folders = parts[shared:-1]
        split = SPLITS.get(folders[0].lower()) if folders else None
        if split is not None:
            folders = folders[1:]
        items.append(file._replace(split=split, category=folders[0] if folders else None))
    return items


def numbered(listing: Listing) -> tuple[list[Item], tuple[str, ...]]:
    """Items whose category is a number or None, and the names of the numbers, in their order.

    Names that are numbers, as folders 0 to 9, are ordered as numbers. Raises ConfigError when
    names and numbers are mixed.
    """
    categories = {item.category for item in listing.items if item.category is not None}
    names = sorted(category for category in categories if isinstance(category, str))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
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


def check_splits(items: Sequence[Item]) -> None:
    """Raises ConfigError when some pictures have a split and others have none: which one is meant
    by a folder `train` between folders of classes?"""
    inside = [item for item in items if item.split is not None]
    outside = [item for item in items if item.split is None]
    if inside and outside:
        raise ConfigError(
            f"source: {len(inside)} pictures belong to a split ({inside[0].name}: "
            f"{inside[0].split}) and {len(outside)} to none ({outside[0].name}); put all of them "
            "below folders train, validation and test (a class of such a name below them too), or "
            "none, or say it in a column split of labels="
        )
