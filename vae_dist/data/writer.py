"""Writes samples as plain WebDataset shards with their index, all or nothing.

In: samples `{"__key__": "000123", "png": bytes, "cls": b"7"}`.
Out: a folder with `NAME-000000.tar`, ..., a sidecar `NAME-000000.tar.idx` for each, `_info.json`.
The same samples give the same bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import webdataset as wds

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import index_shard, write_info, write_sidecar
from vae_dist.files import sync_folder


def write_shards(
    samples: Iterable[Mapping[str, str | bytes]],
    folder: str | Path,
    *,
    num_shards: int | None = None,
    shard_bytes: int | None = None,
    name: str = "shard",
) -> list[Path]:
    """Write the samples and return the paths of the shards.

    num_shards: sample i goes to shard i mod num_shards. shard_bytes: consecutive samples share a
    shard until it holds that many bytes. Exactly one of the two is given.
    `folder` must not exist or be empty. It appears by one rename after everything is on disk.
    Raises ConfigError when the folder is in use or a key would break the grouping into samples.
    """
    assert (num_shards is None) != (shard_bytes is None), "give num_shards or shard_bytes"
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already: remove it, or write the shards elsewhere")
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir(parents=True)

    def opened(number: int) -> ShardWriter:
        return ShardWriter(partial / f"{name}-{number:06d}.tar")

    try:
        writers = [opened(number) for number in range(num_shards or 0)]
        for number, sample in enumerate(samples):
            if shard_bytes is not None and (not writers or writers[-1].num_bytes >= shard_bytes):
                if writers:
                    writers[-1].close()
                writers.append(opened(len(writers)))
            writers[number % num_shards if num_shards else -1].write(sample)
        if not writers:
            raise ConfigError(f"there are no samples to write; nothing was written to {folder}")
        for writer in writers:
            writer.close()
            write_sidecar(writer.path, index_shard(writer.path))
        write_info([writer.path for writer in writers], split=name)
        os.rename(partial, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / writer.path.name for writer in writers]


class ShardWriter:
    """One tar: USTAR headers with mtime 0, so no extended header of 1 KiB per member."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._tar = wds.TarWriter(self._file, encoder=False, mtime=0, user="", group="")
        self._tar.tarstream.format = tarfile.USTAR_FORMAT
        self._last_key: str | None = None

    @property
    def num_bytes(self) -> int:
        return self._tar.tarstream.offset

    def write(self, sample: Mapping[str, str | bytes]) -> None:
        """Add a sample. Raises ConfigError where its key would merge it with its neighbours, leave
        the folder that the shard is unpacked to, or is too long for a tar."""
        key = sample["__key__"]
        assert isinstance(key, str)
        if "." in key.rpartition("/")[2] or key == self._last_key:
            raise ConfigError(
                f"the key {key!r} of a sample holds a dot or follows its equal: WebDataset would "
                "merge it with its neighbours; choose unique keys without dots"
            )
        if key.startswith("/") or ".." in key.replace("\\", "/").split("/"):
            raise ConfigError(f"the key {key!r} of a sample is no relative path without ..")
        self._last_key = key
        try:
            self._tar.write(dict(sample))
        except ValueError as error:  # as tarfile refuses a long name
            raise ConfigError(
                f"sample {key!r} cannot be written ({error}); give it a shorter key"
            ) from None

    def close(self) -> None:
        """Bring the shard to the disk; a second call does nothing."""
        if not self._file.closed:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
