"""Data sets that come as rows of a file: MNIST idx files, CIFAR-10 batches, parquet.

In: files. Out: `Item`s that are pieces of plain files: raw pixels, which become PNG, losslessly, or
encoded pictures. What is compressed, and the pictures of a parquet file, are copied once into the
work folder, so that they can be read in any order.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.digits import idx_shape
from vae_dist.files import read_json, write_durably
from vae_dist.packing.items import Item, Listing, Place, most_bytes, read

COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
COPY_BYTES = 1 << 20
MNIST_FILE = re.compile(r"(?:.*/)?((?:train|t10k)-(?:images-idx3|labels-idx1)-ubyte)(?:\.gz)?")
CIFAR_FILE = re.compile(r"(?:.*/)?((?:data_batch_\d+|test_batch|batches\.meta)(?:\.bin|\.txt)?)")
CIFAR_SHAPE = (3, 32, 32)  # planes R, G, B, behind a byte that is the label
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")  # of parquet
LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")
ROWS_AT_ONCE = 4  # of parquet
MAX_FEATURES = 1 << 24  # bytes of what the datasets library says of the columns


def plain_copy(path: str, work: Path) -> str:
    """The file itself, or where it lies unpacked. Raises ConfigError."""
    with open(path, "rb") as file:
        magic, facts = file.read(6), os.fstat(file.fileno())
    opened = next((way for mark, way in COMPRESSIONS.items() if magic.startswith(mark)), None)
    if opened is None:
        return path
    plain = work / f"{Path(path).name}-{facts.st_size}-{facts.st_mtime_ns}"
    most = most_bytes(facts.st_size)

    def pieces() -> Iterator[bytes]:
        with opened(path, "rb") as source:
            for _ in range(0, most, COPY_BYTES):
                if not (piece := source.read(COPY_BYTES)):
                    return
                yield piece
        raise OSError(f"its {facts.st_size} bytes hold more than {most}; unpack it by hand")

    if not plain.exists():
        try:
            work.mkdir(parents=True, exist_ok=True)
            write_durably(plain, pieces())
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ConfigError(f"source={path}: cannot be unpacked ({error})") from error
    return str(plain)


def mnist_items(files: list[Item], work: Path) -> tuple[list[Item], list[Item]]:
    """The digits of the idx files among the files of a folder, and the other files. Raises
    ConfigError for a missing or damaged one."""
    folders: dict[str, dict[str, str]] = {}  # paths by folder, by name
    rest = []
    for file in files:
        if found := MNIST_FILE.fullmatch(file.name):
            paths = folders.setdefault(os.path.dirname(file.name), {})
            paths[found[1]] = plain_copy(file.place.path, work)
        else:
            rest.append(file)
    items: list[Item] = []
    for folder, paths in sorted(folders.items()):
        for word, split in (("train", "train"), ("t10k", "test")):
            names = f"{word}-images-idx3-ubyte", f"{word}-labels-idx1-ubyte"
            if missing := [name for name in names if name not in paths]:
                raise ConfigError(
                    f"source: {folder or '.'}/{missing[0]}[.gz] is missing; copy it there"
                )
            (images, at), (labels, labels_at) = (_idx(paths[name]) for name in names)
            if len(images) != 3 or labels != images[:1]:
                raise ConfigError(
                    f"source: {word} images {images} and labels {labels} of MNIST do not belong "
                    "together"
                )
            numbers = read(Place(paths[names[1]], labels_at))
            items += _records(Place(paths[names[0]], at), split, numbers, images[1:])
    return items, rest


def _records(
    first: Place,
    split: str,
    labels: bytes,
    shape: tuple[int, ...],
    *,
    skip: int = 0,
    number: int = 0,
) -> Iterator[Item]:
    size = math.prod(shape)
    for i, label in enumerate(labels):
        at = first.at + skip + i * (size + skip)
        yield Item(f"{split} {number + i}", Place(first.path, at, size, shape), size, split, label)


def _idx(path: str) -> tuple[tuple[int, ...], int]:
    """Shape and first byte of the array of an idx file. Raises ConfigError."""
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        shape, at = idx_shape(head)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    size, wanted = os.path.getsize(path) - at, math.prod(shape)
    if size != wanted or not wanted:
        raise ConfigError(
            f"{path}: {size} bytes of pixels, but its header {shape} means {wanted}; copy it again"
        )
    return shape, at


def cifar_items(files: list[Item]) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """The pictures of CIFAR-10's binary batches among the files of a folder or archive, the other
    files, and the names of the classes. Raises ConfigError."""
    batches = {
        found[1]: file
        for file in files
        if (found := CIFAR_FILE.fullmatch(file.name)) and not file.place.is_zipped
    }
    items: list[Item] = []
    classes: tuple[str, ...] = ()
    record = 1 + math.prod(CIFAR_SHAPE)
    for name, file in sorted(batches.items()):
        if name == "batches.meta.txt":
            classes = tuple(read(file.place).decode("utf-8", "replace").split())
            continue
        if not name.endswith(".bin"):
            raise ConfigError(
                f"source: {file.name} is a Python pickle, which can run code and is not loaded; "
                "give the binary archive (cifar-10-binary.tar.gz, from the same page), or "
                "source=cifar10, which gets parquet files from the hub"
            )
        if not file.num_bytes or file.num_bytes % record:
            raise ConfigError(
                f"source: {file.name}: {file.num_bytes} bytes are no multiple of {record}; copy it "
                "again"
            )
        split = "train" if name.startswith("data") else "test"
        labels = read(file.place)[::record]
        number = sum(item.split == split for item in items)
        items += _records(file.place, split, labels, CIFAR_SHAPE, skip=1, number=number)
    if batches and len({item.split for item in items}) < 2:
        raise ConfigError("source: batches of CIFAR-10 are missing; copy it again")
    names = {file.name for file in batches.values()}
    return items, [file for file in files if file.name not in names], classes


def add_parquet(
    listing: Listing, path: str, split: str | None, work: Path, command: PackCommand
) -> None:
    """List the pictures in a column of {bytes, path} or of bytes; their bytes are copied once into
    one plain file. Where no column holds pictures, the file is left out. Raises ConfigError."""
    file, name = _open_parquet(path), os.path.basename(path)
    image = _column(file, path, "image_column", command.image_column, IMAGE_COLUMNS)
    if image is None:
        columns = ", ".join(file.schema_arrow.names)
        listing.left_out.append((name, f"no column of pictures among {columns}"))
        return
    label = _column(file, path, "label_column", command.label_column, LABEL_COLUMNS)
    listing.classes = listing.classes or _class_names(file.schema_arrow.metadata, label)
    facts = os.stat(path)
    digest = hashlib.blake2b(repr((path, facts.st_size, facts.st_mtime_ns, image)).encode())
    plain = work / f"parquet-{digest.hexdigest()[:16]}.bin"

    def pictures() -> Iterator[bytes]:
        at = 0
        for number, (data, category) in enumerate(_rows(file, path, image, label)):
            row = f"{name} row {number}"
            if data and isinstance(data, bytes):
                place = Place(str(plain), at, len(data))
                listing.items.append(Item(row, place, len(data), split, category))
                at += len(data)
                yield data
            else:
                listing.lost.append((row, "no bytes of a picture"))

    try:
        if plain.exists():
            for _ in pictures():
                pass
        else:
            work.mkdir(parents=True, exist_ok=True)
            write_durably(plain, pictures())
    except OSError as error:
        raise ConfigError(f"out={plain}: cannot be written ({error})") from error


def _open_parquet(path: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "source: parquet files need pyarrow: pip install 'vae_dist[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"source={path}: cannot be read ({error})") from error
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > most_bytes(os.path.getsize(path)):
        raise ConfigError(f"source={path}: its rows claim to be larger than it can hold")
    return file


def _column(file: Any, path: str, key: str, asked: str, known: tuple[str, ...]) -> str | None:
    columns = file.schema_arrow.names
    if asked and asked not in columns:
        raise ConfigError(f"{key}={asked}: {path} has the columns {', '.join(columns)}")
    return asked or next((name for name in known if name in columns), None)


def _rows(file: Any, path: str, image: str, label: str | None) -> Iterator[tuple[Any, Any]]:
    """Picture and class of each row. Raises ConfigError."""
    wanted = [name for name in (image, label) if name]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
            for row in batch.to_pylist():
                data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
                yield data, _category(row[label]) if label else None
                number += 1
    except (OSError, ValueError) as error:
        raise ConfigError(f"source={path}: row {number}: {error}") from error


def _category(label: Any) -> int | str | None:
    """The class of a label; NaN, as pandas writes a missing number, is none. Raises ValueError."""
    if label is None or label != label:
        return None
    if isinstance(label, str):
        return label
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)  # also of a bool
    raise ValueError(f"the label {str(label)[:40]} is neither an integer nor a name")


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel column, as the datasets library leaves them in the schema."""
    try:
        features = read_json((metadata or {})[b"huggingface"], MAX_FEATURES)["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
