"""Where the time of a run goes: images per second, waiting for data, time left.

What goes in: the loop marks each wait for data, each step and each pause; what comes out is a row
of `time/` metrics over the steps since the row before. With T the seconds since then without
pauses, W the part of T spent waiting for data, n images in k steps over all ranks:

    images_per_second = n / T,  data_wait_fraction = W / T,  step_seconds = T / k
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Weight of the latest interval in the step time that predicts the time left.
_SMOOTHING = 0.3


class Meter:
    """Counts from `first_step` steps done up to `total_steps`; `clock` returns seconds.

    One rank's meter stands for all `world` ranks: they move in step and do equal shares. With
    `peak_images_per_second`, what one device could do at its peak arithmetic speed, the row has
    `time/mfu`, the part of it that is used.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        world: int = 1,
        peak_images_per_second: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._step = first_step
        self._total_steps = total_steps
        self._world = world
        self._peak_images_per_second = peak_images_per_second
        self._smooth_step_seconds: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._since = self._clock()
        self._waited = 0.0
        self._paused = 0.0
        self._num_images = 0
        self._num_steps = 0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around `next(batches)`."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation, pictures and checkpoints: this time counts nowhere."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def step(self, num_images: int) -> None:
        """One optimizer step is done; `num_images` is this rank's share of its batch."""
        self._num_images += num_images * self._world
        self._num_steps += 1
        self._step += 1

    def row(self) -> dict[str, float]:
        """The `time/` metrics since the last call, empty when there was no step; starts anew."""
        seconds = self._clock() - self._since - self._paused
        if self._num_steps == 0 or seconds <= 0:
            return {}
        step_seconds = seconds / self._num_steps
        earlier = self._smooth_step_seconds
        if earlier is None:
            self._smooth_step_seconds = step_seconds
        else:
            self._smooth_step_seconds = earlier + _SMOOTHING * (step_seconds - earlier)
        row = {
            "time/images_per_second": self._num_images / seconds,
            "time/images_per_second_per_device": self._num_images / seconds / self._world,
            "time/data_wait_fraction": self._waited / seconds,
            "time/step_seconds": step_seconds,
            "time/left_seconds": self._smooth_step_seconds * (self._total_steps - self._step),
        }
        if self._peak_images_per_second:
            per_device = row["time/images_per_second_per_device"]
            row["time/mfu"] = per_device / self._peak_images_per_second
        self._reset()
        return row
