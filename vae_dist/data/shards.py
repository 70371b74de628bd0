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
import json
import os
import sys
from collections.abc import Mapping, Sequence
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
    without_query,
)

NUM_NAMED = 5  # shards that one message names
WORK = ".job"  # folder in the `out=` of pack and encode, until all their shards are there


Known = tuple[int, int | None, str]  # samples, bytes and digest of a shard, after an index


class Shard(NamedTuple):
    path: str  # or URL
    sidecar: str  # where its offsets are
    length: int | None = None  # samples
    num_bytes: int | None = None
    digest: str = ""  # of its bytes; empty: not known


def locate(spec: Any, *, key: str, pipes: bool = True) -> list[Shard]:
    """The shards that `spec` stands for; local ones exist.

    `key` is the config key to blame, such as "data.train". pipes=False: `spec` was not given to
    this process but read from a file, so that it may name no command. Raises ConfigError.
    """
    if isinstance(spec, Mapping):
        shards = locate(spec["path"], key=key, pipes=pipes)
        return _with_index(shards, str(spec["index"]), key) if "index" in spec else shards
    parts = list(spec) if isinstance(spec, list | tuple) else [spec]
    if not pipes and (commands := [part for part in map(str, parts) if is_pipe(part)]):
        raise ConfigError(
            f"{key}={commands[0]}: a run folder's config.yaml may not name a command to run; give "
            "data='pipe:COMMAND' on the command line if you trust it"
        )
    shards = [shard for part in parts for shard in _locate_one(part, key)]
    if not shards:
        raise ConfigError(f"{key}={spec!r} names no shard; give a folder that holds *.tar files")
    missing = [s.path for s in shards if not is_remote(s.path) and not os.path.isfile(s.path)]
    if missing:
        names = ", ".join(missing[:NUM_NAMED])
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ConfigError(
            f"{key}={shown(spec)}: {len(missing)} of {len(shards)} shards are missing: "
            f"{names}{more}; copy them there, or correct the pattern"
        )
    return shards


def _locate_one(part: Any, key: str) -> list[Shard]:
    if not isinstance(part, str | os.PathLike):
        raise ConfigError(f"{key}={part!r} is no path; give a folder, a brace pattern or a list")
    text = os.fspath(part)
    if without_query(text)[0].endswith(".json") and not is_pipe(text):
        return _from_wids(text, key)
    if is_remote(text):
        return _remote(text, key)
    text = os.path.expanduser(text)
    place = Path(os.path.abspath(text))
    folder = place.parent if text.endswith(".tar") else place
    if out := next(
        (o for o in (folder, folder.parent) if (o / WORK / "plan.json").is_file()), None
    ):
        raise ConfigError(
            f"{key}={text}: the command that writes these shards has not finished; give it, with "
            f"out={out}, again: it goes on where it stood"
        )
    if os.path.isdir(text):
        shards = sorted(str(path) for path in Path(text).glob("*.tar"))
        if not shards:
            raise ConfigError(
                f"{key}={text}: the folder holds no *.tar file; {_how_to_make_shards(key)}"
            )
        if compressed := sorted(place.glob("*.tar.*z*")):
            print(
                f"warning: {key}={text}: {len(compressed)} compressed shards are left out, the "
                f"first is {compressed[0].name}; unpack them to .tar",
                file=sys.stderr,
            )
        _check_listed(place, key, text)
        return _local(shards, text, key)
    if glob.has_magic(text) and not os.path.exists(text):
        shards = sorted(path for path in glob.glob(text, recursive=True) if path.endswith(".tar"))
        if not shards:
            raise ConfigError(f"{key}={text}: no *.tar file matches; correct the pattern")
        return _local(shards, text, key)
    if text.endswith(".tar"):
        return _local(_expanded(text, key), text, key)
    kind = "a file, but no .tar shard" if os.path.exists(text) else "no such folder"
    raise ConfigError(f"{key}={text}: {kind}; {_how_to_make_shards(key)}")


def _check_listed(folder: Path, key: str, text: str) -> None:
    """Raises ConfigError when the folder lacks shards that its `_info.json` lists; one of others,
    in another form, says nothing."""
    try:
        listed = read_info(str(folder / "_info.json"), key=key)
    except ConfigError:
        return
    if missing := [name for name in listed if not (folder / name).exists()]:
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ConfigError(
            f"{key}={text}: {len(missing)} of the {len(listed)} shards that its _info.json lists "
            f"are missing: {', '.join(missing[:NUM_NAMED])}{more}; copy them there, or if they "
            f"were taken out, run `python -m vae_dist.index data='{text}/*.tar' overwrite=true`"
        )


def _local(paths: list[str], text: str, key: str) -> list[Shard]:
    if commands := list(filter(is_pipe, paths)):
        raise ConfigError(f"{key}={text}: a file is named {commands[0]!r}; rename it")
    return [Shard(path, f"{path}.idx") for path in paths]


def _expanded(text: str, key: str) -> list[str]:
    try:
        return list(expand_urls(text))
    except ValueError as error:
        raise ConfigError(f"{key}={text}: {error}; write it like s-{{00..12}}.tar") from error


def _how_to_make_shards(key: str) -> str:
    return (
        "put WebDataset shards there (`python -m vae_dist.pack source=PICTURES out=FOLDER` makes "
        f"them of pictures), or point {key} at yours"
    )


