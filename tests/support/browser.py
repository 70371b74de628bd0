"""Headless Chromium over its debugging pipe: no port, no package, only the standard library.

In: a local page. Out: its console errors, the requests that it made, values of expressions, PNG
screenshots. Messages are JSON, ended by a zero byte, on file descriptors 3 (to the browser) and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """Use as a context manager. `errors` holds exceptions and console errors, `requests` URLs."""

    def __init__(self, file: Path, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._url = file.resolve().as_uri()
        self._profile, self._size = profile, (width, height)
        self._buffer, self._answers, self._number = b"", {}, 0  # type: ignore[var-annotated]
        self._loaded = False
        self._session = ""

    def __enter__(self) -> Page:
        chromium = find_chromium()
        assert chromium is not None
        read_commands, self._commands = os.pipe()
        self._events, write_events = os.pipe()
        width, height = self._size

        def on_3_and_4() -> None:
            # out of the way first: each may be the other's number
            commands, events = os.dup(read_commands), os.dup(write_events)
            high_commands, high_events = os.dup2(commands, 60), os.dup2(events, 61)
            os.dup2(high_commands, 3)
            os.dup2(high_events, 4)

        self._process = subprocess.Popen(
            [
                chromium,
                "--headless=new",
                "--no-sandbox",  # as root in a container there is none
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={self._profile}",
                f"--window-size={width},{height}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            pass_fds=(),
            preexec_fn=on_3_and_4,
        )
        os.close(read_commands)
        os.close(write_events)
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        attach = {"targetId": target, "flatten": True}
        self._session = self._ask("Target.attachToTarget", attach)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._ask(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", metrics)
        self._ask("Page.navigate", {"url": self._url})
        end = time.monotonic() + 60
        while not self._loaded:
            assert time.monotonic() < end, "the page does not load"
            self._receive(1.0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, top: int = 0, height: int | None = None) -> None:
        """The page from `top` down, `height` pixels or the window's."""
        clip = {"x": 0, "y": top, "width": self._size[0], "height": height or self._size[1]}
        options = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", options)["data"]))

    def _ask(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method}
        message |= {"params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while self._number not in self._answers:
            assert time.monotonic() < end, f"no answer to {method}"
            self._receive(1.0)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, seconds: float) -> None:
        if not select.select([self._events], [], [], seconds)[0]:
            assert self._process.poll() is None, "the browser is gone"
            return
        self._buffer += os.read(self._events, 2**20)
        *whole, self._buffer = self._buffer.split(b"\0")
        for text in whole:
            self._take(json.loads(text))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, parameters = message["method"], message["params"]
        if method == "Page.loadEventFired":
            self._loaded = self._session != ""
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url != self._url and not url.startswith("data:"):
                self.requests.append(url)
