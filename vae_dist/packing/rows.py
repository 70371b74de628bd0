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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.digits import idx_shape
from vae_dist.files import read_json, write_durably
from vae_dist.packing.items import Item, Listing, Place, most_bytes, read

COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}
COPY_BYTES = 1 << 20
MNIST_FILE = re.compile(r"((?:.*/)?(?:train|t10k))-(images-idx3|labels-idx1)-ubyte(?:\.gz)?")
CIFAR_FILE = re.compile(r"(?:.*/)?((?:data_batch_\d+|test_batch|batches\.meta)(?:\.bin|\.txt)?)")
CIFAR_SHAPE = (3, 32, 32)  # planes R, G, B, behind a byte that is the label
CIFAR_RECORD = 1 + math.prod(CIFAR_SHAPE)
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")  # of parquet
LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")
ROWS_AT_ONCE = 4  # of parquet
MAX_FEATURES = 1 << 24  # bytes of what the datasets library says of the columns


def plain_copy(path: str, work: Path) -> str:
    """The file itself, or where it lies unpacked. Raises ConfigError."""
    with open(path, "rb") as file:
        magic, facts = file.read(6), os.fstat(file.fileno())
    module = next((m for mark, m in COMPRESSIONS.items() if magic.startswith(mark)), None)
    if module is None:
        return path
    most = most_bytes(facts.st_size)

    def pieces() -> Iterator[bytes]:
        with module.open(path, "rb") as source:
            for _ in range(0, most, COPY_BYTES):
                if not (piece := source.read(COPY_BYTES)):
                    return
                yield piece
        raise OSError(f"its {facts.st_size} bytes hold more than {most}; unpack it by hand")

    return _copied(pieces(), path, work / f"{Path(path).name}-{facts.st_size}-{facts.st_mtime_ns}")


def _copied(pieces: Iterator[bytes], source: str, plain: Path) -> str:
    """The pieces in a plain file, which is written once."""
    try:
        plain.parent.mkdir(parents=True, exist_ok=True)
        if not plain.exists():
            write_durably(plain, pieces)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"source={source}: cannot be unpacked to {plain} ({error})") from error
    return str(plain)


def mnist_items(files: list[Item], work: Path) -> tuple[list[Item], list[Item]]:
    """The digits of the idx files among the files of a folder, and the other files. Raises
    ConfigError for a missing or damaged one."""
    paths: dict[str, dict[str, str]] = {}  # by folder/train or folder/t10k, by kind
    rest = []
    for file in files:
        if found := MNIST_FILE.fullmatch(file.name):
            paths.setdefault(found[1], {})[found[2]] = plain_copy(file.place.path, work)
        else:
            rest.append(file)
    items: list[Item] = []
    for name in sorted(paths, key=lambda name: (os.path.dirname(name), name.endswith("t10k"))):
        if missing := {"images-idx3", "labels-idx1"} - paths[name].keys():
            raise ConfigError(
                f"source: {name}-{missing.pop()}-ubyte[.gz] is missing; copy it there"
            )
        images, labels = _idx(paths[name]["images-idx3"]), _idx(paths[name]["labels-idx1"])
        if len(images.pixels) != 3 or labels.pixels != images.pixels[:1]:
            raise ConfigError(
                f"source: {name}: images {images.pixels} and labels {labels.pixels} do not belong "
                "together"
            )
        split = "test" if name.endswith("t10k") else "train"
        one = images._replace(size=math.prod(images.pixels[1:]), pixels=images.pixels[1:])
        for i, label in enumerate(read(labels._replace(pixels=()))):
            place = one._replace(at=one.at + i * one.size)
            items.append(Item(f"{split} {i}", place, one.size, split, label))
    return items, rest


def _idx(path: str) -> Place:
    """The array of an idx file, with its shape. Raises ConfigError."""
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
    return Place(path, at, size, shape)


