"""Arms of a comparison in processes of their own, which train in turn on the same cores.

An arm is a command that speaks JSON lines on stdin and stdout: it prints {"ready": ...} with its
options, then answers {"run": SECONDS} (it trains that long, or a step longer, and says how many
images and seconds) and {"finish": FILE} (it writes what the caller wants to know and ends). Between
two turns it waits and takes no time. This file imports neither torch nor vae_dist: peers have an
environment of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # where `python -m benchmarks.NAME` is understood


class Finished(Exception):
    """Raised in an arm at its last turn."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Turn:
    """An arm's side. Everything else that it prints goes to stderr."""

    def __init__(self, *, num_images_per_step: int) -> None:
        self._lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._images = num_images_per_step
        self._began = self._until_s = 0.0
        self._steps = 0
        self._is_running = False

    def ready(self, **options: Any) -> None:
        self._say({"ready": options})

    def before_step(self, synchronize: Callable[[], None] = lambda: None) -> None:
        """Call it before each step: it comes back when there is time for one. Raises Finished."""
        if self._is_running:
            if time.perf_counter() - self._began < self._until_s:
                self._steps += 1
                return
            synchronize()
            took = time.perf_counter() - self._began
            self._say({"images": self._steps * self._images, "steps": self._steps, "seconds": took})
        order = json.loads(sys.stdin.readline() or '{"finish": ""}')
        if "finish" in order:
            raise Finished(order["finish"])
        self._is_running, self._steps, self._until_s = True, 1, float(order["run"])
        self._began = time.perf_counter()

    def _say(self, answer: dict[str, Any]) -> None:
        self._lines.write(json.dumps(answer, default=str) + "\n")
        self._lines.flush()


class Arm:
    """The caller's side: a process, its options and what its turns came to."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int, log: Path) -> None:
        self.name = name
        self.images, self.steps, self.seconds = 0, 0, 0.0
        self.rates: list[float] = []  # images per second of each turn
        environment = dict(os.environ)
        if threads:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                text=True,
            )
        self.options: dict[str, Any] = self._answer()["ready"]

    def run(self, seconds: float) -> None:
        self._order({"run": seconds})
        answer = self._answer()
        self.images += answer["images"]
        self.steps += answer["steps"]
        self.seconds += answer["seconds"]
        self.rates.append(answer["images"] / answer["seconds"])

    def finish(self, path: Path) -> None:
        self._order({"finish": str(path)})
        if code := self._process.wait():
            raise SystemExit(f"{self.name}: exit code {code}\n{self._log.read_text()[-3000:]}")

    def close(self) -> None:
        """End it, however it stands."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SystemExit(f"{self.name} ended early:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(arms: Sequence[Arm], *, seconds: float, turn_s: float) -> Iterator[float]:
    """Until each has trained for `seconds`; the order turns round at each round. Yields the seconds
    that each one had, after each round."""
    done, number = 0.0, 0
    while done < seconds:
        now = min(turn_s, seconds - done)
        for arm in arms if number % 2 == 0 else list(reversed(arms)):
            arm.run(now)
        done, number = done + now, number + 1
        yield done
