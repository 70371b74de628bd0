"""Reads pieces of files by path or URL: local, http(s), what fsspec opens (s3, gs, hf), and pipes.

In: a place, first byte, number of bytes. Out: these bytes; fewer only where the file ends.

Remote reads are tried again with growing pauses. A read that breaks off goes on at the byte where
it broke, and each byte that arrives starts the count of attempts anew. A pipe, such as
`pipe:ssh host cat x.tar`, has no positions: it is read front to back, and kept open for the next
piece; a piece that lies before it starts the command again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vae_dist.data.tar import ShardError

ATTEMPTS = 8  # in a row without a byte
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
TIMEOUT_S = 60  # without a byte
CHUNK = 1 << 18
MAX_PIPES = 256  # that one process keeps open
LASTING = (400, 401, 403, 404, 405, 410, 416, 451)  # answers that another attempt does not change
FORBIDDEN, NOT_FOUND, NO_SUCH_PIECE = 403, 404, 416
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
HTTP = ("http://", "https://")

sleep = time.sleep


class UnreadableError(ShardError):
    """A place elsewhere cannot be read; status: the answer of HTTP, or 0."""

    def __init__(self, problem: str, status: int = 0) -> None:
        super().__init__(problem)
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.status)

    @property
    def is_missing(self) -> bool:
        """Nothing is there. Stores that hide what they hold say so too: forbidden."""
        return self.status in (FORBIDDEN, NOT_FOUND)


class _LastingError(Exception):
    """Another attempt will not help."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class _Piece(NamedTuple):
    """What an answer holds: bytes start, ..., stop - 1 of a file of `total`; None: unknown."""

    start: int
    stop: int
    total: int | None


def is_remote(place: str) -> bool:
    return "://" in place or is_pipe(place)


def is_pipe(place: str) -> bool:
    return place.startswith("pipe:")


def without_query(place: str) -> tuple[str, str]:
    """An address and its query, such as the signature in `https://HOST/x.tar?sig=...`."""
    if not place.startswith(HTTP):
        return place, ""  # elsewhere a name may hold a question mark
    path, mark, query = place.partition("?")
    return path, mark + query


def name_of(place: str) -> str:
    """The name of the file at a place."""
    return os.path.basename(without_query(place)[0])


def read_range(place: str, start: int, count: int) -> bytes:
    """`count` bytes from byte `start` on. Raises OSError (local) or UnreadableError (remote)."""
    if count <= 0:
        return b""
    if not is_remote(place):
        return _read_local(place, start, count)
    if is_pipe(place):
        return _read_pipe(place, start, count)
    fetch = _fetch_http if place.startswith(HTTP) else _fetch_by_fsspec
    data = bytearray()
    _with_retries(place, data, lambda: fetch(place, start, count, data))
    return bytes(data)


def read_all(place: str) -> bytes:
    """A whole small file, such as an index. Raises OSError or UnreadableError."""
    if not is_remote(place):
        with open(place, "rb") as file:
            return file.read()
    return read_range(place, 0, size_of(place))


def size_of(place: str) -> int:
    """Bytes of a file; a pipe has no size that could be asked. Raises as read_range."""
    if not is_remote(place):
        return os.path.getsize(place)
    assert not is_pipe(place), place
    sizes: list[int] = []

    def ask() -> None:
        if place.startswith(HTTP):
            sizes.append(_size_by_http(place))
        else:
            system, path = _file_system(place)
            with _named_by_fsspec():
                sizes.append(int(system.size(path)))

    _with_retries(place, bytearray(), ask)
    return sizes[0]


def exists(place: str) -> bool:
    """Whether a file is there; an unreachable server is no answer, but an UnreadableError."""
    if not is_remote(place):
        return os.path.exists(place)
    try:
        size_of(place)
    except UnreadableError as error:
        if error.is_missing:
            return False
        raise
    return True


