"""How the arithmetic of a run is carried out: torch.compile, memory layout, TensorFloat-32.

In: the resolved config and the device. Out: whether the towers are compiled and lie channels last,
and a model to which that was done. None of it changes a run's numbers but by rounding, as another
number of processes does, so all of it may differ when a run is resumed. Weights keep their names.

Encoder and decoder are compiled one by one, for fixed shapes: what lies between them (draws, terms
of the loss, hooks on gradients) stays as it is. Or each block of theirs is: blocks of the same form
share their code, so that of a deep tower little has to be compiled, but what lies between blocks is
not fused. Averaged weights are evaluated without compilation, which would be of one more shape and
in float32. FSDP is not compiled.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vae_dist.config.resolve import COMPILED, SIXTEEN_BITS
from vae_dist.config.schema import TrainConfig
from vae_dist.models.blocks import Block


def compiler_problem(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "there is no Triton for this device (pip install triton)"
        names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]  # for Triton's launchers
    if not any(name and shutil.which(name) for name in names):
        return f"there is no C++ compiler ({' or '.join(filter(None, names))} in PATH; or set CXX)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"there is no {header} (install Python's headers, for example python3-dev)"
    return None


def num_shapes(config: TrainConfig, *, num_buckets: int, microbatch_size: int) -> int:
    """Forms of its input that a compiled part may see: sizes times numbers of images of a
    microbatch, at half size too, and with the decoder watched for a discriminator or not."""
    per_slot = config.training.batch_size // max(1, config.data.slots)
    together = max(1, microbatch_size // per_slot)
    shapes = num_buckets * together if num_buckets else 2  # the last microbatch may be smaller
    if config.objective.scale_equivariance:
        shapes *= 2
    return shapes * 2 if config.adversarial.weight else shapes


def lay_out(model: nn.Module, config: TrainConfig) -> None:
    """The weights in the memory layout of the config, in place."""
    if config.runtime.channels_last == "true":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_towers(model: nn.Module, config: TrainConfig, *, num_shapes: int) -> None:
    """Compile the towers, or their blocks, as runtime.compile says; in place.

    Compilation itself comes with the first forward of each shape. What meets more shapes than were
    foreseen goes on without compilation.
    """
    if config.runtime.compile not in COMPILED:
        return
    import torch._dynamo  # half a second

    parts = Block if config.runtime.compile == "blocks" else None
    regions = [
        region
        for tower in model.children()
        if any(tower.children())
        for region in (tower.modules() if parts else [tower])
        if parts is None or isinstance(region, parts)
    ]
    # regions of one class share their code
    options = torch._dynamo.config
    limit = num_shapes * len(regions) + 2
    options.recompile_limit = max(limit, options.recompile_limit)
    options.accumulated_recompile_limit = max(limit, options.accumulated_recompile_limit)
    for region in regions:
        region.compile(dynamic=False)


def use_tensor_float_32(device: torch.device, precision: str) -> None:
    """On CUDA: products of float32 parts in TensorFloat-32 where the rest is in 16 bits anyway;
    with precision=no float32 is float32, convolutions included."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision in SIXTEEN_BITS
        torch.backends.cudnn.allow_tf32 = precision in SIXTEEN_BITS


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Without TensorFloat-32, for figures that are reported."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
