"""Pictures written beside training: encoded and handed to the sinks on one thread.

In: pictures. Out: PNG files and a call of each sink. A full queue or a full disk loses pictures
with a warning, never a step.

Nothing on this thread may call torch: one tensor operation here starts a second team of OpenMP
threads, and with more of them than cores libgomp no longer spins at its barriers, so that a small
model trains at half its speed from then on (28 to 60 ms a step on two cores).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vae_dist.tracking.images import save_png
from vae_dist.tracking.sinks import Sink

_QUEUED_PICTURES = 64


class Picture(NamedTuple):
    step: int
    name: str
    caption: str
    image: Image.Image


class PictureWriter:
    """`put` returns at once; `close` waits for what is queued, `seconds` at most."""

    def __init__(self, folder: Path, sinks: Iterable[Sink], *, say: Callable[[str], None]) -> None:
        self._folder, self._sinks, self._say = folder, list(sinks), say
        self._queue: queue.Queue[Picture | None] = queue.Queue(_QUEUED_PICTURES)
        self._worker = threading.Thread(target=self._work, name="pictures", daemon=True)
        self._worker.start()

    def put(self, picture: Picture) -> None:
        try:
            self._queue.put_nowait(picture)
        except queue.Full:
            self._say(f"warning: {picture.name} of step {picture.step} is not drawn: disk too slow")

    @property
    def is_idle(self) -> bool:
        return self._queue.unfinished_tasks == 0

    def close(self, *, seconds: float = 30.0) -> None:
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._worker.join(seconds)

    def _work(self) -> None:
        while (picture := self._queue.get()) is not None:
            try:
                self._write(picture)
            except OSError as error:
                self._say(
                    f"warning: {picture.name} of step {picture.step} is not written "
                    f"({error.strerror or error})"
                )
            finally:
                self._queue.task_done()

    def _write(self, picture: Picture) -> None:
        path = save_png(picture.image, self._folder / f"{picture.name}_{picture.step:08d}.png")
        for sink in self._sinks:
            sink.image(picture.step, f"images/{picture.name}", path, picture.caption)
