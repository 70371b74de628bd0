"""The index of a set of shards: how many samples, and where each begins.

In: `data.train` or `data.validation`: a folder, a brace pattern, a URL, or a list of these.
Out: `ShardIndex`. Offset i of a shard is the byte at which sample i begins, the last one is the
byte after its last sample; `sample i = bytes[offset[i]:offset[i + 1]]`.

Two formats that others read too lie beside the shards: `NAME.tar.idx`, the offsets as
little-endian uint64 (Megatron-Energon), and `_info.json` with `shard_lengths` (timm).
`vae_dist.data.indexing` makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
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
)
from vae_dist.data.tar import ShardError, end_of_samples

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

    def offsets(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Byte offsets (int64) of the samples start, ..., stop of a shard: stop - start + 1.

        Raises ShardError when they cannot be read or do not rise.
        """
        stop = int(self.lengths[shard]) if stop is None else stop
        return self.offsets_of([Run(shard, start, stop)])[0]

    def offsets_of(
        self, runs: Sequence[Run], *, retry_s: float = START_RETRY_S
    ) -> list[np.ndarray]:
        """Those of several runs of samples, read together. Raises ShardError."""
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
    if not sidecar or ((is_here or length is None) and not exists(sidecar)):
        remedy = "`" if is_here else " out=FOLDER` and give {path: SHARDS, index: FOLDER}"
        raise ConfigError(f"{key}: {path} has no index; make it with `{command}{remedy}")
    if is_here:
        num_bytes, length, size = size_of(sidecar), size_of(sidecar) // 8 - 1, size_of(path)
        end = int.from_bytes(read_range(sidecar, max(0, num_bytes - 8), 8), "little")
        if num_bytes % 8 or num_bytes == 0 or not end_of_samples(path, end):
            raise ShardError(
                f"{key}: {sidecar} does not fit {path} ({size} bytes; the index ends at {end}); "
                f"if the shard was replaced, run `{command} overwrite=true`, if it was cut off, "
                "copy it again"
            )
    elif length is None:
        length = size_of(sidecar) // 8 - 1
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
