"""The one Accelerator of a process, and what the ranks agree on.

In: `RuntimeConfig` and the precision. Out: a `Runtime` that knows rank, world and device and holds
every collective that the package uses. Collectives are called on all ranks: agree, then act.

Two traps of Accelerate 1.15 shape this file. Without a GPU it stays single-process unless
`cpu=True` is passed, so that N launched processes each believe to be rank 0 of 1. And what a
launcher sets through the environment (precision, accumulation, DeepSpeed, FSDP) silently changes
the run, so a setting that differs from the config is refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.sharding import shard, sync_gradients

T = TypeVar("T")

MARGIN_S = 60  # that a collective waits longer than runtime.timeout_s


def has_accelerator(config: RuntimeConfig) -> bool:
    return config.device == "auto" and torch.accelerator.is_available()


def launcher_problems(precision: str) -> list[str]:
    """What the launcher's environment asks for and this config does not."""
    problems = []
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        problems.append(
            f"the launcher asks for mixed precision {asked} but training.precision={precision}; "
            f"leave the launcher's out, or set training.precision={asked}"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto"):
        problems.append(
            f"the launcher asks for gradient_accumulation_steps={accumulation}; "
            "accumulation is set by training.microbatch_size"
        )
    for name, remedy in (
        ("ACCELERATE_USE_DEEPSPEED", "vae_dist trains with DDP; launch without DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "launch without --use_fsdp and set runtime.parallel=fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "vae_dist trains with DDP; launch without Megatron-LM"),
    ):
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            problems.append(f"{name}={os.environ[name]} is set by the launcher; {remedy}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if world > 1 and missing:
        problems.append(
            f"WORLD_SIZE={world} is set but {', '.join(missing)} not: these processes cannot find "
            "each other and each would train alone; start them with `accelerate launch --multi_gpu "
            f"--num_processes {world} -m vae_dist.train ...` or unset WORLD_SIZE"
        )
    return problems


class Runtime:
    """Rank facts and collectives of one process."""

    def __init__(self, accelerator: Accelerator, *, parallel: str = "ddp") -> None:
        self.accelerator = accelerator
        self.is_sharded = parallel == "fsdp" and accelerator.num_processes > 1
        self.device = accelerator.device
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.is_main = accelerator.is_main_process

    @classmethod
    def start(
        cls, config: RuntimeConfig, *, precision: str, launcher_decides_nothing: bool = False
    ) -> Runtime:
        """Join the other ranks. Raises ConfigError where launcher and config disagree.

        `launcher_decides_nothing`: what the launcher says of training has no bearing here.
        """
        if launcher_decides_nothing:
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        if problems := launcher_problems(precision):
            raise ConfigError(problems)
        if precision == "fp16" and not has_accelerator(config):
            raise ConfigError("training.precision=fp16 needs a GPU; use bf16 or no on CPU")
        accelerator = Accelerator(
            cpu=not has_accelerator(config),
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # microbatches are accumulated by the training step
            kwargs_handlers=[
                # later than training's own watch, which can say whom the others wait for
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s + MARGIN_S)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes != launched:
            raise ConfigError(
                f"WORLD_SIZE={launched} processes were launched but Accelerate runs "
                f"{accelerator.num_processes}: each would train alone; launch with `accelerate "
                f"launch --multi_gpu --num_processes {launched}` (without --cpu), or with torchrun"
            )
        if accelerator.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
            cores = cores or os.cpu_count() or 1
            # `accelerate launch` exports OMP_NUM_THREADS=1, which halves the speed of two cores
            torch.set_num_threads(config.threads or max(1, cores // local))
        elif config.threads:
            torch.set_num_threads(config.threads)
        return cls(accelerator, parallel=config.parallel)

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on the device, wrapped for training: DDP or FSDP, autocast in its forward.

        Both average gradients over the ranks. FSDP cuts the model itself, in place.
        """
        if self.is_sharded:
            shard(model)
            return self.accelerator.prepare_model(model, evaluation_mode=True)  # autocast alone
        return self.accelerator.prepare_model(model)

    @contextmanager
    def accumulating(self, wrapped: torch.nn.Module, *, is_last: bool) -> Iterator[None]:
        """Around the forward and backward of a microbatch: the last one sums over the ranks."""
        if self.is_sharded:
            sync_gradients(wrapped, wanted=is_last)
            yield
        else:
            with nullcontext() if is_last else self.accelerator.no_sync(wrapped):
                yield

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks, on every rank."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        return bool(self.sum_over_ranks(torch.tensor(float(flag))).item())

    def broadcast(self, value: T) -> T:
        """The main process' value, on every rank. For small objects of our own making."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def places(self) -> list[str]:
        """Where each rank sits, one line a host, on every rank."""
        device = self.device.type
        if device == "cuda":
            device = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        hosts: dict[str, list[str]] = {}
        for rank, (host, place) in enumerate(self.gather((socket.gethostname(), device))):
            hosts.setdefault(host, []).append(f"rank {rank} {place}")
        return [f"on {host}: {', '.join(ranks)}" for host, ranks in hosts.items()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. For small objects of our own making."""
        values: list[T] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on the main process alone; its result, or its ConfigError, reaches every rank."""
        outcome: tuple[T | None, tuple[str, ...]] = (None, ())
        if self.is_main:
            try:
                outcome = (function(), ())
            except ConfigError as error:
                outcome = (None, tuple(error.problems))
        result, problems = self.broadcast(outcome)
        if problems:
            raise ConfigError(problems)
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def stop(self) -> None:
        """Leave the process group. The wrapped model must be gone: a live one can hang here."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
