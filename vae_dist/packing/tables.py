"""Tables that say what pictures are: CSV labels, the lists of CelebA, parquet of the hub kind.

CSV: a header line, a column `path` (or file, filename, image, image_id, name), if wanted `label`
(or class, category) and `split`; the other columns are kept as .json. An empty label is none. A row
fits the picture of its path, or of its name if only one picture has it.
CelebA: `list_eval_partition.txt` and `list_attr_celeba.txt` beside the pictures, as published.
Parquet: a column `image` or `img` of {bytes, path} or of bytes, if wanted `label`; the split is
the first word of the file's name (`train-00000-of-00002.parquet`). Needs the extra `parquet`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vae_dist.config.errors import ConfigError
from vae_dist.data.tar import DamagedSampleError
from vae_dist.packing.items import SPLITS, Item, Listing, Source
from vae_dist.packing.unpacked import write_once

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_id", "name")
LABEL_COLUMNS = ("label", "class", "category")
IMAGE_COLUMNS = ("image", "img")  # of parquet
PARTITION, ATTRIBUTES = "list_eval_partition", "list_attr_celeba"
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}
SUFFIX_OF_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp"}


class LabelledSource:
    """A source whose splits, categories and extras come from a table, by path or by name."""

    def __init__(self, source: Source, table: dict[str, dict[str, Any]], table_name: str) -> None:
        self.source, self.table, self.table_name = source, table, table_name

    def list(self) -> Listing:
        listing = self.source.list()
        items, refused = [], listing.refused
        named: dict[str, str] = {}  # picture of each row
        for item in listing.items:
            path = next(
                (p for p in (item.name, item.name.rpartition("/")[2]) if p in self.table), None
            )
            if path is None:
                refused.append((item.name, f"not in {self.table_name}"))
                continue
            if path in named:
                raise ConfigError(
                    f"{self.table_name}: {path} fits {named[path]} and {item.name}; name each "
                    "picture by its path in source="
                )
            named[path] = item.name
            items.append(item._replace(**self.table[path]))
        if not items:
            raise ConfigError(f"{self.table_name} names none of the {len(listing.items)} pictures")
        return Listing(items, refused, listing.classes)

    def read(self, item: Item) -> tuple[str, bytes]:
        return self.source.read(item)


def read_csv(path: Path) -> dict[str, dict[str, Any]]:
    """What `LabelledSource` needs of a CSV file. Raises ConfigError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"labels={path}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    path_column = next((c for c in PATH_COLUMNS if c in columns), None)
    label_column = next((c for c in LABEL_COLUMNS if c in columns), None)
    if path_column is None:
        raise ConfigError(
            f"labels={path}: the columns {columns} hold none of {', '.join(PATH_COLUMNS)}; name "
            "the pictures' column path, in the first line of the file"
        )
    labels = [(row[label_column] or "").strip() for row in rows] if label_column else []
    as_number = all(re.fullmatch(r"-?\d+", label) for label in labels if label)
    used = {path_column, label_column, "split"}
    table: dict[str, dict[str, Any]] = {}
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ConfigError(f"labels={path}: line {line} has another number of columns")
        extra = {name: value for name, value in row.items() if name not in used}
        entry: dict[str, Any] = {"extra": extra or None}
        if label_column is not None:
            label = labels[line - 2]
            entry["category"] = (int(label) if as_number else label) if label else None
        if "split" in row:
            entry["split"] = SPLITS.get(row["split"].lower())
            if entry["split"] is None:
                raise ConfigError(f"labels={path}: line {line}: split {row['split']!r} is unknown")
        if table.setdefault(row[path_column], entry) != entry:
            raise ConfigError(
                f"labels={path}: line {line}: {row[path_column]} is there twice, and the lines "
                "differ; keep one"
            )
    return table


# CelebA


def celeba_lists(folder: Path) -> list[Path]:
    """The lists in a folder: partition and, where they are there, attributes."""
    partition = _list_file(folder, PARTITION)
    attributes = _list_file(folder, ATTRIBUTES)
    return [path for path in (partition, attributes) if path] if partition else []


def read_celeba_lists(partition: Path, attributes: Path | None = None) -> dict[str, dict[str, Any]]:
    """Split and attributes of each picture, for `LabelledSource`. Raises ConfigError."""
    table: dict[str, dict[str, Any]] = {}
    for line in partition.read_text().splitlines():
        words = line.replace(",", " ").split()
        if len(words) == 2 and words[1] in PARTITIONS:
            table[words[0]] = {"split": PARTITIONS[words[1]]}
        elif words and words[0] != "image_id":
            raise ConfigError(f"{partition}: cannot read the line {line[:60]!r}; copy it again")
    if attributes is not None:
        _add_attributes(table, attributes)
    return table


