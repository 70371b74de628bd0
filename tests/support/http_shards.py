"""A web server on loopback that sends pieces of files, and misbehaves when it is told to."""

import contextlib
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESET, EMPTY = -1, 0


@contextlib.contextmanager
def serving(folder, misbehave=lambda path, number: None, *, ranges=True, query=""):
    """Yields a server: `url`; `sent`, the bytes of answers by path; `asked`, the requests.

    misbehave: what to do with the n-th request (from 0) for a path: a status to answer; a number of
    bytes after which the connection ends, as a negative number; RESET; EMPTY, an answer without a
    byte; a text, an address to redirect to; None: answer as one should. query: what an address must
    end with, or it is forbidden.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removesuffix(query).lstrip("/")
            file, trouble = folder / path, misbehave(path, server.asked[path])
            server.asked[path] += 1
            if isinstance(trouble, str):
                self.send_response(302)
                self.send_header("Location", trouble)
                self.end_headers()
                return
            status = 403 if not self.path.endswith(query) else trouble or 0
            if status > 0 or not file.is_file():
                self.send_error(status if status > 0 else 404)
                return
            data = file.read_bytes()
            total, asked = len(data), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and ranges:
                start, stop = int(asked[1]), min(int(asked[2]) + 1, total)
                data = data[start:stop] if trouble != EMPTY else b""
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            data = data[: -trouble if trouble else None]
            server.sent[path] += len(data)  # before the client can have it all
            self.wfile.write(data)
            if trouble == RESET:  # SO_LINGER 0 sends one
                linger = b"\1\0\0\0\0\0\0\0"
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # of a client that has gone
    server.asked, server.sent = Counter(), Counter()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
