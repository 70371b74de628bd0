"""Memory and arithmetic of a training step, and the microbatch that fits.

The estimate runs one forward and backward on torch's meta device, whose tensors have shapes and no
memory, and counts the bytes that are alive:

    bytes of a process = state + images of a microbatch * bytes of an image
    state = weights, gradients, Adam's two moments, average

Not in it: what kernels use inside, fragments of the allocator and the CUDA context. So
training.microbatch_size=auto on CUDA does not ask it: it tries. Microbatches change memory and
time, not results.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.resolve import images_per_slot
from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Group
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_vae
from vae_dist.models.discriminator import build_discriminator
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.objectives.perceptual import build_perceptual
from vae_dist.training.optimizer import freeze_encoder
from vae_dist.training.step import TrainingStep

TRACED_IMAGES = 2  # GroupNorm refuses one image of one pixel
CPU_FRACTION = 0.5  # of the available memory: loader processes and their windows live in it too
GPU_FRACTION = 0.85  # of the free memory: kernels need some of their own
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class StepCost:
    """Of a training step of one process; operations are those of products and convolutions."""

    forward_flops: float  # of one image, of the VAE alone
    step_flops: float  # with the backward, and what checkpointing computes again
    state_bytes: int
    image_bytes: int  # of one image of a microbatch

    def peak_bytes(self, num_images: int) -> int:
        """About, at the worst moment of a step with microbatches of `num_images`."""
        return self.state_bytes + num_images * self.image_bytes


def step_cost(config: TrainConfig, image_size: tuple[int, int], device: torch.device) -> StepCost:
    """Of images of (H, W) pixels. `device` says what autocast does; nothing is computed on it."""
    with torch.device("meta"):
        vae = build_vae(config, image_size)
        images, noise, labels, mask = _inputs(config, vae.latent_shape(*image_size), image_size)
        perceptual = build_perceptual(config.perceptual, torch.device("meta"))
        critic = nn.Module()
        if config.adversarial.weight:
            channels = config.data.channels
            critic = build_discriminator(
                config.adversarial, image_channels=channels, seed=config.seed
            )
    if config.training.train_only == "decoder":
        freeze_encoder(vae)
    trained = [p for p in vae.parameters() if p.requires_grad]
    state_bytes = 2 * _num_bytes(vae) + 3 * sum(4 * p.numel() for p in trained)
    state_bytes += 4 * _num_bytes(critic.requires_grad_(False))
    if perceptual is not None:
        state_bytes += _num_bytes(perceptual.distance)
    for network in (vae, critic):
        state_bytes += _lower(network, device, config.training.precision)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    more = {"half_size": True} if config.objective.scale_equivariance else {}
    with _Meter() as meter:
        result = vae(images, noise, labels, mask, **more)
        output, half_size = result if more else (result, None)
        loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
        forward_flops = meter.flops
        means = vae.likelihood.mean(output.params)
        leaf = means.detach().requires_grad_()
        if perceptual is not None:
            (gradient,) = torch.autograd.grad(perceptual(leaf, images).sum(), leaf)
            loss = loss + (means * gradient).sum()
        if config.adversarial.weight:
            (gradient,) = torch.autograd.grad(critic(leaf).float().sum(), leaf)
            loss = loss + (means * gradient).sum()
        flops_of_terms = meter.flops - forward_flops
        del result, output, half_size, means, leaf  # as a step lets go of them
        loss.backward()
    return StepCost(
        forward_flops=forward_flops / TRACED_IMAGES,
        step_flops=(meter.flops - flops_of_terms) / TRACED_IMAGES,
        state_bytes=state_bytes,
        image_bytes=meter.peak_bytes // TRACED_IMAGES,
    )


def _inputs(
    config: TrainConfig, latent: tuple[int, ...], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Images, noise, labels and mask of TRACED_IMAGES, as the model takes them."""
    num = TRACED_IMAGES
    labels = torch.empty(num, dtype=torch.int64) if config.model.num_classes else None
    has_mask = config.data.mask != "none"
    mask = torch.empty(num, 1, *image_size, dtype=torch.uint8) if has_mask else None
    images = torch.empty(num, config.data.channels, *image_size)
    return images, torch.empty(noise_shape(config.objective, num, latent)), labels, mask


def _num_bytes(module: nn.Module) -> int:
    return 4 * sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _lower(network: nn.Module, device: torch.device, precision: str) -> int:
    """Give the layers the types that autocast computes them in; the meta device has none.

    Out: bytes of the copies of weights that autocast makes.
    """
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    num_bytes = 0
    for layer in network.modules() if lower is not None else ():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            is_kept = isinstance(layer, nn.GroupNorm) and device.type == "cuda"
            layer.to(torch.float32 if is_kept else lower)
            layer.register_forward_pre_hook(lambda one, xs: xs[0].to(one.weight.dtype))
            num_bytes += 0 if is_kept else _num_bytes(layer) // 2
    return num_bytes