def _list_file(folder: Path, name: str) -> Path | None:
    return next((p for end in ("txt", "csv") if (p := folder / f"{name}.{end}").is_file()), None)


def _add_attributes(table: dict[str, dict[str, Any]], path: Path) -> None:
    lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
    lines = [words for words in lines if words]
    if lines and len(lines[0]) == 1 and lines[0][0].isdigit():
        del lines[0]  # the number of pictures
    names = [name for name in lines[0] if name != "image_id"] if lines else []
    for words in lines[1:]:
        if len(words) != len(names) + 1 or not set(words[1:]) <= {"1", "-1", "0"}:
            raise ConfigError(f"{path}: cannot read the line {' '.join(words)[:60]!r}")
        if words[0] in table:
            values = {n: int(v) for n, v in zip(names, words[1:], strict=True)}
            table[words[0]]["extra"] = {"attributes": values}


# parquet


class ParquetSource:
    """Pictures in parquet files; their bytes are copied once into one plain file."""

    def __init__(self, paths: list[str], *, work_folder: str | Path) -> None:
        self.paths, self.work_folder = paths, Path(work_folder)
        self.plain = self.work_folder  # the file in it, once they are listed

    def list(self) -> Listing:
        try:
            stats = [
                (path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self.paths
            ]
        except OSError as error:
            raise ConfigError(f"source: {error.filename}: cannot be read ({error})") from error
        digest = hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()
        self.plain = self.work_folder / f"parquet-{digest}.bin"
        if self.plain.exists():
            return self._listed(None)
        try:
            return write_once(self.plain, self._listed)
        except OSError as error:
            raise ConfigError(f"out={self.plain}: cannot be written ({error})") from error

    def _listed(self, copy: BinaryIO | None) -> Listing:
        """What is there, with its place in the plain file; its bytes go to `copy`."""
        items: list[Item] = []
        refused: list[tuple[str, str]] = []
        classes: tuple[str, ...] = ()
        at = 0
        for path in self.paths:
            file = _open_parquet(path)
            classes = classes or _class_names(file.schema_arrow.metadata)
            for number, row in enumerate(_rows(file, path)):
                item = _parquet_item(path, number, row, at)
                if item.num_bytes == 0:
                    refused.append((item.name, "no bytes of a picture"))
                    continue
                if copy is not None:
                    copy.write(_image_bytes(row))
                at += item.num_bytes
                items.append(item)
        return Listing(items, refused, classes)

    def read(self, item: Item) -> tuple[str, bytes]:
        with open(self.plain, "rb") as file:
            file.seek(item.place)
            data = file.read(item.num_bytes)
        suffix = next((s for magic, s in SUFFIX_OF_MAGIC.items() if data.startswith(magic)), None)
        if suffix is None:
            raise DamagedSampleError("neither JPEG, PNG, WebP nor BMP")
        return suffix, data


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


def _rows(file: Any, path: str) -> Iterator[dict[str, Any]]:
    columns = file.schema_arrow.names
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None:
        raise ConfigError(f"source={path}: no column image or img among {columns}")
    wanted = [name for name in (image, "label") if name in columns]
    try:
        for batch in file.iter_batches(batch_size=64, columns=wanted):
            for row in batch.to_pylist():
                yield {"image": row[image], "label": row.get("label")}
    except (OSError, ValueError) as error:
        raise ConfigError(f"source={path}: cannot be read ({error})") from error


def _parquet_item(path: str, number: int, row: dict[str, Any], at: int) -> Item:
    word = re.split(r"[-_.]", Path(path).name)[0].lower()
    name = f"{Path(path).name} row {number}"
    try:
        category = _category(row.get("label"))
    except ValueError as error:
        raise ConfigError(f"source={path}: row {number}: {error}") from None
    return Item(name, at, len(_image_bytes(row)), SPLITS.get(word), category)


def _category(label: Any) -> int | str | None:
    """The class of a label; NaN, as pandas writes a missing number, is none. Raises ValueError."""
    if label is None or label != label:
        return None
    if isinstance(label, str):
        return label
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)  # also of a bool
    raise ValueError(f"the label {str(label)[:40]} is neither an integer nor a name")


def _image_bytes(row: dict[str, Any]) -> bytes:
    image = row["image"]
    data = image.get("bytes") if isinstance(image, dict) else image
    return data if isinstance(data, bytes) else b""


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Names of a ClassLabel column, as the datasets library leaves them in the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
