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
import re
import sys
from pathlib import Path
from typing import Any

from vae_dist.config.errors import ConfigError
from vae_dist.packing.items import SPLITS, Item, Listing, Named, shown_name

Table = dict[str, dict[str, Any]]  # by path or name: fields of `Item`

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_id", "name")
LABEL_COLUMNS = ("label", "class", "category")
NUMBER = re.compile(r"(-?\d+)(\.0+)?")  # pandas writes 3.0 where a column has empty fields
CELEBA_LISTS = ("list_eval_partition", "list_attr_celeba")  # .txt, or .csv
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}


def apply(table: Table, listing: Listing, *, name: str) -> Listing:
    """The pictures that the table names, with what it says. Raises ConfigError."""
    items: list[Item] = []
    left_out: list[Named] = list(listing.left_out)
    named: dict[str, str] = {}  # picture of each row
    for item in listing.items:
        path = next((p for p in (item.name, item.name.rpartition("/")[2]) if p in table), None)
        if path is None:
            left_out.append((item.name, f"not in {name}"))
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
            f"{name} names none of the {len(listing.items)} pictures: it has {shown_name(row)}, "
            f"the source {shown_name(listing.items[0].name)}"
        )
    return listing._replace(items=items, left_out=left_out)


def digest(csv_file: str, source: Any) -> str:
    """Of the files that label the pictures: the CSV file, or CelebA's lists; empty where none does.
    Raises ConfigError."""
    files = [Path(csv_file)] if csv_file else celeba_lists(source)
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            found.update(file.read_bytes())
        except OSError as error:
            where = f"labels={file}" if csv_file else str(file)
            raise ConfigError(f"{where}: cannot be read ({error})") from error
    return found.hexdigest() if files else ""


def read_csv(path: Path, *, label_column: str = "") -> Table:
    """Raises ConfigError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"labels={path}: cannot be read ({error})") from error
    columns = list(rows[0]) if rows else []
    path_column = next((c for c in PATH_COLUMNS if c in columns), None)
    if path_column is None:
        raise ConfigError(
            f"labels={path}: the columns {columns} hold none of {', '.join(PATH_COLUMNS)}; name "
            "the pictures' column path, in the first line of the file"
        )
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    label = next((c for c in wanted if c in columns), None)
    if label is None:
        problem = f"labels={path}: the columns {columns} hold no {' or '.join(wanted)}"
        if label_column:
            raise ConfigError(f"{problem}; correct label_column={label_column}")
        print(f"{problem}: no classes; label_column= names another one", file=sys.stderr)
    numbers = [NUMBER.fullmatch(row[label]) for row in rows if label and (row[label] or "").strip()]
    used = {path_column, label, "split"}
    table: Table = {}
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ConfigError(f"labels={path}: line {line} has another number of columns")
        entry: dict[str, Any] = {"extra": {n: v for n, v in row.items() if n not in used} or None}
        if label is not None:
            entry["category"] = _category(row[label].strip(), as_number=None not in numbers)
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


def _category(text: str, *, as_number: bool) -> int | str | None:
    found = NUMBER.fullmatch(text) if as_number else None
    return int(found[1]) if found else text or None


# CelebA


def celeba_lists(source: Any) -> list[Path]:
    """The lists in the folder of a source, or beside its archive: the partition and, where they are
    there, the attributes."""
    first = Path(str([*source, ""][0] if isinstance(source, list) else source)).expanduser()
    if not first.exists():
        return []
    folder = first if first.is_dir() else first.parent
    partition, *attributes = (
        next((path for end in ("txt", "csv") if (path := folder / f"{name}.{end}").is_file()), None)
        for name in CELEBA_LISTS
    )
    return [path for path in (partition, *attributes) if path] if partition else []


def read_celeba_lists(partition: Path, attributes: Path | None = None) -> Table:
    """Split and attributes of each picture. Raises ConfigError."""
    table: Table = {}
    for line in partition.read_text().splitlines():
        words = line.replace(",", " ").split()
        if len(words) == 2 and words[1] in PARTITIONS:
            table[words[0]] = {"split": PARTITIONS[words[1]]}
        elif words and words[0] != "image_id":
            raise ConfigError(f"{partition}: cannot read the line {line[:60]!r}; copy it again")
    if attributes is not None:
        _add_attributes(table, attributes)
    return table


def _add_attributes(table: Table, path: Path) -> None:
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
