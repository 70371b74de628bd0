"""What a source of pictures holds: files of folders and archives, grouped into samples.

In: `source=`: folders, zip files, tars (also compressed), parquet files, patterns and lists of
them, `hf://datasets/OWNER/NAME`, or the name of a known data set. Out: a `Listing`: pictures with
split and category, and every file that becomes no sample: lost (counted) or left out (named).

A path is read as `[SPLIT/][CATEGORY/]...NAME.suffix`: SPLIT is train, val, valid, validation, test;
CATEGORY is the first folder that is left. `NAME.mask.png` says which pixels of NAME are missing; of
a tar NAME.cls, NAME.json and NAME.txt are taken along too. Members of archives are never written by
their names. A compressed tar is unpacked once into the work folder, to be read in any order.
"""

from __future__ import annotations

import glob
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.decode import MASK_MEMBER, kind_of
from vae_dist.data.tar import DamagedSampleError, PassedOver, files_of_tar
from vae_dist.packing import hub, labels, rows
from vae_dist.packing.items import (
    BY_CONTENT,
    PICTURES,
    SPLITS,
    InFile,
    InZip,
    Item,
    Listing,
    Named,
    is_hidden,
    read,
    shown_name,
    split_of,
    stem_and_member,
    suffix_of,
    why_unsafe,
    why_wrong_size,
)

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (*TARS, ".zip", ".parquet")
TAR_MEMBERS = ("cls", "json", MASK_MEMBER, "txt")  # of a sample, taken along with its picture
OF_PACK = ("pack.json", "names.txt", "contact-sheet.png")  # that `pack` writes beside its shards
MAX_LABEL_BYTES = 32  # of a .cls
KINDS = (
    "a folder of pictures or archives, a .zip, a .tar (also .gz, .bz2, .xz), MNIST idx files, the "
    "binary archive of CIFAR-10, a folder with CelebA's lists, parquet files, "
    f"hf://datasets/OWNER/NAME, or one of the words {', '.join(hub.KNOWN)}"
)


def list_source(command: PackCommand, *, work: Path) -> Listing:
    """What `command.source` names, with the labels that go with it. Raises ConfigError."""
    lister = _Lister(command, work)
    spec = command.source
    for part in spec if isinstance(spec, list | tuple) else [spec]:
        lister.add(str(part))
    listing = lister.listing()
    if command.labels:
        table = labels.read_csv(Path(command.labels), label_column=command.label_column)
        return labels.apply(table, listing, name=f"labels={command.labels}")
    if lists := labels.celeba_lists(spec):
        table = labels.read_celeba_lists(*lists)
        return labels.apply(table, listing, name=str(lists[0].with_suffix("")))
    return listing