class _Meter(TorchDispatchMode):
    """Counts operations of products and convolutions, and the bytes of the tensors that are alive.

    Not torch's FlopCounterMode: its hooks keep what checkpointing computes again alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()  # storages that are counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        given = {storage._cdata for storage in _storages(args)}
        for storage in _storages(result):
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in given | self._known:  # a view takes nothing
                self._known.add(key)
                self.live_bytes += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._release, key, num_bytes).atexit = False
        return result

    def _release(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [part.untyped_storage() for part in tree_leaves(tree) if isinstance(part, Tensor)]


# the microbatch


def candidates(config: TrainConfig, world: int) -> list[int]:
    """Images of a microbatch, from the whole share of a rank down to one slot: the even cuts."""
    slots, per_slot = config.data.slots // world, images_per_slot(config)
    return sorted({math.ceil(slots / cuts) * per_slot for cuts in range(1, slots + 1)})[::-1]


def free_bytes(device: torch.device) -> int:
    """That this process may fill: of its device, or its share of the host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_FRACTION)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * CPU_FRACTION / local)


def estimated_microbatch(config: TrainConfig, cost: StepCost, runtime: Runtime) -> int:
    """The largest candidate whose estimate every rank has memory for, else the smallest. Every
    rank takes part."""
    available = min(runtime.gather(free_bytes(runtime.device)))
    sizes = candidates(config, runtime.world)
    return next((size for size in sizes if cost.peak_bytes(size) <= available), sizes[-1])


def fit_microbatch(step: TrainingStep, image_size: tuple[int, int]) -> None:
    """Give the step a number where training.microbatch_size=auto. Every rank takes part.

    `image_size`: (H, W) of the largest images. On CUDA each candidate is tried, forward and
    backward, from the whole share of a rank on; while one runs out of memory on any rank, half of
    it is next. Raises ConfigError where not even one slot fits.
    """
    config, runtime = step.config, step.runtime
    if config.training.microbatch_size != "auto":
        return
    # where the forward of one rank waits for the others, one without memory would stop them
    if runtime.device.type != "cuda" or not runtime.strategy.forward_is_local:
        cost = step_cost(config, image_size, runtime.device)
        step.microbatch_size = estimated_microbatch(config, cost, runtime)
        return
    sizes = candidates(config, runtime.world)
    while sizes and runtime.any_rank(not _fits(step, sizes[0], image_size)):
        sizes = [size for size in sizes if size <= sizes[0] // 2]
    if not sizes:
        raise ConfigError(
            f"training.microbatch_size=auto: not even the {images_per_slot(config)} images of one "
            "slot (training.batch_size / data.slots) fit into the memory of every device; choose "
            "a smaller model or resolution, or more slots"
        )
    step.microbatch_size = sizes[0]


def _fits(step: TrainingStep, num_images: int, image_size: tuple[int, int]) -> bool:
    data = step.config.data
    stored = {16: torch.uint16, 32: torch.float32}.get(data.bits, torch.uint8)
    group = Group(
        tuple(range(num_images // images_per_slot(step.config))),
        torch.zeros(num_images, data.channels, *image_size, dtype=stored),
        torch.zeros(num_images, dtype=torch.int64),
        torch.ones(num_images, 1, *image_size, dtype=torch.uint8) if data.mask != "none" else None,
        torch.zeros(num_images, *step.features, dtype=torch.float16) if step.features else None,
    )
    try:
        step.rehearse(group)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        step.forget()
        if step.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


# the host's memory


@contextlib.contextmanager
def memory_explained(knob: str) -> Iterator[None]:
    """Raises CommandFailed, which names the knob, where memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        words = str(error).partition("\n")[0]
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and "allocate memory" not in words:  # as torch and fork say of a CPU's
            raise
        raise CommandFailed(
            f"memory ran out ({words or 'MemoryError'}); lower {knob}, then give the same command"
        ) from None


def keep_freed_memory() -> None:
    """Let the process keep the memory that a step on a CPU frees, for the next step.

    glibc returns large pieces to the kernel, which clears each page before it hands it out again:
    up to a third of a step. Loader processes must not inherit this, for each would hold what its
    largest image took: call it once they run. An environment that sets up malloc is left alone.
    """
    is_set_up = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if sys.platform == "linux" and not is_set_up and mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the end of the heap back
        mallopt(M_MMAP_MAX, 0)  # nor take large pieces as mappings of their own
