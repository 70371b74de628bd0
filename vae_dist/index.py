"""`python -m vae_dist.index data=FOLDER`: make the index of tar shards that exist already.

In: shards (folder, brace pattern or list). Out: `NAME.tar.idx` beside each, and `_info.json`.
Exit code 0 when every shard has an index, 1 when one is damaged, 2 when the keys are wrong.
"""

from __future__ import annotations

import sys

from vae_dist.command import run_command
from vae_dist.config.schema import IndexCommand
from vae_dist.data.index import load_index, resolve_shards, write_index


def main(argv: list[str] | None = None) -> int:
    damaged: list[str] = []
    code = run_command(
        IndexCommand,
        lambda command: damaged.extend(_index(command)),
        argv,
        usage="python -m vae_dist.index data=FOLDER [overwrite=true]",
        intro="Makes the index of tar shards: where each sample begins, and how many there are.",
    )
    return code or (1 if damaged else 0)


def _index(command: IndexCommand) -> list[str]:
    """Make the index, report on each shard, and return the damaged ones."""
    paths = resolve_shards(command.data, key="data")
    damage = write_index(paths, overwrite=command.overwrite, progress=_show_progress)
    if damage and sys.stderr.isatty():
        print(file=sys.stderr)
    damaged = [path for path, error in damage.items() if error is not None]
    for path in damaged:
        print(damage[path], file=sys.stderr)
    whole = [path for path in paths if damage.get(path) is None]
    lengths = [0]
    if whole:
        index = load_index(whole, key="data", create=False)
        for path, length, size in zip(index.paths, index.lengths, index.bytes, strict=True):
            print(f"{path}: samples={length} bytes={size}")
        lengths = index.lengths.tolist()
    print(
        f"shards={len(paths)} indexed={len(damage) - len(damaged)} damaged={len(damaged)} "
        f"samples={sum(lengths)}"
    )
    return damaged


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rindexed {done} of {total} shards", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