def _remote(text: str, key: str) -> list[Shard]:
    """A URL of shards, with braces or not, or of the folder that holds `_info.json`."""
    if is_pipe(text):
        return [Shard(url, "") for url in _expanded(text, key)]
    path, query = without_query(text)
    is_folder = not path.endswith(".tar")
    folder = path.rstrip("/") if is_folder else path.rpartition("/")[0]
    known = _info(f"{folder}/_info.json{query}", key, needed=is_folder)
    source = f"{folder}/_info.json"
    urls = (
        [beside(name, folder, source=source, key=key) + query for name in known]
        if is_folder
        else _expanded(text, key)
    )
    return [Shard(url, sidecar_of(url), *known.get(name_of(url), ())) for url in urls]


def sidecar_of(url: str) -> str:
    """Where the offsets of a shard are, unless something says otherwise: beside it."""
    path, query = without_query(url)
    return f"{path}.idx{query}"


def _info(where: str, key: str, *, needed: bool) -> dict[str, Known]:
    """`read_info`; where nothing is there and it is not needed, nothing is known."""
    try:
        return read_info(where, key=key)
    except UnreadableError as error:
        if needed:
            folder = where.rpartition("/_info.json")[0]
            raise ConfigError(
                f"{key}={folder}: {error}; name the shards, like {folder}/train-{{000000..000007}}"
                ".tar"
            ) from error
        if not error.is_missing:
            raise
        return {}
    except ConfigError:
        if needed:
            raise
        return {}  # a server that answers with a page for what it lacks


def read_info(where: str, *, key: str) -> dict[str, Known]:
    """(samples, bytes, digest) of each shard after a folder's `_info.json`. Raises ConfigError, and
    what `read_all` raises."""
    data = read_all(where)
    try:
        found: dict[str, Known] = {}
        for split in json.loads(data)["splits"].values():
            names, lengths = split["filenames"], split["shard_lengths"]
            sizes = split.get("shard_bytes", [None] * len(names))
            digests = split.get("shard_digests", [""] * len(names))
            found |= {
                os.path.basename(name): (int(length), size, str(digest))
                for name, length, size, digest in zip(names, lengths, sizes, digests, strict=True)
            }
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {where} is no index of shards ({error!r})") from error


def _from_wids(text: str, key: str) -> list[Shard]:
    folder = without_query(text)[0].rpartition("/")[0]
    try:
        return [_wids_shard(entry, folder, text, key) for entry in _shardlist(text)]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}={text}: is no wids index ({error!r})") from error


def _shardlist(place: str) -> list[dict[str, Any]]:
    return list(json.loads(read_all(place))["shardlist"])


def _wids_shard(entry: dict[str, Any], folder: str, source: str, key: str) -> Shard:
    url = beside(str(entry["url"]), folder, source=source, key=key)
    sidecar = sidecar_of(url)
    if "index" in entry:
        sidecar = beside(str(entry["index"]), folder, source=source, key=key)
    return Shard(url, sidecar, *_known(entry))


def _known(entry: dict[str, Any]) -> Known:
    """(samples, bytes, digest) of a shard after its entry in a wids file."""
    size = entry.get("filesize")
    return int(entry["nsamples"]), None if size is None else int(size), entry.get("digest", "")


def _with_index(shards: list[Shard], folder: str, key: str) -> list[Shard]:
    """Shards that the config names, with the lengths and sidecars that `index out=FOLDER` wrote.

    The addresses are those of the config: the file is only asked about them.
    """
    place = f"{folder}/shards.json"
    try:
        entries = {str(entry["url"]): entry for entry in _shardlist(place)}
        missing = [shard.path for shard in shards if shard.path not in entries]
        if missing:
            raise ConfigError(
                f"{key}: {place} has no entry for {missing[0]} (of {len(missing)} such shards); "
                f"make it with `python -m vae_dist.index data='URLS' out={folder}`"
            )
        return [
            Shard(
                shard.path,
                beside(str(entries[shard.path]["index"]), folder, source=place, key=key),
                *_known(entries[shard.path]),
            )
            for shard in shards
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {place} is no wids index ({error!r})") from error


def beside(name: str, folder: str, *, source: str, key: str) -> str:
    """The place that the file `source` in `folder` names: relative to it, without `..`, or an
    address of its scheme and host. Raises ConfigError for every other name."""
    if "://" in name and "::" not in name:
        its, ours = urlsplit(name), urlsplit(folder)
        if "://" in folder and (its.scheme, its.netloc) == (ours.scheme, ours.netloc):
            return name
    relative = not (
        "://" in name
        or "::" in name
        or is_pipe(name)
        or name.startswith("file:")
        or os.path.isabs(name)
        or ".." in name.replace("\\", "/").split("/")
    )
    if not relative:
        raise ConfigError(
            f"{key}: {source} names {name!r}; a file of shards may name only files beside or below "
            "it, or addresses of its own host. Give other shards in the config itself; where "
            "`python -m vae_dist.index` indexed them, as {path: SHARDS, index: FOLDER}"
        )
    return f"{folder}/{name}" if folder else name


def shown(spec: Any) -> str:
    return (
        f"[{','.join(map(str, spec))}]"
        if isinstance(spec, Sequence) and not isinstance(spec, str)
        else str(spec)
    )
