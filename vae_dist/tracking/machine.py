"""Figures of the machine that the trainer does not know itself: memory, peak speed, update sizes.

In: the device, the optimizer. Out: rows of `system/` and `optim/` metrics.
"""

from __future__ import annotations

import functools
import math
import os
import time

import psutil
import torch

from vae_dist.sharding import is_cut

# Dense bfloat16 operations per second with float32 sums, from the vendors' data sheets. The first
# name that is part of the device's name counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "V100": 125e12,
}
_GIB = 2**30
# Steps between update ratios, at least: one costs as much as four rows without it.
_RATIO_STEPS = 100


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of one device in 16 bits; 0.0 where it is not known."""
    if device.type != "cuda" or precision == "no":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


def memory_row(device: torch.device) -> dict[str, float]:
    """Memory of this process, GiB: resident on the host, and the peak on a CUDA device.

    Asked for once a second at most: after a step it costs 0.1 ms, as much as the rest of a row.
    """
    return dict(_memory(device, os.getpid(), int(time.monotonic())))


@functools.lru_cache(maxsize=1)
def _memory(device: torch.device, pid: int, second: int) -> dict[str, float]:
    row = {"system/memory_gib": _process(pid).memory_info().rss / _GIB}
    if device.type == "cuda":
        row["system/device_memory_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        row["system/device_memory_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    return row


@functools.cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # to make one costs ten times as much as to ask it


class UpdateRatio:
    """Size of an optimizer step against the weights: |change of weights| / |weights|, 2-norms.

    Call `arm()` before the step that is to be measured: it costs a copy of the weights, so the
    trainer does it `every` so many steps, each with a row of its log. A skipped update has ratio 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rows_every: int = 1) -> None:
        self.every = math.ceil(_RATIO_STEPS / rows_every) * rows_every
        self._is_armed = False
        self._before: list[torch.Tensor] = []
        self._ratio: torch.Tensor | None = None
        optimizer.register_step_pre_hook(self._copy)
        optimizer.register_step_post_hook(self._compare)

    def arm(self) -> None:
        self._is_armed = True

    def row(self) -> dict[str, float]:
        """The ratio of the measured step, once; waits for the device."""
        ratio, self._ratio = self._ratio, None
        return {} if ratio is None else {"optim/update_ratio": float(ratio)}

    @torch.no_grad()
    def _copy(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._is_armed:
            self._before = _copies(_weights(optimizer))

    @torch.no_grad()
    def _compare(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._is_armed:
            return
        after = _copies(_weights(optimizer))
        torch._foreach_sub_(self._before, after)
        change, size = _norm(self._before), _norm(after)
        self._ratio = change / size.clamp_min(1e-12)
        self._before, self._is_armed = [], False


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight.detach() for group in optimizer.param_groups for weight in group["params"]]


def _copies(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """One flat tensor where that is possible: dozens of small ones cost twice the time."""
    if any(is_cut(weight) for weight in weights):
        return [weight.clone() for weight in weights]
    return [torch.cat([weight.reshape(-1) for weight in weights])]


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded weights
