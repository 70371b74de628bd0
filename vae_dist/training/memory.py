"""Memory and arithmetic of a training step, and the microbatch that fits.

The estimate runs one forward and backward of the VAE on torch's meta device, whose tensors have
shapes and no memory, and counts the bytes that are alive:

    bytes of a process = state + images of a microbatch * bytes of an image
    state = weights, gradients, Adam's two moments, average

Not in it: what kernels use inside, fragments of the allocator, the CUDA context, networks that
compare images (a tenth of an autoencoder's). So training.microbatch_size=auto leaves a margin, and
on CUDA it tries. Microbatches change memory and time, not results.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vae_dist.config.errors import CommandFailed, ConfigError
from vae_dist.config.resolve import images_per_slot
from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Group
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms, noise_shape
from vae_dist.training.optimizer import freeze_encoder
from vae_dist.training.step import TrainingStep

TRACED_IMAGES = 2  # GroupNorm refuses one image of one pixel
CPU_FRACTION = 0.5  # of the available memory: loader processes and their windows live in it too
GPU_FRACTION = 0.6  # of the free memory: the estimate is good to a third
PART_OF_16_BITS = {"cpu": 0.5, "cuda": 0.75}  # of float32's activations: CUDA keeps norms in it
STORED = {16: torch.uint16, 32: torch.float32}  # by data.bits, else uint8
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
    num, has_mask = TRACED_IMAGES, config.data.mask != "none"
    with torch.device("meta"):
        vae = build_vae(config, image_size)
        images = torch.empty(num, config.data.channels, *image_size)
        noise = torch.empty(noise_shape(config.objective, num, vae.latent_shape(*image_size)))
        labels = torch.empty(num, dtype=torch.int64) if config.model.num_classes else None
        mask = torch.empty(num, 1, *image_size, dtype=torch.uint8) if has_mask else None
    if config.training.train_only == "decoder":
        freeze_encoder(vae)
    trained = [p for p in vae.parameters() if p.requires_grad]
    is_float32 = config.training.precision == "no"
    part = 1.0 if is_float32 else PART_OF_16_BITS[device.type]
    copies = 0.0 if is_float32 else 0.5  # of the weights, for autocast
    num_values = sum(tensor.numel() for tensor in (*vae.parameters(), *vae.buffers()))
    state_bytes = int(4 * (2 + copies) * num_values) + 12 * sum(p.numel() for p in trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    more = {"half_size": True} if config.objective.scale_equivariance else {}
    with _Meter() as meter:
        result = vae(images, noise, labels, mask, **more)
        output, half_size = result if more else (result, None)
        loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
        forward_flops = meter.flops
        del result, output, half_size  # as a step lets go of them
        loss.backward()
    return StepCost(
        forward_flops=forward_flops / num,
        step_flops=meter.flops / num,
        state_bytes=state_bytes,
        image_bytes=int(part * meter.peak_bytes / num),
    )


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


def largest_that_fits(config: TrainConfig, runtime: Runtime, cost: StepCost) -> int:
    """The largest candidate whose estimate every rank has memory for. Every rank takes part."""
    available = min(runtime.gather(free_bytes(runtime.device)))
    sizes = candidates(config, runtime.world)
    return next((size for size in sizes if cost.peak_bytes(size) <= available), sizes[-1])


def largest_that_runs(
    step: TrainingStep, image_size: tuple[int, int], features: tuple[int, ...]
) -> int:
    """The largest candidate of images of (H, W) pixels whose forward and backward every rank has
    memory for. Tried on the device, from the whole share of a rank on, each time half of it.

    features: shape of an image's, if they come along. Raises ConfigError where not one slot fits.
    """
    sizes = candidates(step.config, step.runtime.world)
    while sizes and step.runtime.any_rank(not _runs(step, sizes[0], image_size, features)):
        sizes = [size for size in sizes if size <= sizes[0] // 2]
    if not sizes:
        raise ConfigError(
            f"training.microbatch_size=auto: not even the {images_per_slot(step.config)} images of "
            "one slot (training.batch_size / data.slots) fit into the memory of every device; "
            "choose a smaller model or resolution, or more slots"
        )
    return sizes[0]


def _runs(
    step: TrainingStep, num: int, image_size: tuple[int, int], features: tuple[int, ...]
) -> bool:
    data = step.config.data
    group = Group(
        tuple(range(num // images_per_slot(step.config))),
        torch.zeros(num, data.channels, *image_size, dtype=STORED.get(data.bits, torch.uint8)),
        torch.zeros(num, dtype=torch.int64),
        torch.ones(num, 1, *image_size, dtype=torch.uint8) if data.mask != "none" else None,
        torch.zeros(num, *features, dtype=torch.float16) if features else None,
    )
    try:
        step.rehearse(group)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        step.forget()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()


# the host's memory


@contextlib.contextmanager
def memory_explained(knob: str) -> Iterator[None]:
    """Raises CommandFailed, which names the knob, where memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and "allocate memory" not in str(error):  # torch's and fork's on a CPU
            raise
        words = str(error).partition("\n")[0] or "MemoryError"
        raise CommandFailed(
            f"memory ran out ({words}); lower {knob}, then give the same command"
        ) from None


def keep_freed_memory() -> None:
    """Let the process keep the memory that a step on a CPU frees, for the next step.

    glibc returns large pieces to the kernel, which clears each page before it hands it out again:
    up to a third of a step. Loader processes must not inherit this, for each would hold what its
    largest image took: call it once they run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the end of the heap back
        mallopt(M_MMAP_MAX, 0)  # nor take large pieces as mappings of their own
