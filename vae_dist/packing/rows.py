"""Data sets that come as rows of a file: MNIST idx files, CIFAR-10 batches, parquet.

In: files. Out: `Item`s that are pieces of plain files: raw pixels, which become PNG, losslessly, or
encoded pictures. What is compressed, and the pictures of a parquet file, are copied once into the
work folder, so that they can be read in any order.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.digits import idx_shape
from vae_dist.files import write_durably
from vae_dist.packing.items import InFile, Item, Listing, read

COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
COPY_BYTES = 1 << 20
MNIST_FILE = re.compile(r"(train|t10k)-(images-idx3|labels-idx1)-ubyte(\.gz)?")
MNIST_SPLITS = {"train": "train", "t10k": "test"}  # by the first word of the files
CIFAR_FILE = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?|batches\.meta(\.txt)?")
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then the planes R, G, B
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")  # of parquet
LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")


def plain_copy(path: str, work: Path) -> str:
    """The file itself, or where it lies uncompressed. Raises ConfigError."""
    with open(path, "rb") as file:
        magic = file.read(6)
    opened = next((way for mark, way in COMPRESSIONS.items() if magic.startswith(mark)), None)
    if opened is None:
        return path
    facts = os.stat(path)
    plain = work / f"{Path(path).name}-{facts.st_size}-{facts.st_mtime_ns}"
    if not plain.exists():
        try:
            work.mkdir(parents=True, exist_ok=True)
            with opened(path, "rb") as source:
                write_durably(plain, iter(lambda: source.read(COPY_BYTES), b""))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ConfigError(f"source={path}: cannot be unpacked ({error})") from error
    return str(plain)


# MNIST


def mnist_items(files: list[Item], work: Path) -> tuple[list[Item], list[Item]]:
    """The digits of the idx files among the files of a folder, and the other files. Raises
    ConfigError for a missing or damaged one."""
    found = {f.name: f for f in files if MNIST_FILE.fullmatch(f.name.rpartition("/")[2])}
    folders = sorted({name.rpartition("/")[0] for name in found})
    items: list[Item] = []
    for folder in folders:
        paths = {
            name.rpartition("/")[2].removesuffix(".gz"): plain_copy(file.place.path, work)
            for name, file in found.items()
            if name.rpartition("/")[0] == folder
        }
        for word, split in MNIST_SPLITS.items():
            items += _digits(paths, word, split)
    return items, [file for file in files if file.name not in found]


def _digits(paths: dict[str, str], word: str, split: str) -> Iterator[Item]:
    names = f"{word}-images-idx3-ubyte", f"{word}-labels-idx1-ubyte"
    for name in names:
        if name not in paths:
            where = os.path.dirname(next(iter(paths.values())))
            raise ConfigError(f"source={where}: {name}[.gz] is missing; copy it there")
    (images, pixels_at), (labels, labels_at) = (_idx(paths[name]) for name in names)
    if len(images) != 3 or labels != images[:1]:
        raise ConfigError(
            f"source: {word} images {images} and labels {labels} of MNIST do not belong together"
        )
    size = images[1] * images[2]
    numbers = read(InFile(paths[names[1]], labels_at))
    for i, label in enumerate(numbers):
        place = InFile(paths[names[0]], pixels_at + i * size, size, images[1:])
        yield Item(f"{split} {i}", place, size, split, label)


def _idx(path: str) -> tuple[tuple[int, ...], int]:
    """Shape and first byte of the array of an idx file. Raises ConfigError."""
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        shape, at = idx_shape(head)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    size, wanted = os.path.getsize(path) - at, int(np.prod(shape, dtype=object))
    if size != wanted:
        raise ConfigError(
            f"{path}: {size} bytes of pixels, but its header {shape} means {wanted}; copy it again"
        )
    return shape, at


# CIFAR-10


def cifar_items(files: list[Item]) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """The pictures of the binary batches among the files of a folder or archive, the other files,
    and the names of the classes. Raises ConfigError."""
    batches = {f.name.rpartition("/")[2]: f for f in files if _is_of_cifar(f)}
    found: dict[str, list[Item]] = {"train": [], "test": []}
    classes: tuple[str, ...] = ()
    for name in sorted(batches):
        file = batches[name]
        if name == "batches.meta.txt":
            classes = tuple(read(file.place).decode("utf-8", "replace").split())
            continue
        if not name.endswith(".bin"):
            raise ConfigError(
                f"source: {file.name} is a Python pickle, which can run code and is not loaded; "
                "give the binary archive (cifar-10-binary.tar.gz, from the same page), or "
                "source=cifar10, which gets parquet files from the hub"
            )
        split = "train" if name.startswith("data_batch") else "test"
        found[split] += _records(file, split, len(found[split]))
    if batches and not (found["train"] and found["test"]):
        raise ConfigError("source: batches of CIFAR-10 are missing; copy it again")
    rest = [file for file in files if not _is_of_cifar(file)]
    return [*found["train"], *found["test"]], rest, classes


def _is_of_cifar(file: Item) -> bool:
    name = file.name.rpartition("/")[2]
    return isinstance(file.place, InFile) and CIFAR_FILE.fullmatch(name) is not None


def _records(file: Item, split: str, first: int) -> Iterator[Item]:
    assert isinstance(file.place, InFile)
    data = read(file.place)
    if not data or len(data) % CIFAR_RECORD:
        raise ConfigError(
            f"source: {file.name}: {len(data)} bytes are no multiple of {CIFAR_RECORD}; copy it "
            "again"
        )
    size = CIFAR_RECORD - 1
    for i, label in enumerate(data[::CIFAR_RECORD]):
        place = InFile(file.place.path, file.place.at + i * CIFAR_RECORD + 1, size, CIFAR_SHAPE)
        yield Item(f"{split} {first + i}", place, size, split, label)


# parquet


def parquet_items(
    path: str, split: str | None, work: Path, *, image_column: str = "", label_column: str = ""
) -> Listing:
    """Pictures in a column of {bytes, path} or of bytes; their bytes are copied once into one plain
    file. Where no column holds pictures, the file is left out. Raises ConfigError."""
    file = _open_parquet(path)
    name = os.path.basename(path)
    image = _column(file, path, image_column, IMAGE_COLUMNS, key="image_column")
    if image is None:
        columns = ", ".join(file.schema_arrow.names)
        return Listing([], [], [(name, f"no column of pictures among {columns}")])
    label = _column(file, path, label_column, LABEL_COLUMNS, key="label_column")
    facts = os.stat(path)
    digest = hashlib.blake2b(repr((path, facts.st_size, facts.st_mtime_ns, image)).encode())
    plain = work / f"parquet-{digest.hexdigest()[:16]}.bin"
    listing = Listing([], [], [], _class_names(file.schema_arrow.metadata, label))

    def pictures() -> Iterator[bytes]:
        at = 0
        for number, (data, category) in enumerate(_rows(file, path, image, label)):
            row = f"{name} row {number}"
            if not data:
                listing.lost.append((row, "no bytes of a picture"))
                continue
            place = InFile(str(plain), at, len(data))
            listing.items.append(Item(row, place, len(data), split, category))
            at += len(data)
            yield data

    if plain.exists():
        for _ in pictures():
            pass
        return listing
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_durably(plain, pictures())
    except OSError as error:
        raise ConfigError(f"out={plain}: cannot be written ({error})") from error
    return listing


def _open_parquet(path: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "source: parquet files need pyarrow: pip install 'vae_dist[parquet]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"source={path}: cannot be read ({error})") from error


def _column(file: Any, path: str, asked: str, known: tuple[str, ...], *, key: str) -> str | None:
    columns = file.schema_arrow.names
    if asked and asked not in columns:
        raise ConfigError(f"{key}={asked}: {path} has the columns {', '.join(columns)}")
    return asked or next((name for name in known if name in columns), None)


def _rows(
    file: Any, path: str, image: str, label: str | None
) -> Iterator[tuple[bytes, int | str | None]]:
    wanted = [name for name in (image, label) if name]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=64, columns=wanted):
            for row in batch.to_pylist():
                yield _image_bytes(row[image]), _category(row[label]) if label else None
                number += 1
    except (OSError, ValueError) as error:
        raise ConfigError(f"source={path}: row {number}: {error}") from error


def _image_bytes(image: Any) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    return data if isinstance(data, bytes) else b""


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
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
