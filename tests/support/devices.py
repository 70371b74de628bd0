"""Devices that a test runs on: the CPU always, a CUDA device where there is one (`-m gpu`)."""

import contextlib

import pytest
import torch

from tests.support.distributed import reset_accelerate
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime

NEEDS_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
)
CUDA = pytest.param("cuda", marks=NEEDS_CUDA)
# What is shown on CUDA is shown on the CPU as well, so that the test itself is tested everywhere.
DEVICES = ["cpu", CUDA]


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
