"""The index of a set of shards: how many samples, and where each begins.

In: `data.train` or `data.validation`: a folder, a brace pattern, a URL, or a list of these.
Out: `ShardIndex`. Offset i of a shard is the byte at which sample i begins, the last one is the
byte after its last sample; `sample i = bytes[offset[i]:offset[i + 1]]`.

Two formats that others read too lie beside the shards: `NAME.tar.idx`, the offsets as
little-endian uint64 (Megatron-Energon), and `_info.json` with `shard_lengths` (timm). Where they
are missing they are made, by hops from header to header, several shards at a time; those of shards
elsewhere in a folder, with `shards.json` (wids).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.shards import NUM_NAMED, Shard, locate, read_list
from vae_dist.data.sources import (
    START_RETRY_S,
    Range,
    is_pipe,
    is_remote,
    name_of,
    read_range,
    read_ranges,
    size_of,
    size_or_none,
)
from vae_dist.data.tar import ShardError, Source, end_of_samples, sample_starts
from vae_dist.files import write_durably

Progress = Callable[[int, int], None]  # shards done, shards in all
Damage = dict[str, ShardError | None]  # of each shard that was read; None: it is whole

NUM_THREADS = 8  # header hops wait for the disk, not for the CPU
MAX_NAME = 100  # letters of a shard's name in that of its sidecar
WINDOW_BYTES = 1 << 22  # of a remote shard that are read at once to index it
NUM_PIECES, PIECE_BYTES = 64, 1 << 16  # of a shard that its digest covers; of small ones all
MAX_SAMPLE_BYTES = 1 << 31


class Run(NamedTuple):
    """Consecutive samples start, ..., stop - 1 of a shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardIndex:
    """Shards with their number of samples (int64) and bytes (int64), in a fixed order."""

    paths: tuple[str, ...]
    lengths: np.ndarray
    bytes: np.ndarray
    sidecars: tuple[str, ...] = ()  # where the offsets are
    parts: tuple[tuple[int, float], ...] = ()  # of a mixture: number of shards and weight of each
    digests: tuple[str, ...] = ()  # of the bytes of each shard; empty: not known

    @property
    def num_samples(self) -> int:
        return int(self.lengths.sum())

    @property
    def mean_sample_bytes(self) -> float:
        """Bytes of the shards over samples: what one undecoded sample takes in memory."""
        return float(self.bytes.sum()) / max(1, self.num_samples)

    @property
    def fingerprint(self) -> str:
        """Names, lengths, sizes and, where the index has digests, bytes in one word: another data
        set, or another order, differs."""
        digest = hashlib.blake2b(digest_size=16)
        digests = self.digests or ("",) * len(self.paths)
        for path, length, size, of_bytes in zip(
            self.paths, self.lengths, self.bytes, digests, strict=True
        ):
            content = f"\0{of_bytes}" if of_bytes else ""
            line = f"{name_of(path)}\0{length}\0{size}{content}\n"
            digest.update(line.encode(errors="surrogateescape"))
        digest.update(repr(self.parts).encode() if self.parts else b"")
        return digest.hexdigest()

    def offsets(self, runs: Sequence[Run], *, retry_s: float = START_RETRY_S) -> list[np.ndarray]:
        """Byte offsets (int64) of the samples start, ..., stop of runs: stop - start + 1 of each.

        All are read together. Raises ShardError when they cannot be read or do not rise.
        """
        ranges = [
            Range(self.sidecars[shard], 8 * start, 8 * (stop - start + 1))
            for shard, start, stop in runs
        ]
        found = []
        for run, data in zip(runs, read_ranges(ranges, retry_s=retry_s), strict=True):
            offsets = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
            sizes = np.diff(offsets)
            is_whole = len(offsets) == run.stop - run.start + 1 and offsets[0] >= 0
            is_rising = (sizes > 0).all() and (sizes <= MAX_SAMPLE_BYTES).all()
            if not (is_whole and is_rising and offsets[-1] <= self.bytes[run.shard]):
                which = f"{self.sidecars[run.shard]}: offsets {run.start} to {run.stop}"
                raise ShardError(f"{which} are damaged; index the shards again")
            found.append(offsets)
        return found


def is_mixture(spec: Any) -> bool:
    """Whether several data sets are mixed: [{path: SHARDS, weight: NUMBER}, ...]."""
    return isinstance(spec, list | tuple) and any(isinstance(part, Mapping) for part in spec)


def load_index(spec: Any, *, key: str, create: bool) -> ShardIndex:
    """The index of the shards that `spec` names; with `create`, missing local sidecars are made.

    Over several ranks only the main process creates. Raises ConfigError for shards or sidecars
    that are missing, ShardError (a ConfigError) for those that do not fit.
    """
    if is_mixture(spec):
        parts = [{k: v for k, v in part.items() if k != "weight"} for part in spec]
        indexes = [load_index(p, key=key, create=create) for p in parts]
        return _joined(indexes, [float(part.get("weight", 1)) for part in spec])
    shards = locate(spec, key=key)
    if create:
        here = [s.path for s in shards if not is_remote(s.path) and s.sidecar == f"{s.path}.idx"]
        if errors := [str(error) for error in write_index(here).values() if error is not None]:
            raise ShardError(errors[:NUM_NAMED])
    command = f"python -m vae_dist.index data='{shown(spec)}'"
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        known = list(pool.map(lambda shard: _length_and_bytes(shard, key, command), shards))
    lengths, sizes = np.array(known, np.int64).reshape(-1, 2).T
    paths, sidecars = (tuple(getattr(s, name) for s in shards) for name in ("path", "sidecar"))
    index = ShardIndex(paths, lengths, sizes, sidecars, digests=_digests(shards, create=create))
    if index.num_samples == 0:
        raise ConfigError(f"{key}={shown(spec)}: the shards hold no sample")
    return index


