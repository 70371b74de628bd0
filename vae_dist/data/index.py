"""The index of a set of shards: how many samples, and where each begins.

In: `data.train` or `data.validation`: a folder, a brace pattern, a URL, or a list of these.
Out: `ShardIndex`. Offset i of a shard is the byte at which sample i begins, the last one is the
byte after its last sample; `sample i = bytes[offset[i]:offset[i + 1]]`.

Two formats that others read too lie beside the shards: `NAME.tar.idx`, the offsets as
little-endian uint64 (Megatron-Energon), which is what this module reads, and `_info.json` with
`shard_lengths` (timm). `vae_dist.data.indexing` makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown
from vae_dist.data.indexing import NUM_THREADS, digests_of, write_index
from vae_dist.data.shards import NUM_NAMED, Shard, locate, read_list
from vae_dist.data.sources import (
    START_RETRY_S,
    Range,
    exists,
    is_pipe,
    is_remote,
    name_of,
    read_range,
    read_ranges,
    size_of,
    warn,
)
from vae_dist.data.tar import ShardError, end_of_samples

MAX_SAMPLE_BYTES = 1 << 31
REMAKE = "make it again with `python -m vae_dist.index data=FOLDER overwrite=true`"


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

    def offsets(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Byte offsets (int64) of the samples start, ..., stop of a shard: stop - start + 1.

        Raises ShardError when they cannot be read or do not rise.
        """
        stop = int(self.lengths[shard]) if stop is None else stop
        (found,) = self.offsets_of([Run(shard, start, stop)])
        if isinstance(found, ShardError):
            raise found
        return found

    def offsets_of(
        self, runs: Sequence[Run], *, retry_s: float = START_RETRY_S
    ) -> list[np.ndarray | ShardError]:
        """Those of several runs of samples, read together, or what is wrong with them."""
        ranges = [
            Range(self.sidecars[shard], 8 * start, 8 * (stop - start + 1))
            for shard, start, stop in runs
        ]
        found: list[np.ndarray | ShardError] = []
        pieces = read_ranges(ranges, retry_s=retry_s)
        for run, data in zip(runs, pieces, strict=True):
            if isinstance(data, ShardError):
                found.append(data)
                continue
            offsets = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
            sizes = np.diff(offsets)
            is_whole = len(offsets) == run.stop - run.start + 1 and offsets[0] >= 0
            is_rising = (sizes > 0).all() and (sizes <= MAX_SAMPLE_BYTES).all()
            if is_whole and is_rising and offsets[-1] <= self.bytes[run.shard]:
                found.append(offsets)
            else:
                which = f"{self.sidecars[run.shard]}: offsets {run.start} to {run.stop}"
                found.append(ShardError(f"{which} are damaged; {REMAKE}"))
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
        damage = write_index(here).values()
        if errors := [str(error) for error in damage if error is not None]:
            more = len(errors) - NUM_NAMED
            raise ShardError(errors[:NUM_NAMED] + ([f"and {more} more shards"] if more > 0 else []))
    remake = f"`python -m vae_dist.index data='{shown(spec)}'"
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        known = list(pool.map(lambda shard: _length_and_bytes(shard, key, remake), shards))
    lengths, sizes = np.array(known, np.int64).reshape(-1, 2).T
    digests = _digests(shards, lengths.tolist(), create=create)
    paths, sidecars = (tuple(getattr(s, name) for s in shards) for name in ("path", "sidecar"))
    index = ShardIndex(paths, lengths, sizes, sidecars, digests=digests)
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


