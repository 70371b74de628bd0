"""Files and texts at the border of this process.

Written so that a kill cannot tear them (temporary name, fsync, rename), read with a bound where
others may have written them; texts that are safe to print and to keep; how far a command is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal

_USER = re.compile(r"""://[^/\s'"]{0,999}@""")
_QUERY = re.compile(r"""([?#])([^\s'"]+)""")
_SIGNATURE = re.compile("sig|token|secret|passw|cred|key|auth|jwt|session|policy", re.I)
_SETTING = re.compile(r"""((?:api_?key|token|password|secret)[\w.-]{0,60}=)[^\s'"&]+""", re.I)
# but for the command that an error of data.sources recommends
_COMMAND = re.compile(
    r"""(?<!\w)(['"])?pipe:(?!\.\.\.|\s|curl -sf [^\s'"]*')(?(1)(?:(?!\1).)*|.*)"""
)


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes.

    Raises OSError where it cannot be opened, and ValueError, which names it, where it is larger or
    no plain file: a FIFO or a device is not waited for.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{printable(path)}: no plain file")
        if status.st_size > limit:
            raise ValueError(f"{printable(path)}: larger than the {limit} bytes that it may have")
        return file.read(status.st_size)


def read_json(
    source: str | os.PathLike[str] | bytes, limit: int, *, name: str = ""
) -> dict[str, Any]:
    """The object that a small JSON file, or its bytes, called `name` in messages, hold.

    Raises OSError where the file cannot be opened, and ValueError, which names it, for all else.
    """
    where = printable(name or ("JSON" if isinstance(source, bytes) else source))
    data = source if isinstance(source, bytes) else read_bounded(source, limit)
    if len(data) > limit:
        raise ValueError(f"{where}: larger than the {limit} bytes that it may have")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({printable(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, not a dict")
    return value


def printable(text: object) -> str:
    """One line for a terminal or a file: what does not show is escaped.

    Control characters, line ends, escape sequences, marks of direction, and the surrogates that
    stand for the bytes of a name that is not UTF-8.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text)
    )


def redacted(value: Any) -> Any:
    """A text, or a list or dict of texts, without the secrets of the addresses in it.

    `...` stands for user and password, for a query that is signed or carries a token, for the
    command after `pipe:` (to the quote or the line end), and for the value of `token=` and such.
    """
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _COMMAND.sub(r"\1pipe:...", value)
    text = _USER.sub("://...@", text)
    text = _QUERY.sub(lambda found: found[1] + ("..." if _is_signed(found[2]) else found[2]), text)
    return _SETTING.sub(r"\1...", text)


def _is_signed(query: str) -> bool:
    settings = [part.partition("=") for part in re.split("[&;?#]", query)]
    return any(text and (_SIGNATURE.search(name) or len(text) > 23) for name, _, text in settings)


def write_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, whole or in pieces, under a temporary name, sync it, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def progress_bar(verb: str, total: int, *, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, else a line now and then, on stderr. What it yields is called with the
    number done, and with the total where it was not known before."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (verb, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, total=total: bar.update(task, completed=done, total=total)
        return
    said = time.monotonic()

    def progress(done: int, total: int = total) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{verb} {done} of {total} {unit}", file=sys.stderr, flush=True)

    yield progress
