"""Tables that say what pictures are: CSV files, and the lists of CelebA.

CSV: a header line, a column `path` (or file, filename, image, image_id, name), if wanted `label`
(or class, category, or the one that `label_column=` names) and `split`; the other columns are kept
as .json. An empty label is none. A row fits the picture of its path, or of its name if only one
picture has it.
CelebA: `list_eval_partition.txt` and `list_attr_celeba.txt` beside the pictures, as published.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
from pathlib import Path
from typing import Any

from vae_dist.config.commands import PackCommand
from vae_dist.config.errors import ConfigError
from vae_dist.files import printable, read_bounded
from vae_dist.packing.items import SPLITS, Item, Listing

Table = dict[str, dict[str, Any]]  # by path or name: fields of `Item`

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_id", "name")
LABEL_COLUMNS = ("label", "class", "category")
NUMBER = re.compile(r"(-?\d+)(\.0+)?")  # pandas writes 3.0 where a column has empty fields
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}
MAX_BYTES = 1 << 32  # of a table


def digest(command: PackCommand) -> str:
    """Of the files that label the pictures: the CSV file, or CelebA's lists; empty where none does.
    Raises ConfigError."""
    files = _files(command)
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        found.update(_text(file).encode())
    return found.hexdigest() if files else ""


def apply_tables(command: PackCommand, listing: Listing) -> None:
    """Leave the pictures that a table names, with what it says. Raises ConfigError."""
    if not (files := _files(command)):
        return
    table = _read_csv(files[0], command.label_column) if command.labels else _read_celeba(*files)
    name = f"labels={command.labels}" if command.labels else str(files[0].with_suffix(""))
    items: list[Item] = []
    named: dict[str, str] = {}  # picture of each row
    for item in listing.items:
        path = next((p for p in (item.name, item.name.rpartition("/")[2]) if p in table), None)
        if path is None:
            listing.left_out.append((item.name, f"not in {name}"))
            continue
        if path in named:
            raise ConfigError(
                f"{name}: {path} fits {named[path]} and {item.name}; name each picture by its path "
                "in source="
            )
        named[path] = item.name
        items.append(item._replace(**table[path]))
    if listing.items and not items:
        row = next(iter(table), "no row")
        raise ConfigError(
            f"{name} names none of the {len(listing.items)} pictures: it has {printable(row)}, "
            f"the source {printable(listing.items[0].name)}"
        )
    listing.items = items


def _files(command: PackCommand) -> list[Path]:
    """The CSV file; else CelebA's partition, in the source or beside its archive, and where they
    are there its attributes."""
    if command.labels:
        return [Path(command.labels)]
    spec = command.source
    first = Path(str([*spec, ""][0] if isinstance(spec, list) else spec)).expanduser()
    folder = first if first.is_dir() else first.parent
    partition, *attributes = (
        next((path for end in ("txt", "csv") if (path := folder / f"{name}.{end}").is_file()), None)
        for name in ("list_eval_partition", "list_attr_celeba")
    )
    return [path for path in (partition, *attributes) if path and partition and first.exists()]


def _text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"labels={path}: cannot be read ({error})") from error


def _read_csv(path: Path, label_column: str) -> Table:
    where = f"labels={path}"
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path).removeprefix("\ufeff"), newline="")))
    except csv.Error as error:
        raise ConfigError(f"{where}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    path_column = next((c for c in PATH_COLUMNS if c in columns), None)
    if path_column is None:
        raise ConfigError(
            f"{where}: the columns {columns} hold none of {', '.join(PATH_COLUMNS)}; name "
            "the pictures' column path, in the first line of the file"
        )
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    label = next((c for c in wanted if c in columns), None)
    if label is None:
        problem = f"{where}: the columns {columns} hold no {' or '.join(wanted)}"
        if label_column:
            raise ConfigError(f"{problem}; correct label_column={label_column}")
        print(f"{problem}: no classes; label_column= names another one", file=sys.stderr)
    texts = [(row[label] or "").strip() if label else "" for row in rows]
    are_numbers = all(NUMBER.fullmatch(text) for text in texts if text)
    table: Table = {}
    for line, (row, text) in enumerate(zip(rows, texts, strict=True), 2):
        if None in row or None in row.values():
            raise ConfigError(f"{where}: line {line} has another number of columns")
        others = row.keys() - {path_column, label, "split"}
        entry: dict[str, Any] = {"extra": {name: row[name] for name in row if name in others}}
        if label is not None:
            number = NUMBER.fullmatch(text) if are_numbers else None
            entry["category"] = int(number[1]) if number else text or None
        if "split" in row:
            entry["split"] = SPLITS.get(row["split"].lower())
            if entry["split"] is None:
                raise ConfigError(f"{where}: line {line}: split {row['split']!r} is unknown")
        if table.setdefault(row[path_column], entry) != entry:
            raise ConfigError(
                f"{where}: line {line}: {row[path_column]} is there twice, and the lines differ; "
                "keep one"
            )
    return table


def _read_celeba(partition: Path, attributes: Path | None = None) -> Table:
    """Split and attributes of each picture."""
    table: Table = {}
    for words in _words(partition):
        if len(words) == 2 and words[1] in PARTITIONS:
            table[words[0]] = {"split": PARTITIONS[words[1]]}
        elif words[0] != "image_id":
            raise _no_line(partition, words)
    lines = _words(attributes) if attributes else []
    del lines[: bool(lines) and len(lines[0]) == 1 and lines[0][0].isdigit()]  # their number
    names = [name for name in lines[0] if name != "image_id"] if lines else []
    for words in lines[1:]:
        if len(words) != len(names) + 1 or not set(words[1:]) <= {"1", "-1", "0"}:
            raise _no_line(attributes, words)
        if words[0] in table:
            values = {n: int(v) for n, v in zip(names, words[1:], strict=True)}
            table[words[0]]["extra"] = {"attributes": values}
    return table


def _words(path: Path) -> list[list[str]]:
    lines = (line.replace(",", " ").split() for line in _text(path).splitlines())
    return [words for words in lines if words]


def _no_line(path: Path | None, words: list[str]) -> ConfigError:
    return ConfigError(f"{path}: cannot read the line {' '.join(words)[:60]!r}; copy it again")