def _joined(indexes: Sequence[ShardIndex], weights: Sequence[float]) -> ShardIndex:
    return ShardIndex(
        tuple(path for index in indexes for path in index.paths),
        np.concatenate([index.lengths for index in indexes]),
        np.concatenate([index.bytes for index in indexes]),
        tuple(sidecar for index in indexes for sidecar in index.sidecars),
        tuple((len(i.paths), weight) for i, weight in zip(indexes, weights, strict=True)),
        tuple(digest for index in indexes for digest in index.digests),
    )


def _length_and_bytes(shard: Shard, key: str, command: str) -> tuple[int, int]:
    """Samples and bytes of a shard. What lies here is checked; of remote shards what is known is
    believed, and a window that is not there as the index says stops the run."""
    path, sidecar, length, size, _ = shard
    is_here = not is_remote(path)
    if is_here or length is None:
        num_bytes = size_or_none(sidecar) if sidecar else None
        if num_bytes is None:
            remedy = "`" if is_here else " out=FOLDER` and give {path: SHARDS, index: FOLDER}"
            raise ConfigError(f"{key}: {path} has no index; make it with `{command}{remedy}")
        length = num_bytes // 8 - 1
        if is_here:
            size = size_of(path)
            end = int.from_bytes(read_range(sidecar, max(0, num_bytes - 8), 8), "little")
            if num_bytes % 8 or num_bytes == 0 or not end_of_samples(path, end):
                raise ShardError(
                    f"{key}: {sidecar} does not fit {path} ({size} bytes; the index ends at "
                    f"{end}); if the shard was replaced, run `{command} overwrite=true`, if it was "
                    "cut off, copy it again"
                )
    if size is None and is_pipe(path):
        size = int.from_bytes(read_range(sidecar, 8 * length, 8), "little")
    return length, size_of(path) if size is None else size


def _digests(shards: Sequence[Shard], *, create: bool) -> tuple[str, ...]:
    """Of the shards' bytes, after their index. Those of local shards that are younger than their
    `_info.json`, or have another size, are taken anew; if all are as it says, `create` marks it as
    younger."""
    digests = {shard.path: shard.digest for shard in shards}
    for folder in {os.path.dirname(shard.path) for shard in shards if not is_remote(shard.path)}:
        info = os.path.join(folder, "_info.json")
        try:
            listed = {os.path.join(folder, shard.path): shard for shard in read_list(info)}
            written, now = os.stat(info).st_mtime_ns, time.time_ns()
        except (OSError, ConfigError):
            continue  # one of others, in another form, says nothing
        stale = [
            path
            for path, shard in listed.items()
            if os.path.exists(path)
            and (os.stat(path).st_mtime_ns > written or os.path.getsize(path) != shard.num_bytes)
        ]
        found = {path: s.digest for path, s in listed.items() if path in digests and s.digest}
        mine = [path for path in stale if path in found]
        taken = dict(zip(mine, digests_of(mine), strict=True))
        if create and mine == stale and taken == {path: found[path] for path in mine}:
            with contextlib.suppress(OSError):
                os.utime(info, ns=(now, now))
        digests |= found | taken
    return tuple(digests[shard.path] for shard in shards)


# making it


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
            wanted = wanted if size is None else min(wanted, size - at)
            begin, window = at, read_range(place, at, wanted)
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
    todo = [path for path in paths if overwrite or not os.path.exists(f"{path}.idx")]
    try:
        damage = _in_threads(lambda path: write_sidecar(path, index_shard(path)), todo, progress)
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

    def make(url: str) -> None:
        size = None if is_pipe(url) else size_of(url)
        facts = {} if size is None else {"filesize": size, "digest": digest_of(url, size)}
        # a sidecar's name says whose it is: other addresses and sizes have others
        owner = hashlib.blake2b(f"{url}\0{size}".encode(), digest_size=8).hexdigest()
        name = f"{name_of(url)[-MAX_NAME:]}-{owner}"
        sidecar = folder / f"{name}.idx"
        if sidecar.exists() and not overwrite:
            kept.add(url)
        else:
            write_sidecar(folder / name, index_shard(url))
        length = sidecar.stat().st_size // 8 - 1
        entries[url] = {"url": url, "index": sidecar.name, **facts, "nsamples": length}

    damage = _in_threads(make, list(dict.fromkeys(urls)), progress)
    if not any(damage.values()):
        shards = [entries[url] for url in urls]
        text = json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": shards}, indent=1)
        write_durably(folder / "shards.json", text.encode())
    return {url: error for url, error in damage.items() if url not in kept}


def _in_threads(
    make: Callable[[str], None], places: Sequence[str], progress: Progress | None
) -> Damage:
    """Makes several at a time; the ShardError of each, or None."""

    def attempt(place: str) -> ShardError | None:
        try:
            make(place)
        except ShardError as error:
            return error
        return None

    found: Damage = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for place, error in zip(places, pool.map(attempt, places), strict=True):
            found[place] = error
            if progress is not None:
                progress(len(found), len(places))
    return found
