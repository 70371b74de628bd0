"""Reads pieces of files: local ones, what fsspec opens (http, s3, gs, hf), and pipes.

In: places, first byte, number of bytes. Out: these bytes; fewer only where the file ends. Local
files are read by `os.pread`. Of a file system of fsspec many pieces are read at once, so that
reading many sequences waits for one round trip. A pipe, such as `pipe:ssh host cat x.tar`, has no
positions: it is read front to back.

A read that fails for a passing reason is tried again with growing pauses, for `retry_s` seconds.
Errors of all libraries become one: UnreadableError, a ShardError. A server is held to what it was
asked for: no more bytes, a MiB every minute, and no redirect from https to anything else.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

from vae_dist.data.tar import ShardError, Source, opened
from vae_dist.files import printable, redacted

START_RETRY_S = 20.0  # before training, when a wrong address is likelier than an outage
FIRST_PAUSE_S, LONGEST_PAUSE_S, QUIET_S = 0.2, 30.0, 5.0
TIMEOUT_S = 60.0  # without a byte
BYTES_PER_MINUTE = 1 << 20  # a slower server is given up on, and tried again
NUM_TOGETHER = 16  # reads of a file system that reads one piece at a time
MAX_PIPES = 64  # that one process keeps open
CHUNK = 1 << 20
HTTP = ("http://", "https://")
LASTING = (400, 401, 403, 404, 405, 410, 416, 451)  # statuses that another attempt does not change
MISSING = (403, 404)
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

    def __init__(self, problem: str, is_missing: bool = False) -> None:
        super().__init__(problem)
        self.is_missing = is_missing


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


def warn(text: str) -> None:
    """Print a warning that names files or addresses of others."""
    print(f"warning: {printable(redacted(text))}", file=sys.stderr)


def read_range(place: str, start: int, count: int, *, retry_s: float = START_RETRY_S) -> bytes:
    """`count` bytes from byte `start` on. Raises UnreadableError."""
    return read_ranges([Range(place, start, count)], retry_s=retry_s)[0]


def read_ranges(ranges: Sequence[Range], *, retry_s: float = START_RETRY_S) -> list[bytes]:
    """Several pieces, those of one remote file system at once. Raises UnreadableError."""
    found = [b""] * len(ranges)
    remote: dict[str, list[int]] = {}
    for number, piece in enumerate(ranges):
        if piece.num_bytes <= 0:
            continue
        if is_pipe(piece.place):
            with _pipes_lock:
                (found[number],) = _with_retries([piece], _read_pipes, retry_s)
        elif is_remote(piece.place):
            remote.setdefault(piece.place.partition("://")[0], []).append(number)
        else:
            found[number] = _read_local(piece)
    for numbers in remote.values():
        pieces = _with_retries([ranges[number] for number in numbers], _cat_ranges, retry_s)
        for number, data in zip(numbers, pieces, strict=True):
            found[number] = data
    return found


def read_all(place: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes, such as an index. Raises UnreadableError."""
    if is_pipe(place):
        raise UnreadableError(f"{place}: a command can give shards, but no index")
    data = read_range(place, 0, limit + 1)
    if len(data) > limit:
        raise UnreadableError(f"{place}: larger than the {limit} bytes that an index may have")
    return data


def size_of(place: str) -> int:
    """Bytes of a file; a pipe has no size that could be asked. Raises UnreadableError."""
    assert not is_pipe(place), place
    if not is_remote(place):
        with _opened(place) as file:
            return file.size or 0
    return int(_with_retries([Range(place, 0, 0)], _sizes, START_RETRY_S)[0])


def size_or_none(place: str) -> int | None:
    """`size_of`, None where nothing is; an unreachable server is an UnreadableError."""
    try:
        return size_of(place)
    except UnreadableError as error:
        if error.is_missing:
            return None
        raise


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Source]:
    """A local file. Raises UnreadableError."""
    try:
        with opened(path) as file:
            yield file
    except OSError as error:
        raise UnreadableError(
            f"{path}: cannot be read ({error.strerror}); put it back or repair it, then run the "
            "same command again",
            isinstance(error, FileNotFoundError),
        ) from None


def _read_local(piece: Range) -> bytes:
    found, at, left = [], piece.start, piece.num_bytes
    with _opened(piece.place) as file:
        while left and (data := file.read(at, left)):
            found.append(data)
            at, left = at + len(data), left - len(data)
    return b"".join(found)


# attempts


def _with_retries(
    pieces: list[Range], attempt: Callable[[list[Range]], list[Any]], retry_s: float
) -> list[Any]:
    """What `attempt` gives for each piece. Those for which it gives an exception are tried again,
    together. Raises UnreadableError for one that fails for good."""
    found: list[Any] = [None] * len(pieces)
    left = list(range(len(pieces)))
    begun, pause, count, was_told = clock(), FIRST_PAUSE_S, 0, False
    while True:
        count += 1
        for number, data in zip(left, attempt([pieces[n] for n in left]), strict=True):
            found[number] = data
        left = [n for n in left if isinstance(found[n], Exception)]
        if not left:
            return found
        first = next((n for n in left if _diagnosis(found[n])[1]), left[0])  # a lasting one
        place, (reason, is_lasting, is_missing) = pieces[first].place, _diagnosis(found[first])
        if is_lasting:
            raise UnreadableError(f"{place}: cannot be read ({reason})", is_missing)
        if clock() - begun + pause > retry_s:
            raise UnreadableError(
                f"{place}: cannot be read after {count} attempts in {retry_s:g} s ({reason}); when "
                "the server answers again, run the same command"
            )
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        if not was_told and clock() - begun >= QUIET_S:
            was_told = True
            warn(f"{place}: cannot be read now ({reason}); it is tried again for {retry_s:g} s")


