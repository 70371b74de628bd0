"""The index of a set of shards: how many samples, and where each begins.

In: `data.train` or `data.validation`: a folder, a brace pattern, or a list of these.
Out: `ShardIndex`. Offset i of a shard is the byte at which sample i begins, the last one is the
byte after its last sample; `sample i = bytes[offset[i]:offset[i + 1]]`.

Two formats that others read too lie beside the shards: `NAME.tar.idx`, the offsets as
little-endian uint64 (Megatron-Energon), which is what this module reads, and `_info.json` with
`shard_lengths` (timm).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls

from vae_dist.config.errors import ConfigError
from vae_dist.data.tar import ShardError, end_of_samples, sample_starts
from vae_dist.files import write_durably

Progress = Callable[[int, int], None]  # shards done, shards in all

NUM_THREADS = 8  # header hops wait for the disk, not for the CPU
NUM_NAMED = 5  # shards that one message names


@dataclass(frozen=True)
class ShardIndex:
    """Shards with their number of samples (int64) and bytes (int64), in a fixed order."""

    paths: tuple[str, ...]
    lengths: np.ndarray
    bytes: np.ndarray

    @property
    def num_samples(self) -> int:
        return int(self.lengths.sum())

    @property
    def mean_sample_bytes(self) -> float:
        """Bytes of the shards over samples: what one undecoded sample takes in memory."""
        return float(self.bytes.sum()) / max(1, self.num_samples)

    @property
    def fingerprint(self) -> str:
        """Names, lengths and sizes in one word: another data set, or another order, differs."""
        digest = hashlib.blake2b(digest_size=16)
        for path, length, size in zip(self.paths, self.lengths, self.bytes, strict=True):
            digest.update(f"{os.path.basename(path)}\0{length}\0{size}\n".encode())
        return digest.hexdigest()

    def offsets(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Byte offsets (int64) of the samples start, ..., stop of a shard: stop - start + 1.

        Raises ShardError when the sidecar does not rise.
        """
        stop = int(self.lengths[shard]) if stop is None else stop
        sidecar = self.paths[shard] + ".idx"
        offsets = np.fromfile(sidecar, "<u8", stop - start + 1, offset=8 * start).astype(np.int64)
        if len(offsets) != stop - start + 1 or (np.diff(offsets) <= 0).any():
            raise ShardError(f"{sidecar}: offsets {start} to {stop} are damaged; {_REMAKE}")
        return offsets


_REMAKE = "make it again with `python -m vae_dist.index data=FOLDER overwrite=true`"


def resolve_shards(spec: Any, *, key: str) -> list[str]:
    """The paths that a folder, a brace pattern or a list of these stands for; all exist.

    `key` is the config key to blame, such as "data.train". Raises ConfigError.
    """
    parts = list(spec) if isinstance(spec, list | tuple) else [spec]
    paths = [path for part in parts for path in _resolve_one(part, key)]
    if not paths:
        raise ConfigError(f"{key}={spec!r} names no shard; give a folder that holds *.tar files")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        names = ", ".join(missing[:NUM_NAMED])
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ConfigError(
            f"{key}={_shown(spec)}: {len(missing)} of {len(paths)} shards are missing: "
            f"{names}{more}; copy them there, or correct the pattern"
        )
    return paths


def _resolve_one(part: Any, key: str) -> list[str]:
    if not isinstance(part, str | os.PathLike):
        raise ConfigError(f"{key}={part!r} is no path; give a folder, a brace pattern or a list")
    text = os.fspath(part)
    if "://" in text or text.startswith("pipe:"):
        raise ConfigError(
            f"{key}={text}: only local files can be read; copy the shards to a folder"
        )
    if os.path.isdir(text):
        shards = sorted(str(path) for path in Path(text).glob("*.tar"))
        if not shards:
            raise ConfigError(
                f"{key}={text}: the folder holds no *.tar file; {_how_to_make_shards(key)}"
            )
        return shards
    if text.endswith(".tar"):
        try:
            return list(expand_urls(text))
        except ValueError as error:
            raise ConfigError(f"{key}={text}: {error}; write it like s-{{00..12}}.tar") from error
    kind = "a file, but no .tar shard" if os.path.exists(text) else "no such folder"
    raise ConfigError(f"{key}={text}: {kind}; {_how_to_make_shards(key)}")


