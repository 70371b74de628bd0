"""What a training step costs: its time and its memory.

In: the loop marks each wait for data, each step and each pause. Out: rows of `time/` and `system/`
metrics. Over the k steps since the row before, with T their seconds without pauses, W the part of T
spent waiting for data and n images over all ranks:

    images_per_second = n / T,  data_wait_fraction = W / T,  step_seconds = T / k
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

# Dense bfloat16 teraFLOPS with float32 sums, from the vendors' data sheets. The first name that is
# part of the device's name counts.
PEAK_TERAFLOPS = {
    **{"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312},
    **{"L40S": 362, "L4": 121, "A40": 150, "A10": 125, "V100": 125},
}
_GIB = 2**30


@dataclass
class Meter:
    """Counts from `first_step` steps done up to `total_steps`.

    One rank's meter stands for all `world` ranks: they move in step and do equal shares. With
    `peak_images_per_second`, what one device could do at its peak arithmetic speed, the row has
    `time/mfu`, the part of it that is used.
    """

    total_steps: int
    first_step: int = 0
    world: int = 1
    peak_images_per_second: float = 0.0

    def __post_init__(self) -> None:
        self._step = self.first_step
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._waited = self._paused = 0.0
        self._num_images = self._num_steps = 0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around `next(batches)`."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation, pictures and checkpoints: this time counts nowhere."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def step(self, num_images: int) -> None:
        """One optimizer step is done; `num_images` is this rank's share of its batch."""
        self._num_images += num_images * self.world
        self._num_steps += 1
        self._step += 1

    def row(self) -> dict[str, float]:
        """The `time/` metrics since the last call, empty when there was no step; starts anew."""
        seconds = time.perf_counter() - self._since - self._paused
        if self._num_steps == 0 or seconds <= 0:
            return {}
        step_seconds = seconds / self._num_steps
        speed = self._num_images / seconds
        row = {
            "time/images_per_second": speed,
            "time/data_wait_fraction": self._waited / seconds,
            "time/step_seconds": step_seconds,
            "time/left_seconds": step_seconds * (self.total_steps - self._step),
        }
        if self.peak_images_per_second:
            row["time/mfu"] = speed / self.world / self.peak_images_per_second
        self._reset()
        return row


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of one device in 16 bits; 0.0 where it is not known."""
    if device.type != "cuda" or precision == "no":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TERAFLOPS.items() if part in name), 0.0)


def memory_row(device: torch.device) -> dict[str, float]:
    """Memory of this process, GiB: resident on the host, and the peak on a CUDA device."""
    row = {"system/memory_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        row["system/device_memory_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return row
