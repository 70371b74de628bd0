"""A stand-in for the W&B service on this machine's loopback, as wandb 0.31 speaks to it.

In: what `wandb.init(mode="online")` and its uploader send: GraphQL operations, the file stream
(history, summary), uploads of media. Out: the same in memory, as `Run`s to assert on. `stop()` and
`start()` are an outage, `fault` is "500" (answers that) or "hang" (takes connections and never
answers). What the server had to guess at is in `unknown`.
"""

import base64
import contextlib
import json
import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from tests.support.distributed import LAUNCHER_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
ENTITY, KEY = "tester", "0123456789" * 4
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
EACH_SECOND = (
    *("FILE_STREAM_TRANSMIT_INTERVAL", "FILE_STREAM_RETRY_WAIT_MIN_SECONDS"),
    *("FILE_STREAM_RETRY_WAIT_MAX_SECONDS", "GRAPHQL_RETRY_WAIT_MAX_SECONDS"),
    "FILE_TRANSFER_RETRY_WAIT_MAX_SECONDS",
)
VIEWER = {"id": "VXNlcg==", "entity": ENTITY, "username": ENTITY, "teams": {"edges": []}}


class Run:
    """What the service holds of one run."""

    def __init__(self, run_id):
        self.id, self.given = run_id, {}  # given: project, displayName, groupName, tags, config
        self.lines = {HISTORY: {}, SUMMARY: {}}  # stream -> offset -> line
        self.files = {}  # uploaded path -> content
        self.complete, self.exit_code = False, None

    @property
    def history(self):
        return [json.loads(line) for _, line in sorted(self.lines[HISTORY].items())]

    @property
    def summary(self):
        lines = self.lines[SUMMARY]
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def config(self):
        found = json.loads(self.given.get("config", "{}"))
        return {key: value.get("value") for key, value in found.items()}

    def steps(self, key):
        """The trainer's steps of the rows that have `key`, in the order of arrival."""
        return [row["trainer/step"] for row in self.history if key in row]

    @property
    def bucket(self):
        """As the client asks for it at its start and at a resume."""
        return {
            "id": base64.b64encode(f"Run:v1:{self.id}".encode()).decode(),
            "name": self.id,
            "displayName": self.given.get("displayName", ""),
            "tags": self.given.get("tags", []),
            "config": self.given.get("config", "{}"),
            "project": _project(self.given.get("project", "")),
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),  # it has begun
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self):
        service = self.server.service
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if service.fault == "hang":
            while service.fault == "hang":
                time.sleep(0.05)
            self.close_connection = True  # whoever asked has given up long ago
            return
        status, answer = service.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, service, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.service, self.sockets = service, set()

    def process_request(self, request, address):
        self.sockets.add(request)
        super().process_request(request, address)

    def handle_error(self, request, address):
        """Clients that hang up, or our own stop()."""


class WandbServer:
    """Use as a context manager; `environment()` leads a client to it."""

    def __init__(self):
        self.runs = {}  # by id
        self.unknown = []  # operations and paths answered by guess
        self.stopped = set()  # ids of runs whose stop button was pressed
        self.fault = ""
        self._port, self._lock, self._listener = 0, threading.RLock(), None
        self.answers = {
            "Viewer": lambda _: {"viewer": VIEWER},
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "UpsertBucket": self._upsert,
            "RunResumeStatus": self._resume_status,
            "RunStoppedStatus": self._stopped_status,
            "CreateRunFiles": self._create_files,
            "MarkRunFilesUploaded": lambda _: {"markRunFilesUploaded": {"success": True}},
        }

    def start(self):
        self._listener = Listener(self, self._port)
        self._port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        """Close the listener and every open connection; start() takes the same port again."""
        listener, self._listener, self.fault = self._listener, None, ""
        if listener is not None:
            listener.shutdown()
            listener.server_close()
            for connection in listener.sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    __enter__ = start

    def __exit__(self, *exception):
        self.stop()

    def environment(self, home):
        """No settings and no login but those that lead here, with a client that sends and retries
        each second (a fraction is read as 0, which is the default of 15 s or more)."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in LAUNCHER_VARIABLES and not key.startswith("WANDB_")
        }
        clean |= {f"WANDB__{name}": "1" for name in EACH_SECOND}
        clean |= {"HOME": str(home), "NETRC": str(home / "none"), "PYTHONPATH": str(ROOT)}
        clean |= {"WANDB_BASE_URL": f"http://127.0.0.1:{self._port}", "WANDB_API_KEY": KEY}
        return clean | {"OMP_NUM_THREADS": "1"}

    def only_run(self):
        (run,) = self.runs.values()
        return run

    def wait(self, condition, *, seconds=30):
        """Whether `condition` became true; what it reads does not change meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._lock:
                if condition():
                    return True
            time.sleep(0.02)
        return False

    def answer(self, path, body):
        """Status and JSON."""
        if self.fault == "500":
            return 500, {"errors": [{"message": "injected"}]}
        try:
            with self._lock:
                return self._handle(path, body)
        except Exception as error:  # what this file does not know must show, not hang the client
            self.unknown.append(f"{path}: {error!r}")
            return 400, {"errors": [{"message": repr(error)}]}

    def _handle(self, path, body):
        if path == "/graphql":
            return 200, {"data": self._graphql(json.loads(body))}
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            return 200, self._file_stream(self.runs[unquote(match[1])], json.loads(body or b"{}"))
        if match := re.fullmatch(r"/storage/([^/]+)/(.+)", path):
            self.runs[unquote(match[1])].files[unquote(match[2])] = body
            return 200, {}
        if not path.startswith("/sdk/otel"):  # telemetry
            self.unknown.append(path)
        return 404, {}

    def _file_stream(self, run, request):
        for name, chunk in (request.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(chunk["content"], chunk["offset"]))
        if request.get("complete"):
            run.complete, run.exit_code = True, request.get("exitcode")
        return {"stopped": run.id in self.stopped}

    def _graphql(self, request):
        named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        operation = request.get("operationName") or (named[1] if named else "?")
        return self.answers[operation](request.get("variables") or {})

    def _upsert(self, variables):
        node = base64.b64decode(variables.get("id") or "").decode()
        run_id = variables.get("name") or node.removeprefix("Run:v1:")
        is_new = run_id not in self.runs
        run = self.runs.setdefault(run_id, Run(run_id))
        run.given |= {key: value for key, value in variables.items() if value}
        if summary := variables.get("summaryMetrics"):
            run.lines[SUMMARY][0] = summary
        return {"upsertBucket": {"bucket": run.bucket, "inserted": is_new}}

    def _resume_status(self, variables):
        bucket = getattr(self.runs.get(variables["name"]), "bucket", None)
        return {"model": _project(variables.get("project", "")) | {"bucket": bucket}}

    def _stopped_status(self, variables):
        run_id = variables.get("runId") or variables.get("id")
        return {"project": {"run": {"stopped": run_id in self.stopped}}}

    def _create_files(self, variables):
        url = f"http://127.0.0.1:{self._port}/storage/{quote(variables['run'], safe='')}/"
        files = [{"name": name, "uploadUrl": url + quote(name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


def _project(name):
    return {"id": "UHJv", "name": name, "entity": {"id": "RW50", "name": ENTITY}}
