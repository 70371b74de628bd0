"""What every command line has in common: help, keys, errors and exit code.

In: the dataclass of the command's keys and the function that does the work. Out: an exit code: 0
done, 2 something about the command line, the config or the data is wrong (said on stderr).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import help_text
from vae_dist.config.load import load_command, wants_help

T = TypeVar("T")


def run_command(
    cls: type[T],
    work: Callable[[T], None],
    argv: list[str] | None,
    *,
    usage: str,
    intro: str,
) -> int:
    """Read the keys of `cls` from `argv` (default: the command line) and do the work."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(cls, usage=usage, intro=intro))
        return 0
    try:
        work(load_command(cls, argv))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    return 0
