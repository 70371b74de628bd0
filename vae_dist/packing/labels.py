"""Tables that say what pictures are: CSV files, and the lists of CelebA.

CSV: a header line, a column `path` (or file, filename, image, image_id, name), if wanted `label`
(or class, category, or the one that `label_column=` names) and `split`; the other columns are kept
as .json. An empty label is none. A row fits the picture of its path, or of its name if only one
picture has it.
CelebA: `list_eval_partition.txt` and `list_attr_celeba.txt` beside the pictures, as published, or
.csv, as Kaggle has them.
"""

from __future__ import annotations

import csv
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


def apply_tables(command: PackCommand, listing: Listing) -> None:
    """Leave the pictures that a table names, with what it says. Raises ConfigError."""
    if command.labels:
        name = f"labels={command.labels}"
        table = _read_csv(Path(command.labels), command.label_column)
    elif lists := _celeba_lists(command.source):
        name, table = str(lists[0]), _read_celeba(*lists)
    else:
        return
    named: dict[str, Item] = {}  # by row
    for item in listing.items:
        path = next((p for p in (item.name, item.name.rpartition("/")[2]) if p in table), None)
        if path is None:
            listing.leave(item.name, f"not in {name}")
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


def text_of(path: Path) -> str:
    """Of a table. Raises ConfigError."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"labels={path}: cannot be read ({error})") from error


def _read_csv(path: Path, label_column: str) -> Table:
    where, table = f"labels={path}", Table()
    try:
        rows = list(csv.DictReader(io.StringIO(text_of(path), newline="")))
    except csv.Error as error:
        raise ConfigError(f"{where}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    path_column = next((c for c in PATH_COLUMNS if c in columns), None)
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    label = next((c for c in wanted if c in columns), None)
    problem = f"{where}: the columns {columns} hold no {' or '.join(wanted)}"
    if path_column is None:
        raise ConfigError(f"{where}: the columns {columns} hold none of {', '.join(PATH_COLUMNS)}")
    if label is None and label_column:
        raise ConfigError(f"{problem}; correct label_column={label_column}")
    if label is None:
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
                f"{where}: line {line}: {row[path_column]} was there with other fields"
            )
    return table


def _celeba_lists(source: Any) -> list[Path]:
    """CelebA's partition, in the source or beside its archive, and its attributes, if there."""
    first = Path(str([*source, ""][0] if isinstance(source, list) else source)).expanduser()
    folder = first if first.is_dir() else first.parent
    lists = [
        next((path for end in ("txt", "csv") if (path := folder / f"{name}.{end}").is_file()), None)
        for name in ("list_eval_partition", "list_attr_celeba")
    ]
    return [path for path in lists if path] if lists[0] and first.exists() else []


def _read_celeba(partition: Path, attributes: Path | None = None) -> Table:
    """Split and attributes of each picture: a name, then numbers."""
    table, line = Table(), list[str]()
    try:
        for line in _words(partition):
            if line[0] != "image_id":  # the header of a .csv
                table[line[0]] = {"split": PARTITIONS[line[1]]}
        lines = [line for line in _words(attributes) if len(line) > 1] if attributes else [line]
        names = [name for name in lines[0] if name != "image_id"]
        for line in lines[1:]:
            if line[0] in table:
                found = dict(zip(names, map(int, line[1:]), strict=True))
                table[line[0]]["extra"] = {"attributes": found}
    except (LookupError, ValueError):
        raise ConfigError(f"{partition.parent}: a list's line of {line[:1]} is damaged") from None
    return table


def _words(path: Path) -> list[list[str]]:
    lines = (line.replace(",", " ").split() for line in text_of(path).splitlines())
    return [words for words in lines if words]