def _diagnosis(error: Exception) -> tuple[str, bool, bool]:
    """What an error of any library means: the reason, whether another attempt changes nothing,
    whether nothing is there."""
    cause: BaseException = error
    # fsspec calls a file missing whose size it could not get, for any reason
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        cause = error if isinstance(error.__cause__, LookupError) else error.__cause__
    for found in (cause, getattr(cause, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(found, name, None), int) and status:
                return f"HTTP {status}", status in LASTING, status in MISSING
    is_lasting = isinstance(cause, LASTING_ERRORS) or "Credential" in type(cause).__name__
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}".rstrip(": ")
    if isinstance(cause, FileNotFoundError):
        text = "no such file"
    return text, is_lasting, isinstance(cause, FileNotFoundError | PermissionError)


# file systems of fsspec


def _cat_ranges(pieces: list[Range]) -> list[Any]:
    """One attempt at pieces of one kind of file system: bytes or an exception for each."""
    from fsspec.asyn import FSTimeoutError, sync

    try:
        systems = [_file_system(piece.place) for piece in pieces]
        system, paths = systems[0][0], [path for _, path in systems]
        starts = [piece.start for piece in pieces]
        stops = [piece.start + piece.num_bytes for piece in pieces]
        if system.async_impl:
            timeout = TIMEOUT_S + 60 * sum(piece.num_bytes for piece in pieces) / BYTES_PER_MINUTE
            many, how = system._cat_ranges, {"on_error": "return", "timeout": timeout}
            found = sync(system.loop, many, paths, starts, stops, **how)
        else:

            def read(path: str, start: int, stop: int) -> bytes | Exception:
                try:  # "none": else some read whole blocks, more than was asked for
                    return bytes(system.cat_file(path, start=start, end=stop, cache_type="none"))
                except Exception as error:
                    return error

            with ThreadPoolExecutor(NUM_TOGETHER) as pool:
                found = list(pool.map(read, paths, starts, stops))
    except FSTimeoutError:
        slow = TimeoutError(f"the server sends less than {BYTES_PER_MINUTE >> 20} MiB a minute")
        return [slow] * len(pieces)
    except Exception as error:
        return [error] * len(pieces)
    return [data if data else EOFError("the server sends no byte") for data in found]


def _sizes(pieces: list[Range]) -> list[Any]:
    try:
        system, path = _file_system(pieces[0].place)
        size = system.info(path)["size"]
    except Exception as error:
        return [error]
    return [ValueError("the server does not say how long the file is") if size is None else size]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    found: tuple[Any, str] = fsspec.core.url_to_fs(
        url, **(_http_options() if url.startswith(HTTP) else {})
    )
    return found


@cache  # fsspec tells file systems apart by their options
def _http_options() -> dict[str, Any]:
    try:
        import aiohttp
    except ImportError:
        extra = "http needs the extra `remote`: pip install 'vae_dist[remote]'"
        raise ImportError(extra) from None

    class Answer(aiohttp.ClientResponse):
        """No more of a body than the piece that was asked for."""

        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            start, last = (int(asked[1]), int(asked[2])) if asked else (0, -1)
            if self.status == 200 and start:
                raise ValueError(
                    "the server answers with the whole file to a request for a piece: serve the "
                    "shards by one that knows Range requests, copy them, or read them as "
                    f"'pipe:curl -sf {self.url}'"
                )
            body, count = bytearray(), last + 1 - start
            while self.ok and len(body) <= count and (data := await self.content.readany()):
                body += data
            if not self.content.at_eof():
                self.close()
            self._body = bytes(body[:count])
            return self._body

    async def check_redirect(session: Any, context: Any, params: Any) -> None:
        target = params.response.headers.get("Location", "")
        scheme = params.url.join(type(params.url)(target)).scheme
        if scheme not in ("https", params.url.scheme):
            raise ValueError(f"redirected from {params.url.scheme} to {scheme}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check_redirect)
    timeout = aiohttp.ClientTimeout(total=None, connect=TIMEOUT_S, sock_read=TIMEOUT_S)
    client = {"timeout": timeout, "response_class": Answer, "trace_configs": [trace]}
    # pieces of a compressed answer are no pieces of the file
    return {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": client}


# pipes


_pipes: dict[tuple[int, str, int], Any] = {}  # webdataset's, by process, place and position
_pipes_lock = threading.Lock()


def _read_pipes(pieces: list[Range]) -> list[Any]:
    """Goes on with the command that stands nearest before the piece, or starts it again."""
    from webdataset.gopen import gopen

    (piece,) = pieces
    mine = (os.getpid(), piece.place)
    before = [key for key in _pipes if key[:2] == mine and key[2] <= piece.start]
    nearest = max(before, default=(*mine, 0))
    try:
        pipe = _pipes.pop(nearest) if before else gopen(piece.place, "rb", bufsize=CHUNK)
        left = piece.start - nearest[2]
        while left and (skipped := pipe.stream.read(min(CHUNK, left))):
            left -= len(skipped)
        data: bytes = pipe.stream.read(piece.num_bytes)
        if len(data) < piece.num_bytes and (code := pipe.proc.wait()):
            return [OSError(f"the command ended with exit code {code}; run it to see why")]
    except Exception as error:
        return [error]
    if len(data) == piece.num_bytes:
        while len(_pipes) >= MAX_PIPES:
            _end(_pipes.pop(next(iter(_pipes))))
        _pipes[*mine, piece.start + len(data)] = pipe
    return [data]


def _end(pipe: Any) -> None:
    pipe.proc.kill()  # the shell; what it has started ends at its next write
    pipe.stream.close()
    pipe.proc.wait()
