"""A stand-in for the W&B service on this machine's loopback, as wandb 0.31 speaks to it.

In: what `wandb.init(mode="online")` and its uploader send: GraphQL operations, the file stream
(history, summary, console), uploads of media. Out: the same in memory, as `Run`s
to assert on. `stop()` and `start()` are an outage, `fail` answers with an HTTP error, `hang` takes
connections and never answers. Artifacts are not answered. What the server had to guess at is in
`unknown`.
"""

import base64
import contextlib
import gzip
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tests.support.distributed import LAUNCHER_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
ENTITY, KEY = "tester", "0123456789" * 4
HISTORY, SUMMARY, EVENTS = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl"
EACH_SECOND = (
    *("FILE_STREAM_TRANSMIT_INTERVAL", "FILE_STREAM_RETRY_WAIT_MIN_SECONDS"),
    *("FILE_STREAM_RETRY_WAIT_MAX_SECONDS", "GRAPHQL_RETRY_WAIT_MAX_SECONDS"),
    "FILE_TRANSFER_RETRY_WAIT_MAX_SECONDS",
)

USER = {"id": "VXNlcg==", "entity": ENTITY, "username": ENTITY, "email": "t@example.com"}
VIEWER = USER | {"flags": "{}", "teams": {"edges": []}}
VERSIONS = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}
SERVER_INFO = {"serverInfo": {"features": [], **VERSIONS}}
Answer = tuple[int, dict[str, Any] | bytes]


