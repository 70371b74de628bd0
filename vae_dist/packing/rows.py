"""Data sets that come as rows of a file: MNIST idx, CIFAR-10 batches, parquet, also of the hub.

In: files, or `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`. Out: `Item`s that are pieces of plain
files: raw pixels, which become PNG, or encoded pictures. What is compressed, and the pictures of a
parquet file, are copied once into the work folder, so that they can be read in any order. The files
of the hub lie in its own cache; only this reaches out to the network.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.data.digits import idx_shape
from vae_dist.files import read_json, write_durably
from vae_dist.packing.items import SPLITS, Item, Listing, Place, most_bytes, read

COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}
COPY_BYTES = 1 << 20
MNIST_FILE = re.compile(r"((?:.*/)?(?:train|t10k))-(images-idx3|labels-idx1)-ubyte(?:\.gz)?")
CIFAR_FILE = re.compile(r"(?:.*/)?(?:(?:data_batch_\d|test_batch)\.bin|batches\.meta\.txt)")
CIFAR_SHAPE = (3, 32, 32)  # planes R, G, B, behind a byte that is the label
CIFAR_RECORD = 1 + math.prod(CIFAR_SHAPE)
HUB = {"mnist": "hf://datasets/ylecun/mnist", "cifar10": "hf://datasets/uoft-cs/cifar10"}
CONVERTED = "refs/convert/parquet"  # where the hub keeps data sets of other kinds
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+(?:/convert/parquet)?))?(?:/(.+))?")
NUM_NAMED = 5  # folders of the hub that a message names
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")  # of parquet
LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")
ROWS_AT_ONCE = 4  # of parquet
MAX_FEATURES = 1 << 24  # bytes of what the datasets library says of the columns


def plain_copy(path: str, work: Path) -> str:
    """The file itself, or where it lies unpacked. Raises ConfigError."""
    with open(path, "rb") as file:
        magic, packed = file.read(6), os.path.getsize(path)
    module = next((m for mark, m in COMPRESSIONS.items() if magic.startswith(mark)), None)
    if module is None:
        return path

    def pieces() -> Iterator[bytes]:
        with module.open(path, "rb") as source:
            for _ in range(0, most_bytes(packed), COPY_BYTES):
                if not (piece := source.read(COPY_BYTES)):
                    return
                yield piece
        raise OSError(f"its {packed} bytes hold more than {most_bytes(packed)}; unpack it by hand")

    plain = _plain(path, work)
    if not plain.exists():
        _write(plain, pieces(), path)
    return str(plain)


def _plain(path: str, work: Path, column: str = "") -> Path:
    """Where the content of a file, of its size and time, is copied to."""
    facts = os.stat(path)
    name = repr((path, facts.st_size, facts.st_mtime_ns, column)).encode()
    return work / hashlib.blake2b(name, digest_size=12).hexdigest()


def _write(plain: Path, pieces: Iterator[bytes], source: str) -> None:
    try:
        plain.parent.mkdir(parents=True, exist_ok=True)
        write_durably(plain, pieces)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"source={source}: cannot be unpacked to {plain} ({error})") from error


# idx


def mnist_items(files: list[Item], work: Path) -> tuple[list[Item], list[Item]]:
    """The digits of the idx files among the files of a folder, and the other files. Raises
    ConfigError for a missing or damaged one."""
    arrays: dict[str, dict[str, Place]] = {}  # by folder/train or folder/t10k, by kind
    rest, items = [], []
    for file in files:
        if found := MNIST_FILE.fullmatch(file.name):
            array = _idx(plain_copy(file.place.path, work))
            arrays.setdefault(found[1], {})[found[2]] = array
        else:
            rest.append(file)
    for name in sorted(arrays, key=lambda name: (os.path.dirname(name), name.endswith("t10k"))):
        nothing, split = Place("", 0, 0), "test" if name.endswith("t10k") else "train"
        images, labels = (arrays[name].get(k, nothing) for k in ("images-idx3", "labels-idx1"))
        if len(images.pixels) != 3 or labels.pixels != images.pixels[:1]:
            raise ConfigError(
                f"source: {name}-images-idx3-ubyte {images.pixels} and -labels-idx1-ubyte "
                f"{labels.pixels} do not belong together, or one is missing; copy both again"
            )
        one = images._replace(size=math.prod(images.pixels[1:]), pixels=images.pixels[1:])
        for i, label in enumerate(read(labels._replace(pixels=()))):
            place = one._replace(at=one.at + i * one.size)
            items.append(Item(f"{split} {i}", place, split, label))
    return items, rest


def _idx(path: str) -> Place:
    """The array of an idx file, with its shape. Raises ConfigError."""
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        shape, at = idx_shape(head)
        size = os.path.getsize(path) - at
        if size != math.prod(shape) or not size:
            raise ValueError(f"{size} bytes of pixels, but its header means {shape}; copy it again")
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Place(path, at, size, shape)


def cifar_items(files: list[Item]) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """The pictures of CIFAR-10's binary batches among the files of a folder or archive, the other
    files, and the names of the classes. Raises ConfigError."""
    items: dict[str, list[Item]] = {"train": [], "test": []}
    classes: tuple[str, ...] = ()
    batches = [f for f in files if CIFAR_FILE.fullmatch(f.name) and not f.place.is_zipped]
    rest = [file for file in files if file not in batches]
    for file in sorted(batches, key=lambda file: file.name):
        if file.name.endswith(".txt"):
            classes = tuple(read(file.place).decode("utf-8", "replace").split())
            continue
        if not file.place.size or file.place.size % CIFAR_RECORD:
            raise ConfigError(f"source: {file.name} is cut off; copy it again")
        split = "test" if "test_batch" in file.name else "train"
        for i, label in enumerate(read(file.place)[::CIFAR_RECORD]):
            at, size = file.place.at + i * CIFAR_RECORD + 1, CIFAR_RECORD - 1
            place = file.place._replace(at=at, size=size, pixels=CIFAR_SHAPE)
            items[split].append(Item(f"{split} {len(items[split])}", place, split, label))
    return [*items["train"], *items["test"]], rest, classes


# parquet


def download(spec: str) -> list[tuple[str, str]]:
    """(file, its path in the data set) of the parquet files of a data set of the hub. Raises
    ConfigError."""
    found = ADDRESS.fullmatch(HUB.get(spec, spec).rstrip("/"))
    if found is None:
        raise ConfigError(f"source={spec}: write it like hf://datasets/OWNER/NAME[@REVISION]")
    name, revision, prefix = found[1], found[2], f"{found[3]}/" if found[3] else ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()

    def parquet_files(revision: str | None) -> list[str]:
        files = api.list_repo_files(name, revision=revision, repo_type="dataset")
        return sorted(f for f in files if f.endswith(".parquet") and f.startswith(prefix))

    try:
        files = parquet_files(revision)
        if not files and revision is None:
            with contextlib.suppress(HfHubHTTPError):  # not every data set is converted
                files, revision = parquet_files(CONVERTED), CONVERTED
        folders = [f.split("/")[:-1] for f in files]
        sets = sorted({"/".join(p for p in parts if p.lower() not in SPLITS) for parts in folders})
        if len(sets) == 1:
            get = partial(api.hf_hub_download, name, repo_type="dataset", revision=revision)
            return [(get(file), file) for file in files]
    except Exception as error:  # of huggingface_hub and of the HTTP client below it
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"source={spec}: the hub does not give it ({reason}); check name, network and, for "
            "private ones, `hf auth login`"
        ) from None
    problem = f"several sets: {', '.join(sets[:NUM_NAMED])}; name one: {spec.rstrip('/')}/FOLDER"
    nothing = "no parquet file is there; download the data set and give its folder"
    raise ConfigError(f"source={spec}: {problem if sets else nothing}")


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
        return listing.leave(name, f"no column of pictures among {', '.join(columns)}")
    listing.classes = listing.classes or _class_names(file.schema_arrow.metadata, label)
    plain = _plain(path, work, image)

    def pictures() -> Iterator[bytes]:
        read, at, number = [column for column in (image, label) if column], 0, 0
        try:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=read):
                for row in batch.to_pylist():
                    data = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
                    category = _category(row[label]) if label else None
                    if data and isinstance(data, bytes):
                        place = Place(str(plain), at, len(data))
                        item = Item(f"{name} row {number}", place, split, category)
                        listing.items.append(item)
                        at += len(data)
                        yield data
                    else:
                        listing.lose(f"{name} row {number}", "no bytes of a picture")
                    number += 1
        except Exception as error:
            raise ConfigError(f"source={path}: row {number}: {error}") from error

    if plain.exists():
        for _ in pictures():
            pass
    else:
        _write(plain, pictures(), path)


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
