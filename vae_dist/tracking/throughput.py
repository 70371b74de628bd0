"""What a training step costs: its time, its memory, the size of its update.

In: the loop marks each wait for data, each step and each pause. Out: rows of `time/`, `system/` and
`optim/` metrics. Over the k steps since the row before, with T their seconds without pauses, W the
part of T spent waiting for data and n images over all ranks:

    images_per_second = n / T,  data_wait_fraction = W / T,  step_seconds = T / k
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
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
_RATIO_STEPS = 100  # between update ratios, at least: each copies the weights
_SMOOTHING = 0.3  # weight of the latest interval in the step time that predicts the time left


@dataclass
class Meter:
    """Counts from `first_step` steps done up to `total_steps`; `clock` returns seconds.

    One rank's meter stands for all `world` ranks: they move in step and do equal shares. With
    `peak_images_per_second`, what one device could do at its peak arithmetic speed, the row has
    `time/mfu`, the part of it that is used.
    """

    total_steps: int
    first_step: int = 0
    world: int = 1
    peak_images_per_second: float = 0.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._step = self.first_step
        self._smooth_step_seconds = 0.0  # none yet
        self._reset()

    def _reset(self) -> None:
        self._since = self.clock()
        self._waited = self._paused = 0.0
        self._num_images = self._num_steps = 0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around `next(batches)`."""
        start = self.clock()
        yield
        self._waited += self.clock() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluation, pictures and checkpoints: this time counts nowhere."""
        start = self.clock()
        yield
        self._paused += self.clock() - start

    def step(self, num_images: int) -> None:
        """One optimizer step is done; `num_images` is this rank's share of its batch."""
        self._num_images += num_images * self.world
        self._num_steps += 1
        self._step += 1

    def row(self) -> dict[str, float]:
        """The `time/` metrics since the last call, empty when there was no step; starts anew."""
        seconds = self.clock() - self._since - self._paused
        if self._num_steps == 0 or seconds <= 0:
            return {}
        step_seconds = seconds / self._num_steps
        earlier = self._smooth_step_seconds or step_seconds
        self._smooth_step_seconds = earlier + _SMOOTHING * (step_seconds - earlier)
        speed = self._num_images / seconds
        row = {
            "time/images_per_second": speed,
            "time/data_wait_fraction": self._waited / seconds,
            "time/step_seconds": step_seconds,
            "time/left_seconds": self._smooth_step_seconds * (self.total_steps - self._step),
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
        row["system/device_memory_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    return row


class UpdateRatio:
    """Size of an optimizer step against the weights: |change of weights| / |weights|, 2-norms.

    Call `arm()` before the step that is to be measured and `row()` after it: it costs a copy of
    the weights, so the trainer does it `every` so many steps, each with a row of its log.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rows_every: int = 1) -> None:
        self.every = math.ceil(_RATIO_STEPS / rows_every) * rows_every
        self._is_armed = False
        self._before: list[torch.Tensor] = []
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(self._copy)  # the activations' memory is free then

    def arm(self) -> None:
        self._is_armed = True

    def row(self) -> dict[str, float]:
        """The ratio of the step since `arm`, once (0 of a skipped update); waits for the device."""
        before, self._before, self._is_armed = self._before, [], False
        if not before:
            return {}
        after = _copies(self._optimizer)
        torch._foreach_sub_(before, after)
        return {"optim/update_ratio": float(_norm(before) / _norm(after).clamp_min(1e-12))}

    def _copy(self, *_: object) -> None:
        if self._is_armed:
            self._before, self._is_armed = _copies(self._optimizer), False


def _copies(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights as one flat tensor, unless they are sharded: many small ones take longer."""
    weights = [weight.detach() for group in optimizer.param_groups for weight in group["params"]]
    if any(hasattr(weight, "full_tensor") for weight in weights):
        return [weight.clone() for weight in weights]
    return [torch.cat([weight.reshape(-1) for weight in weights])]


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded weights
