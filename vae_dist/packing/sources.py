"""Pictures of folders and archives, grouped into samples.

In: `source=`: folders, zip files, tars (also compressed), parquet files, patterns and lists of
them, `hf://datasets/OWNER/NAME`, or the name of a known data set. Out: a `Listing`: pictures with
split and category, and every file that becomes no sample: lost (counted) or left out (named).

A path is read as `[SPLIT/][CATEGORY/]...NAME.suffix`: SPLIT is train, val, valid, validation, test;
CATEGORY is the first folder that is left. `NAME.mask.png` says which pixels of NAME are missing; of
a tar, whose samples are those of WebDataset, NAME.cls, NAME.json and NAME.txt are taken along too.
Members of archives are never written by their names.
"""

from __future__ import annotations

import glob
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, kind_of
from vae_dist.data.tar import DamagedSampleError, PassedOver, files_of_tar, key_and_suffix
from vae_dist.packing import labels, rows
from vae_dist.packing.items import (
    LEFT_BEHIND,
    PICTURES,
    SPLITS,
    Item,
    Listing,
    Place,
    most_bytes,
    read,
    split_of,
    stem_and_member,
    suffix_of,
)

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".parquet")
TAR_MEMBERS = ("cls", "json", MASK_MEMBER, "txt")  # of a sample, taken along with its picture
STATS = "_stats.json"  # of img2dataset, beside the folder or tar that it is of
MAX_LABEL_BYTES = 32  # of a .cls


def list_source(command: PackCommand, *, work: Path) -> Listing:
    """What `command.source` names, with the labels that go with it. What is compressed is unpacked
    once into `work`. Raises ConfigError."""
    lister = _Lister(command, work)
    spec = command.source
    for part in spec if isinstance(spec, list | tuple) else [spec]:
        lister.add(str(part))
    found = lister.found
    found.items = [*with_splits_and_categories(lister.pictures, lister.parts), *found.items]
    labels.apply_tables(command, found)
    return found


class _Lister:
    """Collects what lies in a source."""

    def __init__(self, command: PackCommand, work: Path) -> None:
        self.command, self.work = command, work
        self.found = Listing()  # its items are rows, which know their splits and classes
        self.pictures: list[Item] = []  # whose paths say split and category
        self.parts: set[str] = set()  # folders that are parts of a download, and no classes
        self._seen: set[str] = set()  # folders

    def add(self, spec: str) -> None:
        """A path, a pattern, or a data set of the hub."""
        path = os.path.expanduser(spec)
        if (spec in rows.HUB or spec.startswith("hf://")) and not os.path.exists(path):
            for file, name in rows.download(spec):
                self._add_archive(file, split_of(name))
            return
        paths = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        is_alone = len(paths) == 1 and isinstance(self.command.source, str)
        for path in paths:
            name = os.path.basename(path)
            if os.path.isdir(path):
                self._add_folder(path)
            elif problem := _why_no_file(path):
                raise ConfigError(f"source={spec}: {problem}")
            elif name.lower().endswith(ARCHIVES):
                self._add_archive(path, None if is_alone else split_of(name))
            else:
                self._add_files([Item(name, Place(path, 0, os.path.getsize(path)))])
        if not paths:
            raise ConfigError(
                f"source={spec}: no such file; give a folder of pictures or archives, an archive "
                "or hf://datasets/OWNER/NAME"
            )

    def _add_folder(self, folder: str) -> None:
        digits, files = rows.mnist_items(list(self._walk(folder)), self.work)
        self.found.items += digits
        self._add_files([file for file in files if not file.name.lower().endswith(ARCHIVES)])
        for file in files:
            if file.name.lower().endswith(ARCHIVES):
                self._add_archive(file.place.path, split_of(file.name))

    def _walk(self, root: str) -> Iterator[Item]:
        """Files first, then folders, each by name; a folder that is linked to is listed once."""

        def unreadable(error: OSError) -> None:
            self.found.lose(error.filename, f"a folder, cannot be read ({error.strerror})")

        for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
            prefix = "" if folder == root else f"{os.path.relpath(folder, root)}/"
            if (real := os.path.realpath(folder)) in self._seen:
                self.found.leave(prefix, "a link to a folder that is listed already")
                folders.clear()
                continue
            self._seen.add(real)
            self.parts |= {name.removesuffix(STATS) for name in names if name.endswith(STATS)}
            folders[:] = sorted(name for name in folders if not LEFT_BEHIND.search(name))
            for name in sorted(name for name in names if not LEFT_BEHIND.search(name)):
                path = os.path.join(folder, name)
                if problem := _why_no_file(path):
                    self._refuse(prefix + name, problem)
                else:
                    yield Item(prefix + name, Place(path, 0, os.path.getsize(path)))

    def _refuse(self, name: str, reason: str) -> None:
        """Lost where it is a picture by its name, else left out."""
        is_picture = suffix_of(name) in PICTURES
        (self.found.lose if is_picture else self.found.leave)(name, reason)

    # archives

    def _add_archive(self, path: str, split: str | None) -> None:
        if path.lower().endswith(".parquet"):
            rows.add_parquet(self.found, path, split, self.work, self.command)
            return
        is_zip, files = path.lower().endswith(".zip"), []
        for file in self._of_zip(path) if is_zip else self._of_tar(path):
            parts = file.name.split("/")
            if not parts[0] or parts[0].endswith(":") or ".." in parts:
                self._refuse(file.name, "an absolute path, or one with ..")
            elif not LEFT_BEHIND.search(file.name):
                files.append(file._replace(split=split))
        self._add_files(files, is_shard=not is_zip)

    def _of_zip(self, path: str) -> Iterator[Item]:
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"source={path}: no readable zip file ({error})") from error
        for number, member in enumerate(members):
            name, size = member.filename.replace("\\", "/"), member.file_size
            if member.flag_bits & 1:
                self._refuse(name, "encrypted")
            elif size > most_bytes(member.compress_size):
                self._refuse(name, f"{member.compress_size} bytes that claim to be {size}")
            elif not name.endswith("/"):
                yield Item(name, Place(path, number, size, is_zipped=True))

    def _of_tar(self, path: str) -> Iterator[Item]:
        plain = rows.plain_copy(path, self.work)
        passed: list[PassedOver] = []
        places: dict[str, Place] = {}  # tar of a folder calls its files ./NAME
        for name, at, size in files_of_tar(plain, passed):
            file = Item(name, Place(plain, at, size))
            places[os.path.normpath(name)] = file.place
            yield file
        for name, target, reason in passed:
            if place := places.get(os.path.normpath(target)):
                yield Item(name, place)
            else:
                self._refuse(name or os.path.basename(path), reason)

    # samples

    def _add_files(self, files: list[Item], *, is_shard: bool = False) -> None:
        """Group the files of one folder or archive into samples, after WebDataset's rule where it
        is a shard: there NAME.depth.png and NAME.png are no pictures beside NAME.jpg."""
        records, files, classes = rows.cifar_items(files)
        self.found.items += records
        self.found.classes = self.found.classes or classes
        image_key = self.command.image_key.lower()
        taken = TAR_MEMBERS if is_shard else (MASK_MEMBER,)
        companions: dict[str, dict[str, Item]] = {}  # by stem, by member
        candidates: list[tuple[Item, str, str]] = []  # file, stem, member
        others: Counter[str] = Counter()
        for file in files:
            stem, member = stem_and_member(file.name, image_key)
            if member in taken and member != image_key:
                companions.setdefault(stem, {})[member] = file
            elif member == image_key if image_key else _is_picture(file, member):
                candidates.append((file, stem, member))
            else:
                others[member] += 1
        first: dict[str, str] = {}  # by stem: the member that is the picture, in a shard
        for _, stem, member in candidates:
            first[stem] = min(first.get(stem, member), member, key=(*PICTURES, "", image_key).index)
        for file, stem, member in candidates:
            key, suffix = key_and_suffix(file.name)
            is_beside = "." in stem.rpartition("/")[2] and key in first
            if is_shard and (is_beside or member != first[stem]):
                others[suffix.lower()] += 1
            elif not file.place.size:
                self.found.lose(file.name, "an empty file")
            else:
                self.pictures.append(_with_members(file, companions.get(stem, {})))
        for stem in companions.keys() - first.keys():
            others.update(companions[stem].keys())
        for kind, num in sorted(others.items()):
            name = f"*.{kind}" if kind else "files without suffix"
            self.found.leave(name, f"{num} files that are not packed")


