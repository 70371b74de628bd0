"""Reads pieces of files: local ones, what fsspec opens (http, s3, gs, hf), and pipes.

In: places, first byte, number of bytes. Out: these bytes; fewer only where the file ends. Local
files are read by `os.pread`. Of a file system of fsspec many pieces are read at once, so that
reading many sequences waits for one round trip. A pipe, such as `pipe:ssh host cat x.tar`, has no
positions: it is read front to back.

A read that fails for a passing reason is tried again with growing pauses, for `retry_s` seconds.
Errors of all libraries become one: UnreadableError, a ShardError.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

from vae_dist.data.tar import ShardError

START_RETRY_S = 20.0  # before training, when a wrong address is likelier than an outage
FIRST_PAUSE_S, LONGEST_PAUSE_S, QUIET_S = 0.2, 30.0, 5.0
TIMEOUT_S = 60.0  # without a byte
NUM_TOGETHER = 16  # reads of a file system that reads one piece at a time
MAX_PIPES = 64  # that one process keeps open
CHUNK = 1 << 20
HTTP = ("http://", "https://")
FORBIDDEN, NOT_FOUND = 403, 404
LASTING = (400, 401, 403, 404, 405, 410, 416, 451)  # statuses that another attempt does not change
LASTING_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)

sleep, clock = time.sleep, time.monotonic


class Range(NamedTuple):
    """Bytes start, ..., start + num_bytes - 1 of a file."""

    place: str
    start: int
    num_bytes: int


class UnreadableError(ShardError):
    """A place cannot be read. is_missing: nothing is there; stores that hide what they hold say
    so too, by forbidding it."""

    def __init__(self, problem: str, *, is_missing: bool = False) -> None:
        super().__init__(problem)
        self.is_missing = is_missing

    def __reduce__(self) -> tuple[Any, ...]:
        return _unreadable, (str(self), self.is_missing)


def _unreadable(problem: str, is_missing: bool) -> UnreadableError:
    return UnreadableError(problem, is_missing=is_missing)


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


def read_range(place: str, start: int, count: int, *, retry_s: float = START_RETRY_S) -> bytes:
    """`count` bytes from byte `start` on. Raises UnreadableError."""
    (found,) = read_ranges([Range(place, start, count)], retry_s=retry_s)
    if isinstance(found, UnreadableError):
        raise found
    return found


def read_ranges(
    ranges: Sequence[Range], *, retry_s: float = START_RETRY_S
) -> list[bytes | UnreadableError]:
    """Several pieces, those of one remote file system at once; the error of each that failed."""
    found: list[bytes | UnreadableError] = [b""] * len(ranges)
    remote: dict[str, list[int]] = {}
    for number, piece in enumerate(ranges):
        if piece.num_bytes <= 0:
            continue
        if is_remote(piece.place) and not is_pipe(piece.place):
            remote.setdefault(piece.place.partition("://")[0], []).append(number)
            continue
        try:
            found[number] = _read_pipe(piece, retry_s) if is_pipe(piece.place) else _read(piece)
        except UnreadableError as error:
            found[number] = error
    for numbers in remote.values():
        pieces = [ranges[number] for number in numbers]
        for number, data in zip(numbers, _read_remote(pieces, retry_s), strict=True):
            found[number] = data
    return found


def read_all(place: str) -> bytes:
    """A whole small file, such as an index. Raises UnreadableError."""
    if not is_remote(place):
        return read_range(place, 0, size_of(place))
    data: bytes = _with_retries(place, lambda: _ask(place, "cat_file"))
    return data


def size_of(place: str) -> int:
    """Bytes of a file; a pipe has no size that could be asked. Raises UnreadableError."""
    assert not is_pipe(place), place
    if not is_remote(place):
        try:
            return os.path.getsize(place)
        except OSError as error:
            raise _of_local(place, error) from None
    facts: dict[str, Any] = _with_retries(place, lambda: _ask(place, "info"))
    if facts["size"] is None:
        raise UnreadableError(f"{place}: the server does not say how long the file is")
    return int(facts["size"])


def exists(place: str) -> bool:
    """Whether a file is there; an unreachable server is no answer, but an UnreadableError."""
    try:
        size_of(place)
    except UnreadableError as error:
        if error.is_missing:
            return False
        raise
    return True


# local files


def _read(piece: Range) -> bytes:
    try:
        descriptor = os.open(piece.place, os.O_RDONLY)
        try:
            data = os.pread(descriptor, piece.num_bytes, piece.start)
            while len(data) < piece.num_bytes:
                more = os.pread(descriptor, piece.num_bytes - len(data), piece.start + len(data))
                if not more:
                    break
                data += more
            return data
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _of_local(piece.place, error) from None


def _of_local(path: str, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"{path}: cannot be read ({error.strerror}); put it back or repair it, then run the same "
        "command again",
        is_missing=isinstance(error, FileNotFoundError),
    )


# file systems of fsspec


def _read_remote(pieces: list[Range], retry_s: float) -> list[bytes | UnreadableError]:
    """Pieces of one kind of file system: those that failed are tried again, together."""
    found: list[bytes | UnreadableError] = [b""] * len(pieces)
    left = list(range(len(pieces)))
    retries = _Retries(retry_s)
    while left:
        failed: list[tuple[int, Exception]] = []
        for number, data in zip(left, _cat_ranges([pieces[n] for n in left]), strict=True):
            if isinstance(data, bytes):
                found[number] = data
            elif _is_lasting(data) or retries.are_over():
                found[number] = _of_remote(pieces[number].place, data, retries)
            else:
                failed.append((number, data))
        left = [number for number, _ in failed]
        if failed:
            retries.wait(pieces[failed[0][0]].place, failed[0][1])
    return found


def _cat_ranges(pieces: list[Range]) -> list[bytes | Exception]:
    try:
        systems = [_file_system(piece.place) for piece in pieces]
        system = systems[0][0]
        paths = [path for _, path in systems]
        starts = [piece.start for piece in pieces]
        stops = [piece.start + piece.num_bytes for piece in pieces]
        if system.async_impl:
            found = system.cat_ranges(paths, starts, stops, on_error="return")
        else:

            def read(path: str, start: int, stop: int) -> bytes | Exception:
                try:  # "none": else some read whole blocks, more than was asked for
                    return bytes(system.cat_file(path, start=start, end=stop, cache_type="none"))
                except Exception as error:
                    return error

            with ThreadPoolExecutor(min(NUM_TOGETHER, len(pieces))) as pool:
                found = list(pool.map(read, paths, starts, stops))
    except Exception as error:
        return [error] * len(pieces)
    return [_checked(data, piece) for data, piece in zip(found, pieces, strict=True)]


def _checked(data: bytes | Exception, piece: Range) -> bytes | Exception:
    if isinstance(data, Exception) or len(data) <= piece.num_bytes:
        return data
    if piece.start == 0:
        return data[: piece.num_bytes]
    return ValueError(
        "the server answers with the whole file to a request for a piece: serve the shards by one "
        f"that knows Range requests, copy them, or read them as 'pipe:curl -sf {piece.place}'"
    )


def _ask(place: str, method: str) -> Any:
    system, path = _file_system(place)
    return getattr(system, method)(path)


def _with_retries(place: str, attempt: Callable[[], Any], retry_s: float = START_RETRY_S) -> Any:
    retries = _Retries(retry_s)
    while True:
        try:
            return attempt()
        except Exception as error:
            if _is_lasting(error) or retries.are_over():
                raise _of_remote(place, error, retries) from None
            retries.wait(place, error)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(HTTP):
        timeout = _http_client(url).ClientTimeout(
            total=None, connect=TIMEOUT_S, sock_read=TIMEOUT_S
        )
        # pieces of a compressed answer are no pieces of the file
        options = {
            "headers": {"Accept-Encoding": "identity"},
            "client_kwargs": {"timeout": timeout},
        }
    system, path = fsspec.core.url_to_fs(url, **options)
    return system, path


def _http_client(url: str) -> Any:
    try:
        return import_module("aiohttp")
    except ImportError:
        raise ImportError(f"{url} needs aiohttp: pip install 'vae_dist[remote]'") from None


class _Retries:
    """How long, and with which pauses, a failing read is tried again."""

    def __init__(self, retry_s: float) -> None:
        self.retry_s, self._begun, self.pause, self.count = retry_s, clock(), FIRST_PAUSE_S, 0

    def are_over(self) -> bool:
        return clock() - self._begun + self.pause > self.retry_s

    def wait(self, place: str, error: Exception) -> None:
        before = clock() - self._begun
        sleep(self.pause)
        self.pause, self.count = min(2 * self.pause, LONGEST_PAUSE_S), self.count + 1
        if before < QUIET_S <= clock() - self._begun:
            print(
                f"warning: {place}: cannot be read now ({_reason(error)}); it is tried again for "
                f"{self.retry_s:g} s",
                file=sys.stderr,
            )


def _status(error: BaseException) -> int:
    """The HTTP status of an error of any client; 0 where it has none."""
    for found in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(found, name, None), int):
                return status
    return 0


def _cause(error: Exception) -> BaseException:
    """fsspec calls a file missing whose size it could not get, for any reason."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return error if cause is None or isinstance(cause, LookupError) else cause