def cifar_items(files: list[Item]) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """The pictures of CIFAR-10's binary batches among the files of a folder or archive, the other
    files, and the names of the classes. Raises ConfigError."""
    batches: dict[str, Item] = {}
    rest = []
    for file in files:
        found = CIFAR_FILE.fullmatch(file.name)
        if found and not file.place.is_zipped:
            batches[found[1]] = file
        else:
            rest.append(file)
    items: dict[str, list[Item]] = {"train": [], "test": []}
    names = batches.pop("batches.meta.txt", None)
    for name, file in sorted(batches.items()):
        if not name.endswith(".bin"):
            raise ConfigError(
                f"source: {file.name} is a Python pickle, which can run code and is not loaded; "
                "give the binary archive (cifar-10-binary.tar.gz, from the same page), or "
                "source=cifar10, which gets parquet files from the hub"
            )
        if not file.num_bytes or file.num_bytes % CIFAR_RECORD:
            raise ConfigError(
                f"source: {file.name}: {file.num_bytes} bytes are no multiple of {CIFAR_RECORD}; "
                "copy it again"
            )
        split, size = "test" if name.startswith("test") else "train", CIFAR_RECORD - 1
        for i, label in enumerate(read(file.place)[::CIFAR_RECORD]):
            place = Place(file.place.path, file.place.at + i * CIFAR_RECORD + 1, size, CIFAR_SHAPE)
            items[split].append(Item(f"{split} {len(items[split])}", place, size, split, label))
    if batches and not all(items.values()):
        raise ConfigError("source: batches of CIFAR-10 are missing; copy it again")
    classes = read(names.place).decode("utf-8", "replace").split() if names else ()
    return [*items["train"], *items["test"]], rest, tuple(classes)


def add_parquet(
    listing: Listing, path: str, split: str | None, work: Path, command: PackCommand
) -> None:
    """List the pictures in a column of {bytes, path} or of bytes; their bytes are copied once into
    one plain file. Where no column holds pictures, the file is left out. Raises ConfigError."""
    file, name = _open_parquet(path), os.path.basename(path)
    columns = file.schema_arrow.names
    chosen: list[str | None] = []
    for key, known in (("image_column", IMAGE_COLUMNS), ("label_column", LABEL_COLUMNS)):
        if (asked := getattr(command, key)) and asked not in columns:
            raise ConfigError(f"{key}={asked}: {path} has the columns {', '.join(columns)}")
        chosen.append(asked or next((column for column in known if column in columns), None))
    image, label = chosen
    if image is None:
        reason = f"no column of pictures among {', '.join(columns)}"
        listing.left_out.append((name, reason))
        return
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

    if plain.exists():
        for _ in pictures():
            pass
    else:
        _copied(pictures(), path, plain)


def _open_parquet(path: str) -> Any:
    try:
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
    except ImportError as error:
        raise ConfigError(
            "source: parquet files need pyarrow: pip install 'vae_dist[parquet]'"
        ) from error
    except Exception as error:  # pyarrow raises many kinds on damaged bytes
        raise ConfigError(f"source={path}: cannot be read ({error})") from error
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > most_bytes(os.path.getsize(path)):
        raise ConfigError(f"source={path}: its rows claim to be larger than it can hold")
    return file


def _rows(file: Any, path: str, image: str, label: str | None) -> Iterator[tuple[Any, Any]]:
    """Picture and class of each row. Raises ConfigError."""
    columns, number = [name for name in (image, label) if name], 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
                yield data, _category(row[label]) if label else None
                number += 1
    except Exception as error:
        raise ConfigError(f"source={path}: row {number}: {error}") from error


def _category(label: Any) -> int | str | None:
    """The class of a label; NaN, as pandas writes a missing number, is none. Raises ValueError."""
    if label is None or label != label:
        return None
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)  # also of a bool
    if not isinstance(label, str):
        raise ValueError(f"the label {str(label)[:40]} is neither an integer nor a name")
    return label


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel column, as the datasets library leaves them in the schema."""
    try:
        features = read_json((metadata or {})[b"huggingface"], MAX_FEATURES)["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
