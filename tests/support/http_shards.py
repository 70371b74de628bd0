"""A web server on loopback that sends pieces of files, and misbehaves when it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What to do with the n-th request (from 0) for a path: a status to answer; a number of bytes after
# which the connection ends, written as a negative number; RESET; None: answer as one should.
RESET = -1
Misbehave = Callable[[str, int], int | None]


class ShardServer:
    """Serves a folder. `sent` counts the bytes of answers by path, `asked` the requests.

    query: what an address must end with, or it is forbidden. content_range: the header of a piece.
    """

    def __init__(
        self,
        folder: Path,
        misbehave: Misbehave | None,
        *,
        ranges: bool,
        query: str,
        content_range: str,
    ) -> None:
        self.folder, self.misbehave, self.ranges = folder, misbehave, ranges
        self.query, self.content_range = query, content_range
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if not request.path.endswith(self.query):
            request.send_error(403)
            return
        path = request.path.removesuffix(self.query).lstrip("/")
        number = self.asked[path]
        self.asked[path] += 1
        trouble = self.misbehave(path, number) if self.misbehave else None
        if trouble is not None and trouble > 0:
            request.send_error(trouble)
            return
        file = self.folder / path
        if not file.is_file():
            request.send_error(404)
            return
        data = file.read_bytes()
        total, asked = len(data), re.match(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and self.ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, total)
            if start >= total:
                request.send_error(416)
                return
            data = data[start:stop]
            request.send_response(206)
            says = self.content_range.format(start=start, last=stop - 1, total=total)
            request.send_header("Content-Range", says)
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if trouble is not None:
            data = data[:-trouble]
        self.sent[path] += len(data)  # before the client can have it all
        request.wfile.write(data)
        if trouble == RESET:  # SO_LINGER 0 sends one
            request.wfile.flush()
            linger = b"\1\0\0\0\0\0\0\0"
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()


@contextlib.contextmanager
def serving(
    folder: Path,
    misbehave: Misbehave | None = None,
    *,
    ranges: bool = True,
    query: str = "",
    content_range: str = "bytes {start}-{last}/{total}",
) -> Iterator[ShardServer]:
    shards = ShardServer(folder, misbehave, ranges=ranges, query=query, content_range=content_range)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                shards.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    shards.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield shards
    finally:
        server.shutdown()
        server.server_close()