def _is_lasting(error: Exception) -> bool:
    cause = _cause(error)
    if status := _status(cause):
        return status in LASTING
    return isinstance(cause, LASTING_ERRORS) or "Credential" in type(cause).__name__


def _reason(error: Exception) -> str:
    cause = _cause(error)
    status, text = _status(cause), " ".join(str(cause).split())[:200]
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    return f"HTTP {status}" if status else f"{type(cause).__name__}: {text}".rstrip(": ")


def _of_remote(place: str, error: Exception, retries: _Retries) -> UnreadableError:
    cause, reason = _cause(error), _reason(error)
    is_missing = isinstance(cause, FileNotFoundError | PermissionError) or _status(cause) in (
        FORBIDDEN,
        NOT_FOUND,
    )
    if _is_lasting(error):
        return UnreadableError(
            f"{place}: cannot be read ({reason}); check the address", is_missing=is_missing
        )
    return UnreadableError(
        f"{place}: cannot be read after {retries.count + 1} attempts in {retries.retry_s:g} s "
        f"({reason}); when the server answers again, run the same command"
    )


# pipes


_pipes: dict[tuple[int, str, int], Any] = {}  # webdataset's, by process, place and position
_pipes_lock = threading.Lock()


def _read_pipe(piece: Range, retry_s: float) -> bytes:
    with _pipes_lock:
        data: bytes = _with_retries(piece.place, lambda: _read_on(piece), retry_s)
    return data


def _read_on(piece: Range) -> bytes:
    """Goes on with the command that stands nearest before the piece, or starts it again."""
    from webdataset.gopen import gopen

    mine = (os.getpid(), piece.place)
    before = [key for key in _pipes if key[:2] == mine and key[2] <= piece.start]
    nearest = max(before, default=(*mine, 0))
    pipe = _pipes.pop(nearest) if before else gopen(piece.place, "rb", bufsize=CHUNK)
    position = nearest[2]
    while position < piece.start and (
        skipped := pipe.stream.read(min(CHUNK, piece.start - position))
    ):
        position += len(skipped)
    data: bytes = pipe.stream.read(piece.num_bytes)
    if len(data) < piece.num_bytes and (code := pipe.proc.wait()):
        raise OSError(f"the command ended with exit code {code}; run it by hand to see why")
    if len(data) == piece.num_bytes:
        while len(_pipes) >= MAX_PIPES:
            _pipes.pop(next(iter(_pipes))).proc.kill()
        _pipes[*mine, position + len(data)] = pipe
    return data
