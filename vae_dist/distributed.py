"""Ranks, their collectives, and how weights lie on them: replicated (DDP) or sharded (FSDP).

In: `RuntimeConfig` and the precision. Out: a `Runtime` that knows rank, world and device and holds
every collective of the package. They are called on all ranks: agree, then act. Small messages
(flags, errors, choices) go over gloo in CPU memory, so that they never wait for a device.

A sharded weight, its gradient, optimizer state and average are DTensors; the functions on tensors
below give the tensor itself where it is replicated, so that no other file asks. Checkpoints hold
full values.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from vae_dist.config.errors import ConfigError, name_ranks
from vae_dist.config.launcher import launcher_problems, precision_problem, threads_of_user
from vae_dist.config.schema import RuntimeConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# That a collective waits: the watch of training.stop ends a run that stalls, and one rank may index
# shards or compile for long while the others wait.
COLLECTIVE_TIMEOUT = timedelta(days=1)


class RankFailed(RuntimeError):
    """Another rank did not come, or failed with an unexpected error; the message names it."""


def has_accelerator(config: RuntimeConfig) -> bool:
    """Whether to compute on a GPU of CUDA or ROCm; Apple's MPS lacks the float64 of our sums."""
    return config.device == "auto" and torch.cuda.is_available()


def computes_bf16(config: RuntimeConfig) -> bool:
    """Whether the device computes in bfloat16; a CPU that emulates it is slower than float32."""
    return has_accelerator(config) or any(
        getattr(torch.cpu, name, bool)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


class Runtime:
    """Rank facts and collectives of one process."""

    def __init__(self, config: RuntimeConfig, state: PartialState) -> None:
        self.config = config
        self.device: torch.device = state.device
        if self.device.type == "cuda" and self.device.index is None:  # of one process alone
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.is_main: bool = state.is_main_process
        self.control: dist.ProcessGroup | None = None  # of messages in CPU memory; None: default
        if self.world > 1:
            dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
            if dist.get_backend() != "gloo":
                self.control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    @classmethod
    def start(cls, config: RuntimeConfig, *, precision: str) -> Runtime:
        """Join the other ranks and be ready to wrap models. Raises ConfigError, RankFailed."""
        runtime = cls.join(config)
        runtime.use_precision(precision)
        return runtime

    @classmethod
    def join(cls, config: RuntimeConfig) -> Runtime:
        """Join the other ranks. Raises ConfigError where launcher and config disagree, RankFailed
        where not all ranks come within runtime.timeout_s."""
        if problems := launcher_problems():
            raise ConfigError(problems)
        if config.device == "auto" and torch.backends.mps.is_available():
            raise ConfigError(
                "runtime.device=auto: Apple's MPS has no float64, which sums and evaluation use; "
                "set runtime.device=cpu"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            # without a GPU Accelerate stays single-process unless cpu=True is passed
            timeout = timedelta(seconds=config.timeout_s)
            state = PartialState(cpu=not has_accelerator(config), timeout=timeout)
        except dist.DistError as error:
            raise RankFailed(
                f"rank {os.environ['RANK']} on {socket.gethostname()}: not all {launched} ranks "
                f"met within {config.timeout_s:g} s (runtime.timeout_s); see the output of those "
                f"that did not start ({str(error).splitlines()[0]})"
            ) from None
        if state.num_processes != launched:
            raise ConfigError(
                f"WORLD_SIZE={launched} but Accelerate runs {state.num_processes}: each process "
                "would train alone; launch with `accelerate launch --multi_gpu --num_processes "
                f"{launched}` (without --cpu), or with torchrun"
            )
        asked = config.threads
        if state.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
            share = max(1, len(os.sched_getaffinity(0)) // local)
            asked = asked or threads_of_user() or share
        if asked:
            torch.set_num_threads(asked)
        return cls(config, state)

    def use_precision(self, precision: str) -> None:
        """Choose how models are wrapped. Raises ConfigError where the launcher asks for another
        precision."""
        if problem := precision_problem(precision):
            raise ConfigError(problem)
        accelerator = Accelerator(
            cpu=not has_accelerator(self.config),
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # microbatches are accumulated by the training step
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.replicated = Replicated(accelerator)
        self.strategy: Replicated = self.replicated
        if self.config.parallel == "fsdp" and self.world > 1:
            self.strategy = Sharded(accelerator, self)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, on every rank."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def sum_numbers(self, values: Sequence[Tensor], *more: float) -> list[float]:
        """Sums over the ranks of 0-dim tensors of this device and of numbers, in float64; waits
        for the device once."""
        parts = [value.double() for value in values]
        parts += torch.tensor(more, dtype=torch.float64).to(self.device).unbind()
        return self.sum_over_ranks(torch.stack(parts)).tolist()

    def any_rank(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        work, answer = self.ask_any_rank(flag)
        work.wait()
        return bool(answer.item())

    def ask_any_rank(self, flag: bool) -> tuple[dist.Work, Tensor]:
        """Begin `any_rank` between several ranks: after `wait()` the CPU tensor has the answer."""
        answer = torch.tensor(int(flag), dtype=torch.int32)
        work = dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        return work, answer

    def broadcast(self, value: T) -> T:
        """The main process' value, on every rank. For small objects of our own making."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The main process' tensors, in CPU memory, on every rank: one reads for all."""
        received = dict(tensors or {})
        if self.world == 1:
            return received
        kinds = {name: (value.shape, value.dtype) for name, value in received.items()}
        for name, (shape, dtype) in self.broadcast(kinds).items():
            if not self.is_main:
                received[name] = torch.empty(shape, dtype=dtype)
            dist.broadcast(received[name], src=0, group=self.control)
        return received

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. For small objects of our own making."""
        values: list[T] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def hosts(self) -> list[str]:
        """The ranks and devices of each host, one line a host, on every rank."""
        device = self.device.type
        if device == "cuda":
            device = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        hosts: dict[str, list[str]] = {}
        for rank, (host, place) in enumerate(self.gather((socket.gethostname(), device))):
            hosts.setdefault(host, []).append(f"rank {rank} {place}")
        return [f"on {host}: {', '.join(ranks)}" for host, ranks in hosts.items()]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on the main process alone; its result, or its error, reaches every rank."""
        return self.broadcast(self._run_on(range(1), function))

    def on_all_ranks(self, function: Callable[[], T]) -> T:
        """Run on every rank; an error on some is raised on all. A ConfigError (or OSError) is that
        of the first rank and names all that had one; any other is RankFailed on other ranks."""
        return self._run_on(range(self.world), function)

    def _run_on(self, ranks: range, function: Callable[[], T]) -> T:
        result: T | None = None
        own: Exception | None = None
        try:
            result = function() if self.rank in ranks else None
        except Exception as error:
            own = error
        sent = enumerate(self.gather(_for_others(own, self.rank) if own else None))
        failed = {rank: one for rank, one in sent if one is not None}
        if own is not None and not isinstance(own, ConfigError | OSError):
            raise own
        problems: list[str] = []
        for one in failed.values():
            if isinstance(one, RankFailed):
                raise one
            problems = problems or [*one.problems]
        if problems:
            who = "" if len(failed) == len(ranks) else f"{name_ranks([*failed])}: "
            raise ConfigError([who + problems[0], *problems[1:]])
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def stop(self) -> None:
        """Leave the process group. The wrapped model must be gone: a live one can hang here."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


# how weights lie on the ranks


class Replicated:
    """One process, or DDP: every rank holds all weights, and gradients are averaged over them."""

    forward_is_local = True  # one rank may run or fail in a forward without the others

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on the device, ready for training, with autocast in its forward."""
        return self._accelerator.prepare_model(model)

    def accumulate(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of a microbatch: the last one sums over the ranks."""
        return nullcontext() if is_last else self._accelerator.no_sync(wrapped)

    def full_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full values, on the main process at least. Every rank takes part."""
        return dict(tensors)


class Sharded(Replicated):
    """FSDP: each rank holds its part of every weight, and gathers them where they are used."""

    forward_is_local = False

    def __init__(self, accelerator: Accelerator, runtime: Runtime) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(accelerator)
        self._is_main = runtime.is_main
        # without a mesh torch takes the machine's accelerator, also where runtime.device=cpu
        self._mesh = init_device_mesh(runtime.device.type, (runtime.world,))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shards the model in place: by child of its towers, then what remains. Parameters that
        are used together are gathered together, and released after their use."""
        from torch.distributed.fsdp import fully_shard  # half a second that only FSDP needs

        towers = [tower for tower in model.children() if any(tower.children())]
        for tower in towers:
            for part in tower.children():
                # a list has no forward whose start could gather its parameters: its items have
                modules = part.children() if isinstance(part, nn.ModuleList) else [part]
                for module in modules:
                    if any(p.requires_grad for p in module.parameters()):
                        fully_shard(module, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        return self._accelerator.prepare_model(model, evaluation_mode=True)  # autocast alone

    def accumulate(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(wrapped, FSDPModule)
        wrapped.set_requires_gradient_sync(is_last)
        return nullcontext()

    def full_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, tensor in tensors.items():
            value = full_value(tensor)
            if self._is_main:
                full[name] = value.cpu()  # one at a time: the device need not hold all of them
        return full


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # a second to import; FSDP has done so
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part; shares memory with the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_value(tensor: Tensor) -> Tensor:
    """The full tensor. Every rank takes part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """A full value laid out on the ranks as `like` is. Sends no message."""
    full = full.to(like.device)
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def load_full(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy full values into a module, sharded or not.

    Raises RuntimeError with the names whose shape differs or that only one side has.
    """
    state = module.state_dict()
    shapes = [{k: tuple(v.shape) for k, v in one.items()} for one in (tensors, state)]
    if names := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise RuntimeError(f"{len(names)} differ: {', '.join(names[:8])}")
    with torch.no_grad():
        for name, value in state.items():
            local_part(value).copy_(local_part(part_like(tensors[name], value)))


def _for_others(error: Exception, rank: int) -> ConfigError | RankFailed:
    """An error of this rank as it is sent to all."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return ConfigError(
            f"{place}{error.strerror or error} (on {socket.gethostname()}); see to that disk or "
            "network, then give the same command again"
        )
    if isinstance(error, ConfigError):
        return error
    return RankFailed(f"rank {rank}: {type(error).__name__}: {error}")
