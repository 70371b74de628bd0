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
    texts = "".join(map(_text, files))
    return hashlib.blake2b(texts.encode(), digest_size=16).hexdigest() if files else ""


def apply_tables(command: PackCommand, listing: Listing) -> None:
    """Leave the pictures that a table names, with what it says. Raises ConfigError."""
    if not (files := _files(command)):
        return
    table = _read_csv(files[0], command.label_column) if command.labels else _read_celeba(*files)
    name = f"labels={command.labels}" if command.labels else str(files[0].with_suffix(""))
    named: dict[str, Item] = {}  # by row
    for item in listing.items:
        path = next((p for p in (item.name, item.name.rpartition("/")[2]) if p in table), None)
        if path is None:
            listing.left_out.append((item.name, f"not in {name}"))
        elif path in named:
            raise ConfigError(
                f"{name}: {path} fits {named[path].name} and {item.name}; name each picture by its "
                "path in source="
            )
        else:
            named[path] = item._replace(**table[path])
    if listing.items and not named:
        raise ConfigError(
            f"{name} names none of the {len(listing.items)} pictures: it has "
            f"{printable(next(iter(table), 'no row'))}, the source "
            f"{printable(listing.items[0].name)}"
        )
    listing.items = list(named.values())


def _files(command: PackCommand) -> list[Path]:
    """The CSV file; else CelebA's partition, in the source or beside its archive, and where they
    are there its attributes."""
    if command.labels:
        return [Path(command.labels)]
    spec = command.source
    first = Path(str([*spec, ""][0] if isinstance(spec, list) else spec)).expanduser()
    folder = first if first.is_dir() else first.parent
    lists = [
        next((path for end in ("txt", "csv") if (path := folder / f"{name}.{end}").is_file()), None)
        for name in ("list_eval_partition", "list_attr_celeba")
    ]
    return [path for path in lists if path] if lists[0] and first.exists() else []


def _text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"labels={path}: cannot be read ({error})") from error


def _read_csv(path: Path, label_column: str) -> Table:
    where, table = f"labels={path}", Table()
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path).removeprefix("\ufeff"), newline="")))
    except csv.Error as error:
        raise ConfigError(f"{where}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    path_column = next((c for c in PATH_COLUMNS if c in columns), None)
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    label = next((c for c in wanted if c in columns), None)
    if path_column is None:
        raise ConfigError(
            f"{where}: the columns {columns} hold none of {', '.join(PATH_COLUMNS)}; name "
            "the pictures' column path, in the first line of the file"
        )
    if label is None:
        problem = f"{where}: the columns {columns} hold no {' or '.join(wanted)}"
        if label_column:
            raise ConfigError(f"{problem}; correct label_column={label_column}")
        print(f"{problem}: no classes; label_column= names another one", file=sys.stderr)
    texts = [(row[label] or "").strip() if label else "" for row in rows]
    are_numbers = all(NUMBER.fullmatch(text) for text in texts if text)
    for line, (row, text) in enumerate(zip(rows, texts, strict=True), 2):
        split = row.get("split")
        if None in row or None in row.values():
            raise ConfigError(f"{where}: line {line} has another number of columns")
        if split is not None and split.lower() not in SPLITS:
            raise ConfigError(f"{where}: line {line}: split {split!r} is unknown")
        others = row.keys() - {path_column, label, "split"}
        entry: dict[str, Any] = {"extra": {name: row[name] for name in row if name in others}}
        if label is not None:
            number = NUMBER.fullmatch(text) if are_numbers else None
            entry["category"] = int(number[1]) if number else text or None
        if split is not None:
            entry["split"] = SPLITS[split.lower()]
        if table.setdefault(row[path_column], entry) != entry:
            raise ConfigError(
                f"{where}: line {line}: {row[path_column]} is there twice, and the lines differ; "
                "keep one"
            )
    return table


def _read_celeba(partition: Path, attributes: Path | None = None) -> Table:
    """Split and attributes of each picture: a name, then numbers."""
    splits, values = (_words(path) if path else [] for path in (partition, attributes))
    table: Table = {
        name: {"split": PARTITIONS.get(numbers[0], "")} for name, *numbers in splits if numbers
    }
    table.pop("image_id", None)  # the header of a .csv
    if "" in {entry["split"] for entry in table.values()}:
        raise ConfigError(f"{partition}: a number is none of 0, 1, 2; copy it again")
    names, *rows = [words for words in values if len(words) > 1] or [[]]  # first: their number
    names = [name for name in names if name != "image_id"]
    for name, *numbers in rows:
        if len(numbers) != len(names) or not set(numbers) <= {"1", "-1", "0"}:
            raise ConfigError(f"{attributes}: the line of {name} cannot be read; copy it again")
        if name in table:
            found = {n: int(number) for n, number in zip(names, numbers, strict=True)}
            table[name]["extra"] = {"attributes": found}
    return table


def _words(path: Path) -> list[list[str]]:
    lines = (line.replace(",", " ").split() for line in _text(path).splitlines())
    return [words for words in lines if words]
