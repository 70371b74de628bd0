"""What all command lines share: keys, `--help`, errors, exit codes.

In: the dataclass of a command's keys and the function that does the work. Out: an exit code: 0
done, 1 failed on the way, 2 something about the command line, the config or the data is wrong (the
message is on stderr).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.keys import help_text, wants_help
from vae_dist.files import printable, redacted

T = TypeVar("T")


def set_environment() -> None:
    """A RANK without WORLD_SIZE is left over from another launch: this process is the only one.
    What the terminal's encoding lacks is written as an escape."""
    if not os.environ.get("WORLD_SIZE"):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(
    cls: type[T], work: Callable[[T], None], argv: list[str] | None, *, usage: str, intro: str
) -> int:
    """Read the keys of `cls` from `argv` (default: the command line) and do the work."""
    set_environment()
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(cls, usage=usage, intro=intro))
        return 0
    from vae_dist.config.load import load_command  # OmegaConf takes longer than --help

    try:
        work(load_command(cls, argv))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print_error(error)
        return 2
    except CommandFailed as failure:
        print_error(failure)
        return 1
    return 0


def print_error(error: ConfigError | CommandFailed) -> None:
    """Say on stderr what is wrong: a line for each problem, printable and without secrets."""
    lines = error.problems if isinstance(error, ConfigError) else [f"failed: {error}"]
    for line in lines:
        print(printable(redacted(line)), file=sys.stderr)


def check_empty(folder: Path) -> None:
    """Raises ConfigError where the files of an earlier command would stay among those of this."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"out={folder} is not empty: empty it, or choose another folder")


@contextlib.contextmanager
def writing(out: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a ConfigError about the key `out`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from None


def exit_process(code: int) -> NoReturn:
    """End this process; one rank of several skips the interpreter's shutdown.

    A backend's threads may still hold tensors of finished collectives. To drop one they ask for the
    GIL, and Python ends a thread that asks for it during shutdown, which C++ answers with abort():
    exit code -6 after a finished run, at one of 150 ends on a busy machine.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    for thread in threading.enumerate():  # as the interpreter does
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
