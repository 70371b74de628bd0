"""Trials before the first step: how many images fit into one forward, whether compilation is right.

In: the resolved config, the free memory of each process. Out: a number of images, the same on all
ranks, by the estimate of the step (`vae_dist.estimate`). On a GPU a trial follows, a forward and
backward of that many images; where it runs out of memory on any rank, fewer are tried. Microbatches
change memory and time, not results.
"""

from __future__ import annotations

import copy
import math
import os

import psutil
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.config.resolve import COMPILED, has_buckets
from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Group
from vae_dist.distributed import Runtime
from vae_dist.estimate import step_cost
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.training.compile import decompile, uncompiled
from vae_dist.training.step import TrainingStep

# Part of the free memory that the estimate may fill: kernels need some of their own, and on a host
# loader processes and their windows live in it too.
GPU_FRACTION = 0.85
CPU_FRACTION = 0.5

_STORED = {16: torch.uint16, 32: torch.float32}  # by data.bits; else uint8

# Of a compiled gradient against the plain one: bfloat16 rounds by 1%, an error is of order 1.
MAX_ROUNDING = 0.2
MIN_SHARE = 1e-3  # of the largest norm: gradients below it are rounding themselves


def candidates(config: TrainConfig, world: int) -> list[int]:
    """Images of a microbatch, from the whole share of a rank down to one slot: the even cuts."""
    slots = config.data.slots // world
    per_slot = config.training.batch_size // config.data.slots
    if has_buckets(config) and config.runtime.compile in COMPILED:
        return [per_slot]  # each number of slots would be compiled for each bucket
    return sorted(
        {math.ceil(slots / cuts) * per_slot for cuts in range(1, slots + 1)}, reverse=True
    )


def free_bytes(device: torch.device) -> int:
    """That this process may fill: its device's, or its share of the host's available memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_FRACTION)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * CPU_FRACTION / local)


def fitting_microbatch(
    config: TrainConfig, image_size: tuple[int, int], runtime: Runtime
) -> TrainConfig:
    """A copy in which training.microbatch_size is a number. Every rank takes part.

    `image_size` is that of the largest images, (H, W) pixels.
    """
    if config.training.microbatch_size != "auto":
        return config
    config = copy.deepcopy(config)
    config.training.microbatch_size = 0
    sizes = candidates(config, runtime.world)
    # bytes grow by the same number with each image
    few, more = (step_cost(config, image_size, runtime.device, num_images=n) for n in (2, 4))
    per_image = (more.peak_bytes - few.peak_bytes) / 2 or more.saved_bytes / 4
    fixed = few.peak_bytes - 2 * per_image
    room = min(runtime.gather(free_bytes(runtime.device))) - fixed
    config.training.microbatch_size = next(
        (size for size in sizes if size * per_image <= room), sizes[-1]
    )
    return config


def try_microbatch(step: TrainingStep, image_size: tuple[int, int]) -> int:
    """The largest candidate up to the config's that one forward and backward has memory for.

    Nothing is updated, and no gradient is left. Every rank takes part, and none waits for another
    while it tries. Raises ConfigError where not even one slot fits.
    """
    config, runtime = step.config, step.runtime
    largest = int(config.training.microbatch_size)
    sizes = [size for size in candidates(config, runtime.world) if size <= largest]
    while sizes:
        if not runtime.any_rank(not _fits(step, sizes[0], image_size)):
            return sizes[0]
        sizes = [size for size in sizes if size <= sizes[0] // 2]
    raise ConfigError(
        f"training.microbatch_size=auto: not even the {config.training.batch_size} / "
        f"{config.data.slots} images of one slot (training.batch_size / data.slots) fit into the "
        "memory of every device; choose a smaller model or resolution, or more slots"
    )


def check_compiled(step: TrainingStep, image_size: tuple[int, int], *, is_asked: bool) -> str:
    """Compare the gradients of compiled and plain towers on one microbatch of noise; nothing is
    updated. Where they differ by more than rounding, the towers go on without compilation, and
    what is returned says why; empty when all is well. With `is_asked` it is a ConfigError.

    torch 2.13 leaves gradients of some layers at zero when it compiles a decoder for bfloat16 on
    CPU: a loss does not show it.
    """
    share = step.config.training.batch_size // step.runtime.world
    num_images = int(step.config.training.microbatch_size) or share
    with uncompiled(step.vae):
        expected = _gradients(step, num_images, image_size)
    found = _gradients(step, num_images, image_size)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    wrong = [
        name
        for name, gradient in expected.items()
        if float((found.get(name, 0.0) - gradient).norm())
        > MAX_ROUNDING * max(float(gradient.norm()), MIN_SHARE * largest)
    ]
    problems = [names for names in step.runtime.gather(wrong) if names]
    if not problems:
        return ""
    sentence = (
        f"torch.compile gets {len(problems[0])} gradients wrong on this machine "
        f"({', '.join(problems[0][:3])})"
    )
    if is_asked:
        asked = step.config.runtime.compile
        raise ConfigError(f"runtime.compile={asked}: {sentence}; set runtime.compile=false")
    decompile(step.vae)
    return sentence + "; the towers run without compilation"


def _gradients(
    step: TrainingStep, num_images: int, image_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    step.optimizer.zero_grad(set_to_none=True)
    _rehearse(step, num_images, image_size)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in step.vae.named_parameters()
        if parameter.grad is not None
    }
    step.optimizer.zero_grad(set_to_none=True)
    return gradients


def _fits(step: TrainingStep, num_images: int, image_size: tuple[int, int]) -> bool:
    try:
        # compiled towers hold no more, and each size that is tried would be compiled
        with uncompiled(step.vae):
            _rehearse(step, num_images, image_size, with_pictures=True)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    if step.pictures is not None:
        step.pictures.rest()
    step.optimizer.zero_grad(set_to_none=True)
    if step.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _rehearse(
    step: TrainingStep, num_images: int, image_size: tuple[int, int], *, with_pictures: bool = False
) -> None:
    """Forward and backward of noise; `with_pictures`: of the terms that compare pictures too, as
    in a step in which the discriminator is heard."""
    config, device = step.config, step.runtime.device
    latent = step.vae.latent_shape(*image_size)
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, config.data.channels, *image_size)
    images = (2 * torch.rand(shape, generator=generator) - 1).to(device)
    noise = torch.randn(noise_shape(config.objective, num_images, latent), generator=generator)
    noise = noise.to(device)
    labels = mask = None
    if config.model.num_classes:
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
    if config.data.mask != "none":
        mask = torch.ones(num_images, 1, *image_size, dtype=torch.uint8, device=device)
    has_half_size = config.objective.scale_equivariance > 0
    more = {"half_size": True} if has_half_size else {}
    pictures = step.pictures if with_pictures else None
    if pictures is not None:
        pictures.begin(config.training.steps - 1)  # all terms are there in the last step
    # the optimizer's moments, which the first step makes
    moments = [torch.empty_like(p) for p in step.vae.parameters() for _ in range(2)]
    with step.runtime.strategy.accumulate(step.wrapped, is_last=False):  # sums over no ranks
        result = step.wrapped(images, noise, labels, mask, **more)
        output, half_size = result if has_half_size else (result, None)
        loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
        if pictures is not None:
            stored = torch.zeros(shape, dtype=_STORED.get(config.data.bits, torch.uint8))
            group = Group((0,), stored, torch.zeros(num_images, dtype=torch.int64))
            surrogate, _ = pictures.of_microbatch(output, images, group, step.loss_scale.scale)
            loss = loss + surrogate
        loss.backward()
    del moments