def _length_and_bytes(shard: Shard, key: str, remake: str) -> tuple[int, int]:
    """Samples and bytes of a shard. What lies here is checked; of remote shards what is known is
    believed, and a window that is not there as the index says stops the run."""
    length, size = shard.length, shard.num_bytes
    is_here = not is_remote(shard.path)
    if not shard.sidecar or ((is_here or length is None) and not exists(shard.sidecar)):
        remedy = "`" if is_here else " out=FOLDER` and give {path: SHARDS, index: FOLDER}"
        raise ConfigError(f"{key}: {shard.path} has no index; make it with {remake}{remedy}")
    if is_here:
        return _checked_length(shard, key, remake), size_of(shard.path)
    if length is None:
        length = size_of(shard.sidecar) // 8 - 1
    if size is None and is_pipe(shard.path):
        size = int.from_bytes(read_range(shard.sidecar, 8 * length, 8), "little")
    return length, size_of(shard.path) if size is None else size


def _checked_length(shard: Shard, key: str, remake: str) -> int:
    """Samples of a local shard after its sidecar, which must fit the shard's size."""
    path, sidecar = shard.path, shard.sidecar
    num_bytes = size_of(sidecar)
    end = int.from_bytes(read_range(sidecar, max(0, num_bytes - 8), 8), "little")
    if num_bytes % 8 or num_bytes == 0 or not end_of_samples(path, end):
        raise ShardError(
            f"{key}: {sidecar} does not fit {path} ({size_of(path)} bytes; the index ends at "
            f"{end}): if the shard was replaced, run {remake} overwrite=true`; if it was cut off, "
            "copy it again"
        )
    if shard.length not in (None, num_bytes // 8 - 1):
        raise ShardError(
            f"{key}: {path} has {num_bytes // 8 - 1} samples after {sidecar}, but its list says "
            f"{shard.length}; make both again with {remake} overwrite=true`"
        )
    return num_bytes // 8 - 1


def _digests(shards: Sequence[Shard], lengths: list[int], *, create: bool) -> tuple[str, ...]:
    """Of the shards' bytes, after their index. Those of local shards that are younger than their
    `_info.json`, or have another size, are taken anew; if they are as it says, it is marked as
    younger. With `create`, one that does not say what the sidecars do is named."""
    digests = {shard.path: shard.digest for shard in shards}
    folders: dict[str, dict[str, int]] = {}
    for shard, length in zip(shards, lengths, strict=True):
        if not is_remote(shard.path):
            folder, name = os.path.split(shard.path)
            folders.setdefault(folder, {})[name] = length
    for folder, of_shards in folders.items():
        info = os.path.join(folder, "_info.json")
        try:
            known = {shard.path: shard for shard in read_list(info)}
            written = os.stat(info).st_mtime_ns
        except (OSError, ConfigError):
            continue  # one of others, in another form, says nothing
        others = [
            n for n, length in of_shards.items() if n not in known or known[n].length != length
        ]
        if others and create:
            warn(
                f"{info} does not say what the sidecars of {len(others)} shards do, the first is "
                f"{others[0]} with {of_shards[others[0]]} samples; who reads the folder by its "
                f"URL, or with timm, believes it; {REMAKE}"
            )
        digests |= _of_folder(folder, known, written, of_shards, create=create)
    return tuple(digests[shard.path] for shard in shards)


def _of_folder(
    folder: str, known: dict[str, Shard], written: int, wanted: Iterable[str], *, create: bool
) -> dict[str, str]:
    """Digests by path of the shards `wanted` of a folder, whose `_info.json` was written then."""

    def is_stale(name: str) -> bool:
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            return True
        return status.st_mtime_ns > written or status.st_size != known[name].num_bytes

    found = {name: known[name].digest for name in wanted if name in known and known[name].digest}
    if stale := list(filter(is_stale, known)):
        mine, now = [name for name in stale if name in found], time.time_ns()
        taken = dict(zip(mine, digests_of([os.path.join(folder, n) for n in mine]), strict=True))
        if create and stale == [name for name in mine if taken[name] == found[name]]:
            with contextlib.suppress(OSError):
                os.utime(os.path.join(folder, "_info.json"), ns=(now, now))
        found |= taken
    return {os.path.join(folder, name): digest for name, digest in found.items()}