def _why_no_file(path: str) -> str:
    """Why a path is no plain file, or nothing. What a FIFO or a device gives has no end."""
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "no regular file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _is_picture(file: Item, suffix: str) -> bool:
    """By its suffix, or where it has none by its first bytes."""
    if suffix or not file.place.size:
        return suffix in PICTURES
    try:
        return kind_of(read(file.place._replace(size=min(file.place.size, 16)))) is not None
    except DamagedSampleError:
        return False


def _with_members(picture: Item, members: dict[str, Item]) -> Item:
    """The picture with the other members of its sample; the .cls becomes its category."""
    others = tuple(sorted((name, file) for name, file in members.items() if name != "cls"))
    category: int | str | None = None
    if label := members.get("cls"):
        text = read(label.place._replace(size=min(label.place.size, MAX_LABEL_BYTES)))
        try:
            category = int(text)
        except ValueError:
            category = text.decode("utf-8", "replace").strip()
    return picture._replace(category=category, companions=others)


# splits and categories


def with_splits_and_categories(files: Sequence[Item], no_classes: Collection[str]) -> list[Item]:
    """After the folders of their paths; a folder that all pictures share says nothing.

    The split is the first folder, or, where every picture lies below one of such a name, any. A
    category that a picture has stays. no_classes: folders that are none.
    """
    folders = [list(PurePosixPath(file.name).parts[:-1]) for file in files]
    while folders and all(
        parts and parts[0] == folders[0][0] and parts[0].lower() not in SPLITS for parts in folders
    ):
        folders = [parts[1:] for parts in folders]
    places = [
        next((i for i, part in enumerate(parts) if part.lower() in SPLITS), None)
        for parts in folders
    ]
    is_everywhere = None not in places
    items = []
    for file, parts, place in zip(files, folders, places, strict=True):
        split, category = file.split, file.category
        if place is not None and (place == 0 or is_everywhere):
            split = SPLITS[parts.pop(place).lower()]
        if category is None and parts and parts[0] not in no_classes:
            category = parts[0]
        items.append(file._replace(split=split, category=category))
    return items


def number_classes(listing: Listing) -> None:
    """Give names of classes numbers, in their order; names that are numbers, as folders 0 to 9, are
    ordered as numbers. Raises ConfigError when names and numbers are mixed."""
    categories = {item.category for item in listing.items if item.category is not None}
    names = sorted(category for category in categories if isinstance(category, str))
    if not names:
        return
    if len(names) < len(categories):
        raise ConfigError("source: some classes are named and some are numbers; use one kind")
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number: dict[Any, int] = {name: i for i, name in enumerate(names)}
    listing.items = [item._replace(category=number.get(item.category)) for item in listing.items]
    listing.classes = tuple(names)
