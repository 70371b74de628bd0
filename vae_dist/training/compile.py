"""How the arithmetic of a run is carried out: torch.compile, memory layout, TensorFloat-32.

None of it changes a run's numbers but by rounding, as another number of processes does, so all of
it may differ when a run is resumed. Weights keep their names.

Encoder and decoder are compiled one by one, for fixed shapes: what lies between them (draws, terms
of the loss, hooks on gradients) stays as it is. Or each block of theirs is: blocks of the same form
share their code, so that of a deep tower little has to be compiled, but what lies between blocks is
not fused. Averaged weights are evaluated without compilation. FSDP is not compiled.
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

MAX_FORMS = 4096  # of input that one piece of code is compiled for


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


def compile_towers(model: nn.Module, config: TrainConfig) -> None:
    """Compile the towers, or their blocks, as runtime.compile says, in place. The first forward of
    each shape compiles it."""
    if config.runtime.compile not in COMPILED:
        return
    import torch._dynamo  # half a second

    towers = [tower for tower in model.children() if any(tower.children())]
    regions: list[nn.Module] = towers
    if config.runtime.compile == "blocks":
        regions = [part for tower in towers for part in tower.modules() if isinstance(part, Block)]
    # buckets, half sizes, last microbatches, and blocks of one class, which share its code
    torch._dynamo.config.recompile_limit = MAX_FORMS
    torch._dynamo.config.accumulated_recompile_limit = MAX_FORMS
    for region in regions:
        region.compile(dynamic=False)


def use_tensor_float_32(device: torch.device, precision: str) -> None:
    """On CUDA: products of float32 parts in TensorFloat-32 where the rest is in 16 bits anyway;
    with precision=no float32 is float32, convolutions included."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision in SIXTEEN_BITS
        torch.backends.cudnn.allow_tf32 = precision in SIXTEEN_BITS


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TensorFloat-32 on CUDA, for figures that are reported."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
