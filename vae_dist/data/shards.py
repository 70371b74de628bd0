"""Which shards `data.train` names, where their offsets lie, and what is known of them beforehand.

In: a folder, a brace pattern, a glob (`data/*.tar`), a URL of either kind, `pipe:COMMAND`, a wids
JSON file (`{"shardlist": [{"url", "nsamples"}]}`), a list of these, or `{path: SHARDS, index:
FOLDER}` for shards elsewhere whose index `python -m vae_dist.index out=FOLDER` wrote.
Out: `Shard`s in a fixed order. `_info.json` or the wids file says how long the shards are, so that
a set of many thousand remote shards is opened by one request.

A name that a file or a server gives is relative to the place of that file, or an address of the
same scheme and host: it can name no command, no other host and no file elsewhere.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from webdataset.shardlists import expand_urls

from vae_dist.config.errors import ConfigError
from vae_dist.data.sources import (
    UnreadableError,
    is_pipe,
    is_remote,
    name_of,
    read_all,
    warn,
    without_query,
)
from vae_dist.files import read_json

NUM_NAMED = 5  # shards that one message names
WORK = ".job"  # folder in the `out=` of pack and encode, until all their shards are there
MAX_LIST_BYTES = 1 << 26  # of a JSON file: some 400,000 shards


class Shard(NamedTuple):
    """What is known of a shard beforehand. None, empty: nothing."""

    path: str  # or URL
    sidecar: str = ""  # where its offsets are
    length: int | None = None  # samples
    num_bytes: int | None = None
    digest: str = ""  # of its bytes


def locate(spec: Any, *, key: str) -> list[Shard]:
    """The shards that `spec` stands for; local ones exist.

    `key` is the config key to blame, such as "data.train". Raises ConfigError.
    """
    if isinstance(spec, Mapping):
        shards = locate(spec["path"], key=key)
        return _with_index(shards, str(spec["index"]), key) if "index" in spec else shards
    shards = []
    for part in spec if isinstance(spec, list | tuple) else [spec]:
        if not isinstance(part, str | os.PathLike):
            raise ConfigError(
                f"{key}={part!r} is no path; give a folder, a brace pattern or a list"
            )
        shards += _of_text(os.fspath(part), key)
    if not shards:
        raise ConfigError(f"{key}={spec!r} names no shard; give a folder that holds *.tar files")
    missing = [s.path for s in shards if not is_remote(s.path) and not os.path.isfile(s.path)]
    if missing:
        raise ConfigError(
            f"{key}={spec}: {len(missing)} of {len(shards)} shards are missing: {first(missing)}; "
            "copy them there, or correct the pattern"
        )
    return shards


def first(names: list[str]) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _of_text(text: str, key: str) -> list[Shard]:
    blamed = f"{key}={text}"
    if is_pipe(text):
        return [Shard(url) for url in _expanded(text, blamed)]
    if without_query(text)[0].endswith(".json"):
        return [_resolved(shard, text, key) for shard in read_list(text)]
    if is_remote(text):
        return _of_address(text, blamed, key)
    paths = _local_paths(os.path.expanduser(text), blamed)
    if commands := list(filter(is_pipe, paths)):
        raise ConfigError(f"{blamed}: a file is named {commands[0]!r}; rename it")
    return [Shard(path, f"{path}.idx") for path in paths]


def _local_paths(text: str, blamed: str) -> list[str]:
    """What a folder, a glob or a brace pattern stands for."""
    place = Path(os.path.abspath(text))
    folder = place.parent if text.endswith(".tar") else place
    for out in (folder, folder.parent):
        if (out / WORK / "plan.json").is_file():
            raise ConfigError(
                f"{blamed}: the command that writes these shards has not finished; give it, with "
                f"out={out}, again: it goes on where it stood"
            )
    if place.is_dir():
        _check_folder(place, blamed, text)
        paths, problem = [*map(str, Path(text).glob("*.tar"))], "the folder holds no *.tar file"
        if below := sorted({str(path.parent) for path in Path(text).glob("*/*.tar")}):
            problem += f", but there are some in {first(below)}"
    elif glob.has_magic(text) and not place.exists():
        paths = [path for path in glob.glob(text, recursive=True) if path.endswith(".tar")]
        problem = "no *.tar file matches"
    elif text.endswith(".tar"):
        return _expanded(text, blamed)
    else:
        paths, problem = [], "a file, but no .tar shard" if place.exists() else "no such folder"
    if paths:
        return sorted(paths)
    raise ConfigError(
        f"{blamed}: {problem}; point it at WebDataset shards, or make them of pictures with "
        "`python -m vae_dist.pack source=PICTURES out=FOLDER`"
    )


def _check_folder(folder: Path, blamed: str, text: str) -> None:
    """Say what is left out of a folder. Raises ConfigError when it lacks shards that its
    `_info.json` lists; one of others, in another form, says nothing."""
    if compressed := sorted(path.name for path in folder.glob("*.tar.*z*")):
        warn(f"{blamed}: compressed shards are left out ({first(compressed)}); unpack them to .tar")
    try:
        listed = read_list(str(folder / "_info.json"))
    except ConfigError:
        return
    if missing := [shard.path for shard in listed if not (folder / shard.path).exists()]:
        raise ConfigError(
            f"{blamed}: {len(missing)} of the {len(listed)} shards that its _info.json lists are "
            f"missing: {first(missing)}; copy them there, or if they were taken out, run `python "
            f"-m vae_dist.index data='{text}/*.tar' overwrite=true`"
        )


def _expanded(text: str, blamed: str) -> list[str]:
    try:
        return list(expand_urls(text))
    except ValueError as error:
        raise ConfigError(f"{blamed}: {error}; write it like s-{{00..12}}.tar") from error


def _of_address(text: str, blamed: str, key: str) -> list[Shard]:
    """Of a URL of shards, with braces or not, or of the folder that holds `_info.json`."""
    path, query = without_query(text)
    is_folder = not path.endswith(".tar")
    folder = path.rstrip("/") if is_folder else path.rpartition("/")[0]
    info = f"{folder}/_info.json{query}"
    try:
        listed = read_list(info)
    except ConfigError as error:
        if is_folder:
            raise ConfigError(
                f"{blamed}: {error}; name the shards, like {folder}/train-{{000000..000007}}.tar"
            ) from error
        # a server may answer with a page for what it lacks
        if isinstance(error, UnreadableError) and not error.is_missing:
            raise
        listed = []
    if is_folder:
        return [_resolved(shard, info, key) for shard in listed]
    known = {shard.path: shard for shard in listed}
    urls = [(url, known.get(name_of(url), Shard(url))) for url in _expanded(text, blamed)]
    return [shard._replace(path=url, sidecar=sidecar_of(url)) for url, shard in urls]


def sidecar_of(url: str) -> str:
    """Where the offsets of a shard are, unless something says otherwise: beside it."""
    path, query = without_query(url)
    return f"{path}.idx{query}"


def read_list(place: str) -> list[Shard]:
    """The shards that an `_info.json` or a wids file lists, under the names that it gives. Raises
    ConfigError, of which UnreadableError where it cannot be read."""
    data = read_all(place, MAX_LIST_BYTES)
    try:
        content = read_json(data, MAX_LIST_BYTES, name=place)
        rows: list[tuple[Any, ...]] = []
        for entry in content.get("shardlist", []):
            facts = entry["nsamples"], entry.get("filesize"), entry.get("digest")
            rows.append((entry["url"], entry.get("index"), *facts))
        for split in [] if rows else content["splits"].values():
            names = [os.path.basename(name) for name in split["filenames"]]
            nothing = [None] * len(names)
            columns = split.get("shard_bytes", nothing), split.get("shard_digests", nothing)
            rows += zip(names, nothing, split["shard_lengths"], *columns, strict=True)
        shards = [
            Shard(str(name), str(index or ""), int(length), size and int(size), str(digest or ""))
            for name, index, length, size, digest in rows
        ]
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place} is no list of shards ({error!r})") from error
    if any(not 0 <= (number or 0) < 2**48 for shard in shards for number in shard[2:4]):
        raise ConfigError(f"{place} is no list of shards (some of its numbers cannot be)")
    return shards


def _resolved(shard: Shard, source: str, key: str) -> Shard:
    """A shard that the file `source` lists, under its own address."""
    path, query = beside(shard.path, source, key), without_query(source)[1]
    path += query if "?" not in path else ""
    sidecar = beside(shard.sidecar, source, key) if shard.sidecar else sidecar_of(path)
    return shard._replace(path=path, sidecar=sidecar)


def _with_index(shards: list[Shard], folder: str, key: str) -> list[Shard]:
    """Shards that the config names, with what `index out=FOLDER` wrote of them.

    The addresses are those of the config: the file is only asked about them.
    """
    place = f"{folder}/shards.json"
    known = {shard.path: shard for shard in read_list(place)}
    missing = [shard.path for shard in shards if shard.path not in known]
    if missing:
        raise ConfigError(
            f"{key}: {place} has no entry for {missing[0]} (of {len(missing)} such shards); make "
            f"it with `python -m vae_dist.index data='URLS' out={folder}`"
        )
    entries = [known[shard.path] for shard in shards]
    return [entry._replace(sidecar=beside(entry.sidecar, place, key)) for entry in entries]


def beside(name: str, source: str, key: str) -> str:
    """The place that the file `source` names: relative to its folder, without `..`, or an address
    of its scheme and host. Raises ConfigError for every other name."""
    folder = without_query(source)[0].rpartition("/")[0]
    if "://" in name and "::" not in name and "://" in folder:
        its, ours = urlsplit(name), urlsplit(folder)
        if (its.scheme, its.netloc) == (ours.scheme, ours.netloc):
            return name
    if (
        "://" in name
        or "::" in name
        or name.startswith(("pipe:", "file:", "/", "\\"))
        or ".." in name.replace("\\", "/").split("/")
    ):
        raise ConfigError(
            f"{key}: {source} names {name!r}; a file of shards may name only files beside or below "
            "it, or addresses of its own host. Give other shards in the config itself; where "
            "`python -m vae_dist.index` indexed them, as {path: SHARDS, index: FOLDER}"
        )
    return f"{folder}/{name}" if folder else name
