"""Which shards `data.train` names, where their offsets lie, and what is known of them beforehand.

In: a folder, a brace pattern, a URL of either kind, `pipe:COMMAND`, a wids JSON file
(`{"shardlist": [{"url", "nsamples"}]}`), or a list of these.
Out: `Shard`s in a fixed order. `_info.json` or the wids file says how long the shards are, so that
a set of many thousand remote shards is opened by one request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls

from vae_dist.config.errors import ConfigError
from vae_dist.data.remote import (
    UnreadableError,
    is_pipe,
    is_remote,
    name_of,
    read_all,
    without_query,
)

NUM_NAMED = 5  # shards that one message names
WORK = ".pack"  # folder that `pack` works in, in its `out=`, until all shards are there


class Shard(NamedTuple):
    path: str  # or URL
    sidecar: str  # where its offsets are
    length: int | None = None  # samples
    num_bytes: int | None = None


def locate(spec: Any, *, key: str) -> list[Shard]:
    """The shards that `spec` stands for; local ones exist.

    `key` is the config key to blame, such as "data.train". Raises ConfigError.
    """
    parts = list(spec) if isinstance(spec, list | tuple) else [spec]
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
    place = Path(os.path.abspath(text))
    if out := next((out for out in place.parents if _is_in_work_of(out, place)), None):
        # a run of part of the shards could not go on with all of them
        raise ConfigError(
            f"{key}={text}: a pack has not finished, and these are its shards so far; "
            f"{_finish(out)}; then take {out / place.relative_to(out / WORK)}"
        )
    if os.path.isdir(text):
        shards = sorted(str(path) for path in Path(text).glob("*.tar"))
        if not shards:
            raise ConfigError(
                f"{key}={text}: the folder holds no *.tar file; {_how_to_make_shards(key, place)}"
            )
        return [Shard(path, f"{path}.idx") for path in shards]
    if text.endswith(".tar"):
        return [Shard(path, f"{path}.idx") for path in _expanded(text, key)]
    kind = "a file, but no .tar shard" if os.path.exists(text) else "no such folder"
    raise ConfigError(f"{key}={text}: {kind}; {_how_to_make_shards(key, place)}")


def _expanded(text: str, key: str) -> list[str]:
    try:
        return list(expand_urls(text))
    except ValueError as error:
        raise ConfigError(f"{key}={text}: {error}; write it like s-{{00..12}}.tar") from error


def unfinished_pack(place: Path) -> Path | None:
    """The folder here or just above into which a `pack` has begun and not come to its end."""
    return next((folder for folder in (place, place.parent) if _is_unfinished(folder)), None)


def _is_unfinished(out: Path) -> bool:
    return (out / WORK / "plan.json").is_file() and not (out / "pack.json").is_file()


def _is_in_work_of(out: Path, place: Path) -> bool:
    return place.parts[len(out.parts)] == WORK and _is_unfinished(out)


def _finish(out: Path) -> str:
    return f"give its command, with out={out}, again: it goes on where it stood"


def _how_to_make_shards(key: str, place: Path) -> str:
    if out := unfinished_pack(place):
        return f"a pack has not finished there; {_finish(out)}"
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
    urls = [f"{folder}/{name}{query}" for name in known] if is_folder else _expanded(text, key)
    return [Shard(url, sidecar_of(url), *known.get(name_of(url), ())) for url in urls]


def sidecar_of(url: str) -> str:
    """Where the offsets of a shard are, unless something says otherwise: beside it."""
    path, query = without_query(url)
    return f"{path}.idx{query}"


def _info(where: str, key: str, *, needed: bool) -> dict[str, tuple[int, int | None]]:
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


def read_info(where: str, *, key: str) -> dict[str, tuple[int, int | None]]:
    """(samples, bytes) of each shard after a folder's `_info.json`. Raises ConfigError, and what
    `read_all` raises."""
    data = read_all(where)
    try:
        found: dict[str, tuple[int, int | None]] = {}
        for split in json.loads(data)["splits"].values():
            names, lengths = split["filenames"], split["shard_lengths"]
            sizes = split.get("shard_bytes", [None] * len(names))
            found |= {
                os.path.basename(name): (int(length), size)
                for name, length, size in zip(names, lengths, sizes, strict=True)
            }
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {where} is no index of shards ({error!r})") from error


def _from_wids(text: str, key: str) -> list[Shard]:
    folder = without_query(text)[0].rpartition("/")[0]
    try:
        entries = json.loads(read_all(text))["shardlist"]
        return [_wids_shard(entry, folder) for entry in entries]
    except OSError as error:
        raise ConfigError(f"{key}={text}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}={text}: is no wids index ({error!r})") from error


def _wids_shard(entry: dict[str, Any], folder: str) -> Shard:
    url = _beside(str(entry["url"]), folder)
    sidecar = _beside(str(entry["index"]), folder) if "index" in entry else sidecar_of(url)
    num_bytes = entry.get("filesize")
    return Shard(
        url, sidecar, int(entry["nsamples"]), None if num_bytes is None else int(num_bytes)
    )


def _beside(name: str, folder: str) -> str:
    absolute = is_remote(name) or os.path.isabs(name) or not folder
    return name if absolute else f"{folder}/{name}"


def shown(spec: Any) -> str:
    return (
        f"[{','.join(map(str, spec))}]"
        if isinstance(spec, Sequence) and not isinstance(spec, str)
        else str(spec)
    )