class _Lister:
    """Collects what lies in a source."""

    def __init__(self, command: PackCommand, work: Path) -> None:
        self.command, self.work = command, work
        self.with_path: list[Item] = []  # their paths say split and category
        self.others: list[Item] = []
        self.lost: list[Named] = []
        self.left_out: list[Named] = []
        self.notes: list[str] = []
        self.classes: tuple[str, ...] = ()
        self._parts: set[str] = set()  # folders that are parts of a download, and no classes
        self._seen: set[str] = set()  # folders

    def listing(self) -> Listing:
        items = with_splits_and_categories(self.with_path, no_classes=self._parts)
        found = [*items, *self.others]
        return Listing(found, self.lost, self.left_out, self.classes, tuple(self.notes))

    def add(self, spec: str) -> None:
        """A path, a pattern, or a data set of the hub."""
        path = os.path.expanduser(spec)
        if hub.names(spec) and not os.path.exists(path):
            for file, name in hub.download(spec):
                self._add_archive(file, split_of(name))
            return
        paths = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not paths:
            raise ConfigError(f"source={spec}: no such file; give {KINDS}")
        for path in paths:
            name = os.path.basename(path)
            if os.path.isdir(path):
                self._add_folder(path)
            elif name.lower().endswith(ARCHIVES):
                several = len(paths) > 1 or not isinstance(self.command.source, str)
                self._add_archive(path, split_of(name) if several else None)
            elif len(paths) > 1:  # of a pattern
                self._add_files([Item(name, InFile(path), os.stat(path).st_size)], (MASK_MEMBER,))
            else:
                raise ConfigError(f"source={spec}: is nothing that can be packed; give {KINDS}")

    def _add_folder(self, folder: str) -> None:
        files = list(self._walk(folder, ""))
        digits, files = rows.mnist_items(files, self.work)
        self.others += digits
        archives = [file for file in files if file.name.lower().endswith(ARCHIVES)]
        self._add_files([file for file in files if file not in archives], (MASK_MEMBER,))
        for archive in archives:
            self._add_archive(archive.place.path, split_of(archive.name))

    def _walk(self, folder: str, prefix: str) -> Iterator[Item]:
        """Files first, then folders, each by name; a folder that is linked to is listed once."""
        real = os.path.realpath(folder)
        if real in self._seen:
            self.left_out.append((prefix, "a link to a folder that is listed already"))
            return
        self._seen.add(real)
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self.lost.append((prefix or folder, f"a folder, cannot be read ({error.strerror})"))
            return
        ends = "_stats.json"  # of img2dataset, beside the folder or tar that it is of
        self._parts |= {f"{prefix}{n.removesuffix(ends)}" for n in names if n.endswith(ends)}
        own = OF_PACK if "pack.json" in names else ()
        folders = []
        for name in names:
            path = os.path.join(folder, name)
            if is_hidden(name) or name in own or name[:-4] in labels.CELEBA_LISTS:
                continue
            if os.path.isdir(path):
                folders.append((path, f"{prefix}{name}/"))
                continue
            size, reason = _size_of(path)
            if reason is None:
                yield Item(prefix + name, InFile(path), size)
            else:
                self._refuse(prefix + name, reason)
        for path, name in folders:
            yield from self._walk(path, name)

    def _refuse(self, name: str, reason: str) -> None:
        """Lost where it is a picture by its name, else left out."""
        is_picture = suffix_of(name) in PICTURES
        (self.lost if is_picture else self.left_out).append((name, reason))

    # archives

    def _add_archive(self, path: str, split: str | None) -> None:
        if path.lower().endswith(".zip"):
            self._add_zip(path, split)
        elif path.lower().endswith(".parquet"):
            found = rows.parquet_items(
                path,
                split,
                self.work,
                image_column=self.command.image_column,
                label_column=self.command.label_column,
            )
            self.others += found.items
            self.lost += found.lost
            self.left_out += found.left_out
            self.classes = self.classes or found.classes
        else:
            self._add_tar(path, split)

    def _add_zip(self, path: str, split: str | None) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ConfigError(f"source={path}: no readable zip file ({error})") from error
        files = []
        for number, member in enumerate(members):
            name = member.filename.replace("\\", "/")
            if member.is_dir() or name.endswith("/"):
                continue
            reason = "encrypted" if member.flag_bits & 1 else why_unsafe(name)
            if reason is not None:
                self._refuse(name, reason)
            elif not is_hidden(name):
                files.append(Item(name, InZip(path, number), member.file_size, split))
        self._add_files(files, (MASK_MEMBER,))

    def _add_tar(self, path: str, split: str | None) -> None:
        plain = rows.plain_copy(path, self.work)
        passed: list[PassedOver] = []
        places: dict[str, InFile] = {}
        files = []
        for name, at, size in files_of_tar(plain, passed):
            places[name] = InFile(plain, at, size)
            files.append(Item(name, places[name], size, split))
        for name, target, reason in passed:
            if place := places.get(target):
                files.append(Item(name, place, place.size, split))
            else:
                self._refuse(name or os.path.basename(path), reason)
        safe = []
        for file in files:
            if problem := why_unsafe(file.name):
                self._refuse(file.name, problem)
            elif not is_hidden(file.name):
                safe.append(file)
        self._add_files(safe, TAR_MEMBERS, is_shard=True)

    # samples

    def _add_files(
        self, files: list[Item], members: Sequence[str], *, is_shard: bool = False
    ) -> None:
        """The files of one folder or archive. members: kinds of companions that are taken along."""
        cifar, files, classes = rows.cifar_items(files)
        self.others += cifar
        self.classes = self.classes or classes
        companions: dict[str, dict[str, Item]] = {}  # by stem, by member
        num_others: Counter[str] = Counter()
        by_content: Counter[str] = Counter()
        candidates = []
        for file in files:
            stem, member = stem_and_member(file.name)
            if member in members:
                companions.setdefault(stem, {})[member] = file
            elif member in PICTURES or (member == "" and _is_picture(file)):
                candidates.append(file)
                by_content.update([member] if member in ("", *BY_CONTENT) else [])
            else:
                num_others[member] += 1
        stems = {stem_and_member(file.name)[0] for file in candidates}
        items = []
        for file in candidates:
            stem, _ = stem_and_member(file.name)
            if is_shard and (kind := _kind_within_sample(stem, stems)):
                num_others[f"{kind}.{suffix_of(file.name)}"] += 1
            elif problem := why_wrong_size(file):
                self.lost.append((file.name, problem))
            else:
                found = tuple(sorted(companions.get(stem, {}).items()))
                items.append(_labelled(file._replace(companions=found)))
        for stem in sorted(companions.keys() - stems):
            if mask := companions[stem].pop(MASK_MEMBER, None):
                self.left_out.append((mask.name, "the mask of no picture"))
            num_others.update(companions[stem].keys())
        self.with_path += items
        only = f"files; only .{', .'.join(members)} of a picture's name are taken along"
        self.left_out += _counted(num_others, only if is_shard else "files that are no pictures")
        decoded = _counted(by_content, "files are decoded by their content")
        self.notes += [f"{kind}: {text}" for kind, text in decoded]