def _with_retries(place: str, data: bytearray, attempt: Callable[[], None]) -> None:
    failures, pause = 0, FIRST_PAUSE_S
    while True:
        before = len(data)
        try:
            attempt()
            return
        except _LastingError as error:
            raise UnreadableError(
                f"{place}: cannot be read ({error}); check the address", error.status
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
        if len(data) > before:
            failures, pause = 0, FIRST_PAUSE_S
        failures += 1
        if failures == ATTEMPTS:
            raise UnreadableError(
                f"{place}: cannot be read after {ATTEMPTS} attempts, the last one broke off after "
                f"{len(data)} bytes ({reason}); when the server answers again, run the same command"
            )
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


@contextlib.contextmanager
def _opened(url: str, start: int = 0, count: int | None = None) -> Iterator[tuple[Any, _Piece]]:
    """The answer to a request for a piece, or the whole file, and what it holds, which begins at
    `start`. Raises _LastingError where it is no use to ask again."""
    pieces = {} if count is None else {"Range": f"bytes={start}-{start + count - 1}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=pieces), timeout=TIMEOUT_S
        ) as answer:
            piece = _piece(answer)
            if piece.start != start:
                raise _LastingError(
                    f"the server answers {answer.status} from byte {piece.start} on to a request "
                    f"for those from {start} on: it cannot send pieces; read it as "
                    f"'pipe:curl -sf {url}'"
                )
            yield answer, piece
    except urllib.error.HTTPError as error:
        if error.code in LASTING:
            raise _LastingError(f"HTTP {error.code} {error.reason}", error.code) from None
        raise


def _piece(answer: Any) -> _Piece:
    if answer.status == 206:
        found = CONTENT_RANGE.fullmatch(str(answer.headers.get("Content-Range", "")).strip())
        if found is None:
            raise _LastingError("the server does not say which piece of the file it sends")
        first, last, total = found.groups()
        return _Piece(int(first), int(last) + 1, None if total == "*" else int(total))
    length = str(answer.headers.get("Content-Length", ""))
    if not length.isdigit():
        raise _LastingError("the server does not say how long the file is")
    return _Piece(0, int(length), int(length))


def _size_by_http(url: str) -> int:
    # A GET of one byte: unlike HEAD it is allowed by signed URLs.
    with _opened(url, 0, 1) as (_, piece):
        total = piece.total
    if total is None:
        with _opened(url) as (_, piece):
            total = piece.stop
    return total


def _fetch_http(url: str, start: int, count: int, data: bytearray) -> None:
    """Append what is missing of the piece to `data`."""
    end = start + count
    total: int | None = 0
    while start + len(data) < end:
        try:
            with _opened(url, start + len(data), end - start - len(data)) as (answer, piece):
                _read_to(min(end, piece.stop) - start, answer, data)
        except _LastingError as error:
            if error.status == NO_SUCH_PIECE and total is None:
                return  # the file ends where the answer before did
            raise
        total = piece.total
        if total is not None:
            end = min(end, total)


def _read_to(length: int, answer: Any, data: bytearray) -> None:
    """Append to `data` until it has that many bytes."""
    while len(data) < length:
        chunk = answer.read1(min(CHUNK, length - len(data)))  # what came before a break
        if not chunk:
            raise ConnectionError("the connection ended too early")
        data += chunk


def _fetch_by_fsspec(url: str, start: int, count: int, data: bytearray) -> None:
    system, path = _file_system(url)
    with _named_by_fsspec():
        data += system.cat_file(path, start=start + len(data), end=start + count)


@contextlib.contextmanager
def _named_by_fsspec() -> Iterator[None]:
    """Raises _LastingError for what another attempt does not change."""
    try:
        yield
    except FileNotFoundError:
        raise _LastingError("no such file", NOT_FOUND) from None
    except PermissionError as error:
        raise _LastingError(f"no permission: {error}", FORBIDDEN) from None


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise _LastingError(f"{error}; install what opens this kind of address") from None


def _read_local(path: str, start: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, count, start)
        while len(data) < count:
            more = os.pread(descriptor, count - len(data), start + len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(descriptor)


class _Pipe:
    """A running command and how much of its output has been read."""

    def __init__(self, command: str) -> None:
        self.position, self.owner = 0, os.getpid()
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)

    def read(self, start: int, count: int) -> bytes:
        assert self.process.stdout is not None
        while self.position < start:
            skipped = self.process.stdout.read(min(CHUNK, start - self.position))
            if not skipped:
                return b""
            self.position += len(skipped)
        data = self.process.stdout.read(count)
        self.position += len(data)
        return data

    def close(self) -> int:
        """End the command; its exit code, or 0 if it was still running."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        code = self.process.poll()
        if code is None:
            self.process.kill()
            self.process.wait()
        return code or 0


_pipes: dict[tuple[str, int], _Pipe] = {}  # by command and position
_pipes_lock = threading.Lock()


def _read_pipe(place: str, start: int, count: int) -> bytes:
    failures, pause = 0, FIRST_PAUSE_S
    while True:
        pipe = _pipe_before(place, start)
        data = pipe.read(start, count)
        if len(data) == count:
            with _pipes_lock:
                _pipes[place, pipe.position] = pipe
            return data
        pipe.process.wait()
        code = pipe.close()
        if code == 0:
            return data  # the file ends here
        failures += 1
        if failures == ATTEMPTS:
            raise UnreadableError(
                f"{place}: the command failed {ATTEMPTS} times, the last time with exit code "
                f"{code} after {pipe.position} bytes; run it by hand to see why"
            )
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _pipe_before(place: str, start: int) -> _Pipe:
    """The open pipe that comes nearest before `start`, or another one; it is taken out."""
    with _pipes_lock:
        for key, pipe in list(_pipes.items()):
            if pipe.owner != os.getpid():
                del _pipes[key]  # of the process that this one was forked from
        fitting = [at for name, at in _pipes if name == place and at <= start]
        if fitting:
            return _pipes.pop((place, max(fitting)))
        while len(_pipes) >= MAX_PIPES:
            _pipes.pop(next(iter(_pipes))).close()
    return _Pipe(place.removeprefix("pipe:"))
