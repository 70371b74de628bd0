"""Makes the index of tars that have none, by hops from header to header, several at a time.

In: paths or addresses of shards. Out: `NAME.tar.idx` and `_info.json` beside local ones; for others
sidecars and `shards.json` in a folder; and what is wrong with each shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.sources import (
    Range,
    UnreadableError,
    is_pipe,
    is_remote,
    name_of,
    read_range,
    read_ranges,
    size_of,
)
from vae_dist.data.tar import ShardError, Source, sample_starts
from vae_dist.files import write_durably

Progress = Callable[[int, int], None]  # shards done, shards in all
Damage = dict[str, ShardError | None]  # of each shard that was read; None: it is whole

NUM_THREADS = 8  # header hops wait for the disk, not for the CPU
MAX_NAME = 100  # letters of a shard's name in that of its sidecar
WINDOW_BYTES = 1 << 22  # of a remote shard that are read at once to index it
NUM_PIECES, PIECE_BYTES = 64, 1 << 16  # of a shard that its digest covers; of small ones all


def index_shard(path: str | Path) -> np.ndarray:
    """Offsets (int64, num_samples + 1) of a plain tar, by hops from header to header.

    Raises ShardError, with the byte position, at a damaged header or a missing end.
    """
    place = str(path)
    starts, end = sample_starts(place, _in_windows(place) if is_remote(place) else None)
    return np.array([*starts, end], np.int64)


def _in_windows(place: str) -> Source:
    """Reads a remote shard in pieces that are much larger than a header."""
    begin, window = 0, b""
    size = None if is_pipe(place) else size_of(place)

    def read(at: int, count: int) -> bytes:
        nonlocal begin, window
        if not (begin <= at and at + count <= begin + len(window)):
            wanted = max(count, WINDOW_BYTES)
            begin, window = (
                at,
                read_range(place, at, wanted if size is None else min(wanted, size - at)),
            )
        return window[at - begin : at - begin + count]

    return Source(read, size)


def digest_of(place: str, size: int) -> str:
    """A word for the bytes of a shard: of all, or of pieces that lie evenly over a large one, so
    that a set of any size costs seconds. Raises UnreadableError."""
    starts = [0]
    if size > NUM_PIECES * PIECE_BYTES:
        starts = np.linspace(0, size - PIECE_BYTES, NUM_PIECES).astype(int).tolist()
    count = size if len(starts) == 1 else PIECE_BYTES
    digest = hashlib.blake2b(digest_size=16)
    for piece in read_ranges([Range(place, start, count) for start in starts]):
        digest.update(piece)
    return digest.hexdigest()


def digests_of(paths: Sequence[str]) -> list[str]:
    """`digest_of` local shards, several at a time."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda path: digest_of(path, os.path.getsize(path)), paths))


def write_sidecar(path: str | Path, offsets: np.ndarray) -> None:
    write_durably(Path(f"{path}.idx"), offsets.astype("<u8").tobytes())


def write_info(paths: Sequence[str | Path], *, split: str) -> None:
    """Write the `_info.json` of one folder from the sidecars of its shards."""
    lengths = [os.path.getsize(f"{path}.idx") // 8 - 1 for path in paths]
    info = {
        "name": split,
        "filenames": [os.path.basename(path) for path in paths],
        "shard_lengths": lengths,
        "num_samples": sum(lengths),
        "shard_bytes": [os.path.getsize(path) for path in paths],
        "shard_digests": digests_of([str(path) for path in paths]),
    }
    text = json.dumps({"splits": {split: info}}, indent=1)
    write_durably(Path(paths[0]).parent / "_info.json", text.encode())


def write_index(
    paths: Sequence[str], *, overwrite: bool = False, progress: Progress | None = None
) -> Damage:
    """Make the sidecars that are missing (all with `overwrite`), several shards at a time.

    `_info.json` is written where there is none (or with `overwrite`) and all shards have a
    sidecar. Raises ConfigError when the folder cannot be written.
    """

    def make(path: str) -> ShardError | None:
        try:
            _make(path, Path(f"{path}.idx"))
        except ShardError as error:
            return error
        return None

    todo = [path for path in paths if overwrite or not os.path.exists(f"{path}.idx")]
    try:
        damage = _in_threads(make, todo, progress)
        for folder in sorted({os.path.dirname(path) for path in paths}):
            shards = [path for path in paths if os.path.dirname(path) == folder]
            complete = all(os.path.exists(f"{path}.idx") for path in shards)
            if complete and (overwrite or not os.path.exists(os.path.join(folder, "_info.json"))):
                write_info(shards, split=os.path.basename(os.path.abspath(folder)))
    except OSError as error:
        raise ConfigError(
            f"the index of the shards cannot be written ({error}); run `python -m vae_dist.index` "
            "as somebody who can write there, or copy the shards"
        ) from error
    return damage


def write_index_of_remote(
    urls: Sequence[str], folder: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Damage:
    """Index shards that lie elsewhere into `folder`: a sidecar for each, and `shards.json` (wids)
    when all are whole. Sidecars of these addresses and sizes are left alone, so that a killed call
    goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    kept: set[str] = set()

    def make(url: str) -> ShardError | None:
        try:
            size = None if is_pipe(url) else size_of(url)
            facts = {} if size is None else {"filesize": size, "digest": digest_of(url, size)}
            # a sidecar's name says whose it is: other addresses and sizes have others
            owner = hashlib.blake2b(f"{url}\0{size}".encode(), digest_size=8).hexdigest()
            sidecar = folder / f"{name_of(url)[-MAX_NAME:]}-{owner}.idx"
            if sidecar.exists() and not overwrite:
                kept.add(url)
            else:
                _make(url, sidecar)
        except ShardError as error:
            return error
        length = sidecar.stat().st_size // 8 - 1
        entries[url] = {"url": url, "index": sidecar.name, **facts, "nsamples": length}
        return None

    damage = _in_threads(make, list(dict.fromkeys(urls)), progress)
    if not any(damage.values()):
        shards = [entries[url] for url in urls]
        text = json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": shards}, indent=1)
        write_durably(folder / "shards.json", text.encode())
    return {url: error for url, error in damage.items() if url not in kept}


def _make(place: str, sidecar: Path) -> None:
    """Make a sidecar. A damaged shard gets none, and loses one that it had. Raises ShardError."""
    try:
        write_durably(sidecar, index_shard(place).astype("<u8").tobytes())
    except ShardError as error:
        if not isinstance(error, UnreadableError):  # else nothing is known of the shard
            sidecar.unlink(missing_ok=True)
        raise


def _in_threads(
    make: Callable[[str], ShardError | None], places: Sequence[str], progress: Progress | None
) -> Damage:
    found: Damage = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for place, error in zip(places, pool.map(make, places), strict=True):
            found[place] = error
            if progress is not None:
                progress(len(found), len(places))
    return found