def _how_to_make_shards(key: str) -> str:
    return (
        "put WebDataset shards there (tars of NAME.png or NAME.jpg, with NAME.cls if there are "
        f"labels; vae_dist.data.write_shards makes them), or point {key} at yours"
    )


def index_shard(path: str | Path) -> np.ndarray:
    """Offsets (int64, num_samples + 1) of a plain tar, by hops from header to header.

    Raises ShardError, with the byte position, at a damaged header or a missing end.
    """
    starts, end = sample_starts(str(path))
    return np.array([*starts, end], np.int64)


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
    }
    text = json.dumps({"splits": {split: info}}, indent=1)
    write_durably(Path(paths[0]).parent / "_info.json", text.encode())


def write_index(
    paths: Sequence[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, ShardError | None]:
    """Make the sidecars that are missing (all with `overwrite`), several shards at a time.

    Returns each shard that was read, with its damage or None: a damaged shard gets no sidecar, and
    loses one that it had. `_info.json` is written where there is none (or with `overwrite`) and
    all shards have a sidecar. Raises ConfigError when the folder cannot be written.
    """
    todo = [path for path in paths if overwrite or not os.path.exists(f"{path}.idx")]

    def make(path: str) -> ShardError | None:
        try:
            write_sidecar(path, index_shard(path))
        except ShardError as error:
            Path(f"{path}.idx").unlink(missing_ok=True)
            return error
        return None

    damage: dict[str, ShardError | None] = {}
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for path, error in zip(todo, pool.map(make, todo), strict=True):
                damage[path] = error
                if progress is not None:
                    progress(len(damage), len(todo))
        for folder in sorted({os.path.dirname(path) for path in paths}):
            shards = [path for path in paths if os.path.dirname(path) == folder]
            complete = all(os.path.exists(f"{path}.idx") for path in shards)
            if complete and (overwrite or not os.path.exists(os.path.join(folder, "_info.json"))):
                write_info(shards, split=os.path.basename(os.path.abspath(folder)))
    except OSError as error:
        raise ConfigError(
            f"the index of the shards cannot be written ({error}); run `python -m vae_dist.index "
            "data=FOLDER` as somebody who can write there, or copy the shards"
        ) from error
    return damage


def load_index(
    spec: Any, *, key: str, create: bool, progress: Progress | None = None
) -> ShardIndex:
    """The index of the shards that `spec` names; with `create`, missing sidecars are made.

    Over several ranks only the main process creates. Raises ConfigError for shards or sidecars
    that are missing, ShardError (a ConfigError) for those that do not fit together.
    """
    paths = resolve_shards(spec, key=key)
    if create:
        errors = [str(e) for e in write_index(paths, progress=progress).values() if e is not None]
        if errors:
            more = len(errors) - NUM_NAMED
            raise ShardError(errors[:NUM_NAMED] + ([f"and {more} more shards"] if more > 0 else []))
    lengths = np.array([_checked_length(path, key, spec) for path in paths], np.int64)
    sizes = np.array([os.path.getsize(path) for path in paths], np.int64)
    index = ShardIndex(tuple(paths), lengths, sizes)
    if index.num_samples == 0:
        raise ConfigError(f"{key}={_shown(spec)}: the shards hold no sample")
    return index


def _checked_length(path: str, key: str, spec: Any) -> int:
    """Samples of a shard after its sidecar, which must fit the shard's size."""
    command = f"`python -m vae_dist.index data={_shown(spec)}"
    sidecar = f"{path}.idx"
    if not os.path.exists(sidecar):
        raise ConfigError(f"{key}: {path} has no index; make it with {command}`")
    num_bytes = os.path.getsize(sidecar)
    with open(sidecar, "rb") as file:
        file.seek(max(0, num_bytes - 8))
        end = int.from_bytes(file.read(8), "little")
    if num_bytes % 8 or num_bytes == 0 or not end_of_samples(path, end):
        raise ShardError(
            f"{key}: {sidecar} does not fit {path} ({os.path.getsize(path)} bytes; the index ends "
            f"at {end}): if the shard was replaced, run {command} overwrite=true`; if it was cut "
            "off, copy it again"
        )
    return num_bytes // 8 - 1


def _shown(spec: Any) -> str:
    return f"[{','.join(map(str, spec))}]" if isinstance(spec, list | tuple) else str(spec)
