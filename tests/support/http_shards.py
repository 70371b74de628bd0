"""A web server on loopback that sends pieces of files, and misbehaves when it is told to."""

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What to do with the n-th request (from 0) for a path: a status to answer; a number of bytes after
# which the connection ends, written as a negative number; RESET; EMPTY, an answer without a byte; a
# text, an address to redirect to; None: answer as one should.
RESET, EMPTY = -1, 0
Misbehave = Callable[[str, int], int | str | None]


class ShardServer:
    """Serves a folder. `sent` counts the bytes of answers by path, `asked` the requests.

    query: what an address must end with, or it is forbidden.
    """

    def __init__(self, folder, misbehave, *, ranges, query):
        self.folder, self.misbehave, self.ranges, self.query = folder, misbehave, ranges, query
        self.sent = Counter()
        self.asked = Counter()
        self.url = ""

    def answer(self, request):
        path = request.path.removesuffix(self.query).lstrip("/")
        file, trouble = self.folder / path, self.misbehave(path, self.asked[path])
        self.asked[path] += 1
        if isinstance(trouble, str):
            request.send_response(302)
            request.send_header("Location", trouble)
            request.end_headers()
            return
        status = 403 if not request.path.endswith(self.query) else trouble or 0
        if status > 0 or not file.is_file():
            request.send_error(status if status > 0 else 404)
            return
        data = file.read_bytes()
        total, asked = len(data), re.match(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and self.ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, total)
            data = data[start:stop] if trouble != EMPTY else b""
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        data = data[: -trouble if trouble else None]
        self.sent[path] += len(data)  # before the client can have it all
        request.wfile.write(data)
        if trouble == RESET:  # SO_LINGER 0 sends one
            request.wfile.flush()
            linger = b"\1\0\0\0\0\0\0\0"
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()


@contextlib.contextmanager
def serving(folder, misbehave=lambda path, number: None, *, ranges=True, query=""):
    shards = ShardServer(folder, misbehave, ranges=ranges, query=query)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                shards.answer(self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    shards.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield shards
    finally:
        server.shutdown()
        server.server_close()
