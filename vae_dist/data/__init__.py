"""Tar shards in, batches of images out; `write_shards` makes shards."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "write_shards":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vae_dist.data.writer import write_shards  # webdataset, which an index does without

    return write_shards
