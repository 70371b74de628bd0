"""`python -m vae_dist.index data=SHARDS`: make the index of tar shards that exist already.

In: shards (folder, brace pattern, URLs, pipes or a list). Out: `NAME.tar.idx` beside each, and
`_info.json`; for shards that lie elsewhere, sidecars and `shards.json` in the folder `out=`.
With verify=true every sample is decoded, and damage, double keys and image sizes are reported.
Exit code 0 when all is well, 1 when a shard is damaged, 2 when the keys are wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.cli import run_command
from vae_dist.config.commands import IndexCommand
from vae_dist.config.errors import ConfigError
from vae_dist.files import printable, progress_bar, redacted

if TYPE_CHECKING:
    from vae_dist.data.index import ShardIndex

NUM_NAMED = 20  # damaged samples of a shard that are named
NUM_SIZES = 10  # most common image sizes that are shown


def main(argv: list[str] | None = None) -> int:
    damaged: list[str] = []
    code = run_command(
        IndexCommand,
        lambda command: damaged.extend(_index(command)),
        argv,
        usage="python -m vae_dist.index data=SHARDS [out=FOLDER] [verify=true] [overwrite=true]",
        intro="Makes the index of tar shards: where each sample begins, and how many there are.",
    )
    return code or (1 if damaged else 0)


def _index(command: IndexCommand) -> set[str]:
    """Make the index, report on each shard, and return the damaged ones."""
    from vae_dist.data.index import load_index, write_index, write_index_of_remote
    from vae_dist.data.shards import locate
    from vae_dist.data.sources import is_remote

    paths = [shard.path for shard in locate(command.data, key="data")]
    if any(map(is_remote, paths)) and not command.out:
        raise ConfigError(
            f"data={command.data}: the shards lie elsewhere; name a folder for their index, "
            "for example out=index, and then give data.train={path: SHARDS, index: index}"
        )
    write = partial(write_index_of_remote, folder=Path(command.out)) if command.out else write_index
    with progress_bar("indexed", len(paths), unit="shards") as progress:
        damage = write(paths, overwrite=command.overwrite, progress=progress)
    damaged = {path for path, error in damage.items() if error is not None}
    for path in damage:
        if path in damaged:
            _print(damage[path], file=sys.stderr)
    num_samples, whole = 0, [path for path in paths if path not in damaged]
    if whole and not (damaged and command.out):
        spec = {"path": whole, "index": command.out} if command.out else whole
        index = load_index(spec, key="data", create=False)
        num_samples = index.num_samples
        for path, length, size in zip(index.paths, index.lengths, index.bytes, strict=True):
            _print(f"{path}: samples={length} bytes={size}")
        if command.verify:
            damaged |= _verify(index, command)
    print(
        f"shards={len(paths)} indexed_now={sum(error is None for error in damage.values())} "
        f"indexed_before={len(paths) - len(damage)} damaged={len(damaged)} samples={num_samples}"
    )
    return damaged


def _verify(index: ShardIndex, command: IndexCommand) -> set[str]:
    """Decode everything; print what is wrong and what sizes there are. Returns the damaged
    shards."""
    from vae_dist.data.settings import Findings, verify
    from vae_dist.data.transforms import ImageSettings

    settings = ImageSettings(3, (1, 1), True, command.max_pixels, image_key=command.image_key)
    with progress_bar("verified", len(index.paths), unit="shards") as progress:
        shards: list[Findings] = []
        for found in verify(index, settings):
            shards.append(found)
            progress(len(shards))
    of_paths = list(zip(index.paths, shards, strict=True))
    for path, found in of_paths:
        for problem in found.problems[:NUM_NAMED]:
            _print(problem, file=sys.stderr)
        if (more := len(found.problems) - NUM_NAMED) > 0:
            _print(f"{path}: {more} more samples are damaged", file=sys.stderr)
    if double := [f"{path} {key}" for path, found in of_paths for key in found.double]:
        _print(f"double keys: {len(double)}, the first is {double[0]}; the trainer reads them all")
    sizes = sum((found.sizes for found in shards), Counter[tuple[int, int]]())
    channels = sum((found.channels for found in shards), Counter[int]())
    common = ", ".join(f"{h}x{w} ({count})" for (h, w), count in sizes.most_common(NUM_SIZES))
    print(f"sizes HxW: {common or 'none'}; {len(sizes)} different")
    print(f"channels: {', '.join(f'{c} ({count})' for c, count in sorted(channels.items()))}")
    for mask, count in sorted(sum((found.masks for found in shards), Counter[str]()).items()):
        print(f"incomplete: {count} samples, which data.mask={mask} reads")
    return {path for path, found in of_paths if found.problems}


def _print(text: object, **options: Any) -> None:
    print(printable(redacted(str(text))), **options)


if __name__ == "__main__":
    sys.exit(main())
