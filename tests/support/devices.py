"""Devices that a test runs on: the CPU always, a CUDA device where there is one (`-m gpu`)."""

import contextlib
import os
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.distributed import reset_accelerate
from vae_dist.config.schema import RuntimeConfig
from vae_dist.data.loader import split_mask
from vae_dist.distributed import Runtime

NEEDS_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
)
CUDA = pytest.param("cuda", marks=NEEDS_CUDA)
# What is shown on CUDA is shown on the CPU as well, so that the test itself is tested everywhere.
DEVICES: list[Any] = ["cpu", CUDA]


@contextlib.contextmanager
def runtime_on(device, precision="no"):
    """Of one process."""
    config = RuntimeConfig(threads=1, device="cpu" if device == "cpu" else "auto")
    with fresh_accelerate():
        runtime = Runtime.start(config, precision=precision)
        assert runtime.device.type == device
        yield runtime


@contextlib.contextmanager
def fresh_accelerate():
    """Its state is of the first device and precision of a process: forgotten before and after."""
    try:
        reset_accelerate()
        yield
    finally:
        reset_accelerate()


def pinned(batch, device):
    """As a loader hands it over: pixel by pixel with their mask, in pinned memory before a GPU."""
    groups = []
    for group in batch.groups:
        planes = [group.images, *(() if group.masks is None else (group.masks,))]
        pixels = torch.cat(planes, 1).permute(0, 2, 3, 1).contiguous()
        pixels = pixels.pin_memory() if device == "cuda" else pixels
        images, masks = split_mask(pixels.permute(0, 3, 1, 2), has_mask=group.masks is not None)
        groups.append(group._replace(images=images, masks=masks))
    return batch._replace(groups=tuple(groups))


@contextlib.contextmanager
def float32_without_tricks():
    """Kernels that give the same bits each time, and no TensorFloat-32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def no_waiting(device):
    """An error where the host waits for a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
