"""`python -m vae_dist.pack source=PICTURES out=FOLDER`: shards of pictures, with their index.

In: folders of pictures, archives, known data sets, parquet files, `hf://datasets/OWNER/NAME`.
Out: `FOLDER/train`, `FOLDER/validation`, `FOLDER/test` (those that there are) with tars and their
index, `FOLDER/names.txt` (which sample was which picture), and last `FOLDER/pack.json`.
A killed command goes on when it is run again. Exit code 0, or 2 when something is wrong with keys
or source.
"""

from __future__ import annotations

import sys

from vae_dist.cli import run_command
from vae_dist.config.commands import PackCommand

USAGE = "python -m vae_dist.pack source=PICTURES out=FOLDER [key=value ...]"
INTRO = (
    "Writes pictures as WebDataset shards: shuffled, checked, with index. Killed, it goes on when "
    "it is run again."
)
INTERRUPTED = 130  # exit code after Ctrl-C


def _pack(command: PackCommand) -> None:
    from vae_dist.packing.pack import pack  # torch, once the keys are right

    pack(command)


def main(argv: list[str] | None = None) -> int:
    try:
        return run_command(PackCommand, _pack, argv, usage=USAGE, intro=INTRO)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the finished shards", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