@dataclass
class Run:
    """What the service holds of one run."""

    project: str
    id: str
    name: str
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # stream -> offset -> line
    files: dict[str, bytes] = field(default_factory=dict)  # uploaded path -> content
    complete: bool = False
    exit_code: int | None = None
    preempting: bool = False

    def stream(self, name):
        return [line for _, line in sorted(self.lines.get(name, {}).items())]

    @property
    def history(self):
        return [json.loads(line) for line in self.stream(HISTORY)]

    @property
    def summary(self):
        lines = self.stream(SUMMARY)
        return dict(json.loads(lines[-1])) if lines else {}

    @property
    def user_config(self):
        return {key: value.get("value") for key, value in self.config.items() if key != "_wandb"}

    def steps(self, key):
        """The trainer's steps of the rows that have `key`, in the order of arrival."""
        return [row["trainer/step"] for row in self.history if key in row]

    @property
    def bucket(self):
        """As the client asks for it at its start and at a resume."""
        history, events = self.stream(HISTORY), self.stream(EVENTS)
        return {
            "id": base64.b64encode(f"Run:v1:{self.id}".encode()).decode(),
            "name": self.id,
            "displayName": self.name,
            **dict.fromkeys(("description", "notes", "sweepName")),
            "tags": self.tags,
            "config": json.dumps(self.config),
            "project": _project(self.project),
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": len(self.stream("output.log")),
            "historyTail": json.dumps(history[-1:]),  # a list of lines, each JSON in itself
            "eventsTail": json.dumps(events[-1:]),
            "wandbConfig": json.dumps({"t": 1}),
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _body(self):
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self):
        body = self._body()
        if self.server.service.hang.is_set():
            self.server.service.resume.wait()
            self.close_connection = True  # whoever asked has given up long ago
            return
        status, answer = self.server.service.answer(self.command, self.path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = _answer


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, service, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.service = service
        self.sockets = set()

    def process_request(self, request, address):
        self.sockets.add(request)
        super().process_request(request, address)

    def handle_error(self, request, address):
        """Clients that hang up, or our own stop()."""


class WandbServer:
    """Use as a context manager; `url` and `environment()` lead a client to it."""

    def __init__(self):
        self.runs = {}
        self.unknown = []  # operations and paths answered by guess
        self.stopped = set()  # ids of runs whose stop button was pressed
        self.fail = {}  # part of a path -> HTTP status to answer with
        self.hang, self.resume = threading.Event(), threading.Event()
        self._port = 0
        self._lock = threading.RLock()
        self._listener = None
        self.answers = {
            **dict.fromkeys(("Viewer", "GetDefaultEntity"), lambda _: {"viewer": VIEWER}),
            **dict.fromkeys(("ServerFeaturesQuery", "ServerInfo"), lambda _: SERVER_INFO),
            "UpsertBucket": self._upsert,
            "RunResumeStatus": self._resume_status,
            **dict.fromkeys(("RunStoppedStatus", "Stopped"), self._stopped_status),
            "CreateRunFiles": self._create_files,
            "MarkRunFilesUploaded": lambda _: {"markRunFilesUploaded": {"success": True}},
            "OrganizationCoreWeaveOrganizationID": lambda _: {},
        }

    def start(self):
        self._listener = Listener(self, self._port)
        self._port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        """Close the listener and every open connection; start() takes the same port again."""
        listener, self._listener = self._listener, None
        self.resume.set()
        if listener is None:
            return
        listener.shutdown()
        listener.server_close()
        for connection in listener.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

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
        return clean | {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "OMP_NUM_THREADS": "1"}

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

    def answer(self, method, path, body):
        status = next((s for part, s in list(self.fail.items()) if part in path), None)
        if status is not None:
            return status, {"errors": [{"message": f"injected {status}"}]}
        try:
            with self._lock:
                return self._handle(method, path, body)
        except Exception as error:  # a mistake of this file must show, not hang the client
            self.unknown.append(f"{method} {path}: {error!r}")
            return 400, {"errors": [{"message": repr(error)}]}

    def _handle(self, method, path, body):
        if path == "/graphql":
            return 200, {"data": self._graphql(json.loads(body))}
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            return 200, self._file_stream(unquote(match[1]), json.loads(body or b"{}"))
        if match := re.fullmatch(r"/storage/([^/]+)/(.+)", path):
            files, name = self.runs[unquote(match[1])].files, unquote(match[2])
            if method == "PUT":
                files[name] = body
            return 200, files[name]
        if path == "/":  # the sink asks whether the service is there
            return 200, {}
        if not path.startswith("/sdk/otel"):  # telemetry
            self.unknown.append(f"{method} {path}")
        return 404, {}

    def _file_stream(self, run_id, request):
        run = self.runs[run_id]
        for name, chunk in (request.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(chunk["content"], chunk["offset"]))
        run.preempting |= bool(request.get("preempting"))
        if request.get("complete"):
            run.complete, run.exit_code = True, request.get("exitcode")
        return {"stopped": run_id in self.stopped}

    def _graphql(self, request):
        query, variables = request.get("query", ""), request.get("variables") or {}
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = request.get("operationName") or (named[1] if named else "?")
        if operation not in self.answers:
            self.unknown.append(operation)
            return {}
        return self.answers[operation](variables)

    def _upsert(self, variables):
        node = base64.b64decode(variables.get("id") or "").decode()
        name = variables.get("name") or node.removeprefix("Run:v1:")
        is_new = name not in self.runs
        project = variables.get("project") or "uncategorized"
        run = self.runs.setdefault(name, Run(project, name, name))
        run.name = variables.get("displayName") or run.name
        run.group = variables.get("groupName") or run.group
        run.tags = variables.get("tags") or run.tags
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.lines.setdefault(SUMMARY, {})[0] = variables["summaryMetrics"]
        return {"upsertBucket": {"bucket": run.bucket, "inserted": is_new}}

    def _resume_status(self, variables):
        run = self.runs.get(variables["name"])
        bucket = None if run is None else run.bucket
        return {"model": _project(variables.get("project", "")) | {"bucket": bucket}}

    def _stopped_status(self, variables):
        run_id = variables.get("runId") or variables.get("id")
        return {"project": {"run": {"stopped": run_id in self.stopped}}}

    def _create_files(self, variables):
        url = f"{self.url}/storage/{quote(variables['run'], safe='')}/"
        files = [{"name": name, "uploadUrl": url + quote(name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


def _project(name):
    return {"id": "UHJv", "name": name, "entity": {"id": "RW50", "name": ENTITY}}