def _size_of(path: str) -> tuple[int, str | None]:
    """Bytes of a file, or why they are not known."""
    try:
        found = os.stat(path)
    except OSError as error:
        return 0, f"cannot be read ({error.strerror})"
    return found.st_size, None if stat.S_ISREG(found.st_mode) else "no regular file"


def _is_picture(file: Item) -> bool:
    try:
        return kind_of(read(file.place)) is not None
    except DamagedSampleError:
        return False


def _kind_within_sample(stem: str, stems: set[str]) -> str:
    """`depth` of NAME.depth.png in a shard where NAME.jpg is the picture of the sample; else
    nothing."""
    folder, slash, last = stem.rpartition("/")
    key, _, kind = last.partition(".")
    return kind if f"{folder}{slash}{key}" in stems else ""


def _labelled(item: Item) -> Item:
    """The item with its .cls for a category."""
    files = dict(item.companions)
    found = files.pop("cls", None)
    if found is None:
        return item
    text = read(found.place)[:MAX_LABEL_BYTES]
    try:
        category: int | str = int(text)
    except ValueError:
        category = text.decode("utf-8", "replace").strip()
    return item._replace(category=category, companions=tuple(files.items()))


def _counted(num_files: Counter[str], text: str) -> list[Named]:
    return [
        (f"*.{kind}" if kind else "files without suffix", f"{count} {text}")
        for kind, count in sorted(num_files.items())
    ]


# splits and categories


def with_splits_and_categories(
    files: Iterable[Item], *, no_classes: Container[str] = ()
) -> list[Item]:
    """After the folders of their paths; a folder that all pictures share says nothing.

    The split is the first folder, or, where every picture lies below one of such a name, any. A
    category that a picture has stays. no_classes: folders that are none.
    """
    files = list(files)
    paths = [PurePosixPath(file.name).parts for file in files]
    shared = 0
    while paths and all(
        len(parts) > shared + 1
        and parts[shared] == paths[0][shared]
        and parts[shared].lower() not in SPLITS
        for parts in paths
    ):
        shared += 1
    folders = [list(parts[shared:-1]) for parts in paths]
    places = [
        next((i for i, part in enumerate(parts) if part.lower() in SPLITS), None)
        for parts in folders
    ]
    is_everywhere = None not in places
    items = []
    for file, parts, place in zip(files, folders, places, strict=True):
        split = file.split
        if place is not None and (place == 0 or is_everywhere):
            split = SPLITS[parts.pop(place).lower()]
        category = file.category
        if category is None and parts and parts[0] not in no_classes:
            category = parts[0]
        items.append(file._replace(split=split, category=category))
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
            f"source: {len(inside)} pictures belong to a split ({shown_name(inside[0].name)}: "
            f"{inside[0].split}) and {len(outside)} to none ({shown_name(outside[0].name)}); put "
            "all of them below folders train, validation and test (a class of such a name below "
            "them too), or none, or say it in a column split of labels="
        )
