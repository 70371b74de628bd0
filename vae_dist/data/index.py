"""The index of a set of shards: how many samples, and where each begins.

In: `data.train` or `data.validation`: a folder, a brace pattern, a URL, or a list of these.
Out: `ShardIndex`. Offset i of a shard is the byte at which sample i begins, the last one is the
byte after its last sample; `sample i = bytes[offset[i]:offset[i + 1]]`.

Two formats that others read too lie beside the shards: `NAME.tar.idx`, the offsets as
little-endian uint64 (Megatron-Energon), which is what this module reads, and `_info.json` with
`shard_lengths` (timm).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.indexing import NUM_THREADS, Progress, digests_of, write_index
from vae_dist.data.shards import NUM_NAMED, Shard, locate, read_info, shown
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
    sidecars: tuple[str, ...] = ()  # where the offsets are; none: `PATH.idx` for each
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
            digest.update(f"{name_of(path)}\0{length}\0{size}{content}\n".encode())
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
        places = [
            self.sidecars[run.shard] if self.sidecars else self.paths[run.shard] + ".idx"
            for run in runs
        ]
        ranges = [
            Range(place, 8 * run.start, 8 * (run.stop - run.start + 1))
            for place, run in zip(places, runs, strict=True)
        ]
        return [
            data if isinstance(data, ShardError) else _rising(data, piece)
            for data, piece in zip(read_ranges(ranges, retry_s=retry_s), ranges, strict=True)
        ]


def _rising(data: bytes, piece: Range) -> np.ndarray | ShardError:
    offsets = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
    if 8 * len(offsets) != piece.num_bytes or (np.diff(offsets) <= 0).any():
        first, last = piece.start // 8, (piece.start + piece.num_bytes) // 8 - 1
        return ShardError(f"{piece.place}: offsets {first} to {last} are damaged; {_REMAKE}")
    return offsets


_REMAKE = "make it again with `python -m vae_dist.index data=FOLDER overwrite=true`"


def resolve_shards(spec: Any, *, key: str) -> list[str]:
    """The paths of the shards that `spec` names; see `locate`. Raises ConfigError."""
    return [shard.path for shard in locate(spec, key=key)]


def load_index(
    spec: Any, *, key: str, create: bool, progress: Progress | None = None, pipes: bool = True
) -> ShardIndex:
    """The index of the shards that `spec` names; with `create`, missing local sidecars are made.

    Over several ranks only the main process creates. pipes=False: `spec` was read from a run
    folder, where it may name no command. Raises ConfigError for shards or sidecars
    that are missing, ShardError (a ConfigError) for those that do not fit together.
    """
    if is_mixture(spec):
        return _joined(
            [
                load_index(
                    {name: value for name, value in part.items() if name != "weight"},
                    key=key,
                    create=create,
                    progress=progress,
                    pipes=pipes,
                )
                for part in spec
            ],
            [float(part.get("weight", 1)) for part in spec],
        )
    shards = locate(spec, key=key, pipes=pipes)
    if create:
        here = [s.path for s in shards if not is_remote(s.path) and s.sidecar == f"{s.path}.idx"]
        errors = [str(e) for e in write_index(here, progress=progress).values() if e is not None]
        if errors:
            more = len(errors) - NUM_NAMED
            raise ShardError(errors[:NUM_NAMED] + ([f"and {more} more shards"] if more > 0 else []))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        known = list(pool.map(lambda shard: _length_and_bytes(shard, key, spec), shards))
    index = ShardIndex(
        tuple(shard.path for shard in shards),
        np.array([length for length, _ in known], np.int64),
        np.array([num_bytes for _, num_bytes in known], np.int64),
        tuple(shard.sidecar for shard in shards),
        digests=tuple(_digests(shards)),
    )
    if index.num_samples == 0:
        raise ConfigError(f"{key}={shown(spec)}: the shards hold no sample")
    if create:
        for problem in _problems_of_info(index):
            print(f"warning: {problem}", file=sys.stderr)
    return index


def _problems_of_info(index: ShardIndex) -> list[str]:
    """Of folders here whose `_info.json` says otherwise than the sidecars; one of others, in
    another form, says nothing."""
    lengths: dict[str, dict[str, int]] = {}
    for path, length in zip(index.paths, index.lengths.tolist(), strict=True):
        if not is_remote(path):
            lengths.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = length
    problems = []
    for folder, of_shards in lengths.items():
        info = os.path.join(folder, "_info.json")
        try:
            known = read_info(info, key=info)
        except (OSError, ConfigError):
            continue
        others = [name for name, n in of_shards.items() if known.get(name, (None,))[0] != n]
        if others:
            problems.append(
                f"{info} does not say what the sidecars of {len(others)} shards do, the first is "
                f"{others[0]} with {of_shards[others[0]]} samples; who reads the folder by its "
                f"URL, or with timm, believes it; {_REMAKE}"
            )
    return problems


def _digests(shards: Sequence[Shard]) -> list[str]:
    """Of the shards' bytes, after their index. Of a local shard that is younger than `_info.json`,
    or has another size, it is taken anew."""
    digests = {shard.path: shard.digest for shard in shards}
    stale: list[str] = []
    here = [shard.path for shard in shards if not is_remote(shard.path)]
    for folder in {os.path.dirname(path) for path in here}:
        info = os.path.join(folder, "_info.json")
        try:
            known, written = read_info(info, key=info), os.stat(info).st_mtime_ns
        except (OSError, ConfigError):
            continue
        for path in here:
            facts = known.get(os.path.basename(path))
            if os.path.dirname(path) != folder or facts is None or not facts[2]:
                continue
            status, digests[path] = os.stat(path), facts[2]
            if status.st_mtime_ns > written or status.st_size != facts[1]:
                stale.append(path)
    digests |= dict(zip(stale, digests_of(stale), strict=True))
    return [digests[shard.path] for shard in shards]


def is_mixture(spec: Any) -> bool:
    """Whether several data sets are mixed: [{path: SHARDS, weight: NUMBER}, ...]."""
    return isinstance(spec, list | tuple) and any(isinstance(part, Mapping) for part in spec)


def _joined(indexes: Sequence[ShardIndex], weights: Sequence[float]) -> ShardIndex:
    return ShardIndex(
        tuple(path for index in indexes for path in index.paths),
        np.concatenate([index.lengths for index in indexes]),
        np.concatenate([index.bytes for index in indexes]),
        tuple(sidecar for index in indexes for sidecar in index.sidecars),
        tuple((len(i.paths), weight) for i, weight in zip(indexes, weights, strict=True)),
        tuple(digest for index in indexes for digest in index.digests),
    )


def _length_and_bytes(shard: Shard, key: str, spec: Any) -> tuple[int, int]:
    """Samples and bytes of a shard. What lies here is checked; of remote shards what is known is
    believed, and a window that is not there as the index says stops the run."""
    if is_remote(shard.path):
        return _remote_length_and_bytes(shard, key, spec)
    return _checked_length(shard, key, spec), os.path.getsize(shard.path)


def _remote_length_and_bytes(shard: Shard, key: str, spec: Any) -> tuple[int, int]:
    command = f"`python -m vae_dist.index data='{shown(spec)}' out=FOLDER`"
    if not shard.sidecar or (shard.length is None and not exists(shard.sidecar)):
        raise ConfigError(
            f"{key}: {shard.path} has no index; make it with {command} and give "
            "{path: SHARDS, index: FOLDER}"
        )
    length, num_bytes = shard.length, shard.num_bytes
    if length is None:
        length = size_of(shard.sidecar) // 8 - 1
    if num_bytes is None and is_pipe(shard.path):
        num_bytes = int.from_bytes(read_range(shard.sidecar, 8 * length, 8), "little")
    return length, size_of(shard.path) if num_bytes is None else num_bytes


def _checked_length(shard: Shard, key: str, spec: Any) -> int:
    """Samples of a local shard after its sidecar, which must fit the shard's size."""
    path, sidecar = shard.path, shard.sidecar
    command = f"`python -m vae_dist.index data={shown(spec)}"
    if not exists(sidecar):
        raise ConfigError(f"{key}: {path} has no index; make it with {command}`")
    num_bytes = size_of(sidecar)
    end = int.from_bytes(read_range(sidecar, max(0, num_bytes - 8), 8), "little")
    if num_bytes % 8 or num_bytes == 0 or not end_of_samples(path, end):
        raise ShardError(
            f"{key}: {sidecar} does not fit {path} ({os.path.getsize(path)} bytes; the index ends "
            f"at {end}): if the shard was replaced, run {command} overwrite=true`; if it was cut "
            "off, copy it again"
        )
    if shard.length not in (None, num_bytes // 8 - 1):
        raise ShardError(
            f"{key}: {path} has {num_bytes // 8 - 1} samples after {sidecar}, but "
            f"{shown(spec)} says {shard.length}; make both again with {command} overwrite=true`"
        )
    return num_bytes // 8 - 1
