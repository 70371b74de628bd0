"""The one Accelerator of a process, and what the ranks agree on.

In: `RuntimeConfig` and the precision. Out: a `Runtime` that knows rank, world and device and holds
every collective that the package uses. Collectives are called on all ranks: agree, then act. What
goes wrong on one rank before training is raised on all of them (`together`, `on_main`).

Small messages between the hosts (flags, errors, choices) go over gloo in CPU memory, whatever the
backend of the gradients is: they never wait for a device.

Two traps of Accelerate 1.15 shape this file. Without a GPU it stays single-process unless
`cpu=True` is passed, so that N launched processes each believe to be rank 0 of 1. And what a
launcher sets through the environment (precision, accumulation, DeepSpeed, FSDP) silently changes
the run, so a setting that differs from the config is refused.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.heap import keep_freed_memory
from vae_dist.sharding import shard, sync_gradients

T = TypeVar("T")

LAST_S = 2  # that rank 0 waits longer for ranks that do not come
STOP_POLL_S = 0.2  # between two looks for a request to stop, while ranks are waited for
MARGIN_S = 60  # that a collective waits longer than runtime.timeout_s


class RankFailed(RuntimeError):
    """Another rank did not come, or failed in a way that nobody foresaw; the message names it."""


class StoppedWaiting(RuntimeError):
    """This process was asked to stop before the ranks had met; the message is the reason."""


def has_accelerator(config: RuntimeConfig) -> bool:
    return config.device == "auto" and torch.accelerator.is_available()


def computes_bf16(config: RuntimeConfig) -> bool:
    """Whether this process trains on a device that computes in bfloat16; a CPU without it emulates
    it, several times slower than float32."""
    return has_accelerator(config) or any(
        getattr(torch.cpu, name, bool)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def precision_problem(precision: str) -> str | None:
    """Why the launcher's precision is not this config's, or None when it is."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", precision):
        return None
    return (
        f"the launcher asks for mixed precision {asked} but training.precision={precision}; "
        f"leave the launcher's out, or set training.precision={asked}"
    )


def launcher_problems() -> list[str]:
    """What the launcher's environment asks for and vae_dist does not do."""
    problems = []
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

    def __init__(self, config: RuntimeConfig, state: PartialState) -> None:
        self.config = config
        self.is_sharded = config.parallel == "fsdp" and state.num_processes > 1
        self.device: torch.device = state.device
        if self.device.type == "cuda" and self.device.index is None:  # of one process alone
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.is_main: bool = state.is_main_process
        self.control: dist.ProcessGroup | None = None  # of messages in CPU memory; None: default
        self._accelerator: Accelerator | None = None
        if self.world > 1 and dist.get_backend() != "gloo":
            self.control = dist.new_group(backend="gloo", timeout=_collective_timeout(config))

    @classmethod
    def start(
        cls, config: RuntimeConfig, *, precision: str, launcher_decides_nothing: bool = False
    ) -> Runtime:
        """Join the other ranks and be ready to train. Raises ConfigError, RankFailed.

        `launcher_decides_nothing`: what the launcher says of training has no bearing here.
        """
        if launcher_decides_nothing:
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        runtime = cls.join(config)
        runtime.use_precision(precision)
        return runtime

    @classmethod
    def join(cls, config: RuntimeConfig, *, stop_reason: Callable[[], str] = str) -> Runtime:
        """Join the other ranks. Raises ConfigError where launcher and config disagree, RankFailed
        with the names of ranks that have not come after runtime.timeout_s, and StoppedWaiting when
        `stop_reason` is not empty before."""
        if problems := launcher_problems():
            raise ConfigError(problems)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        roll_call = _roll_call(config.timeout_s, stop_reason) if launched > 1 else None
        state = PartialState(cpu=not has_accelerator(config), timeout=_collective_timeout(config))
        del roll_call  # its server, in rank 0, lives on in the process group
        if state.num_processes != launched:
            raise ConfigError(
                f"WORLD_SIZE={launched} processes were launched but Accelerate runs "
                f"{state.num_processes}: each would train alone; launch with `accelerate "
                f"launch --multi_gpu --num_processes {launched}` (without --cpu), or with torchrun"
            )
        if state.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
            cores = cores or os.cpu_count() or 1
            # `accelerate launch` exports OMP_NUM_THREADS=1, which halves the speed of two cores
            torch.set_num_threads(config.threads or max(1, cores // local))
            keep_freed_memory()
        elif config.threads:
            torch.set_num_threads(config.threads)
        return cls(config, state)

    def use_precision(self, precision: str) -> None:
        """Make the Accelerator, which wraps models. Raises ConfigError where the launcher asks for
        another precision."""
        if problem := precision_problem(precision):
            raise ConfigError(problem)
        self._accelerator = Accelerator(
            cpu=not has_accelerator(self.config),
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # microbatches are accumulated by the training step
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    @property
    def accelerator(self) -> Accelerator:
        assert self._accelerator is not None, "use_precision comes first"
        return self._accelerator

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

    def sum_numbers(self, values: Sequence[torch.Tensor], *more: float) -> list[float]:
        """Sums over the ranks of 0-dim tensors of this device and of numbers, in float64; waits
        for the device once."""
        if self.device.type == "cpu":  # reading a number waits for nothing there
            numbers = [*(float(value) for value in values), *more]
            if self.world == 1:
                return numbers
            return self.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()
        parts = [value.double() for value in values]
        parts += [
            torch.full((), number, dtype=torch.float64, device=self.device) for number in more
        ]
        return self.sum_over_ranks(torch.stack(parts)).tolist()

    def any_rank(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        work, answer = self.ask_any_rank(flag)
        work.wait()
        return bool(answer.item())

    def ask_any_rank(self, flag: bool) -> tuple[dist.Work, torch.Tensor]:
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
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on the main process alone; its result, or what goes wrong, reaches every rank."""
        attempt: _Attempt[T] = _attempt(function) if self.is_main else _Attempt()
        result, trouble = self.broadcast((attempt.result, attempt.trouble))
        if trouble is not None:
            raise _shared(attempt, {0: trouble}, num_asked=1)
        return result  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Run on every rank; what goes wrong on some is raised on all, with the ranks' names.

        A ConfigError (or OSError) becomes the same ConfigError everywhere. Any other error is
        raised as it is where it arose, and as RankFailed elsewhere.
        """
        attempt = _attempt(function)
        everyone = enumerate(self.gather(attempt.trouble))
        if troubles := {rank: trouble for rank, trouble in everyone if trouble is not None}:
            raise _shared(attempt, troubles, num_asked=self.world)
        return attempt.result  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def stop(self) -> None:
        """Leave the process group. The wrapped model must be gone: a live one can hang here."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _collective_timeout(config: RuntimeConfig) -> timedelta:
    """Later than the ranks' own watch, which can say whom the others wait for."""
    return timedelta(seconds=config.timeout_s + MARGIN_S)


# who is there


def _roll_call(timeout_s: float, stop_reason: Callable[[], str]) -> dist.TCPStore:
    """`_meet`, in a thread: it waits in C++, where a request to stop is not heard."""
    meeting: Future[dist.TCPStore] = Future()

    def meet() -> None:
        try:
            meeting.set_result(_meet(timeout_s))
        except BaseException as error:
            meeting.set_exception(error)

    threading.Thread(target=meet, name="roll-call", daemon=True).start()
    while not wait([meeting], STOP_POLL_S).done:
        if reason := stop_reason():
            raise StoppedWaiting(reason)
    return meeting.result()


def _meet(timeout_s: float) -> dist.TCPStore:
    """Wait until all ranks of the launcher's environment have come. Raises RankFailed.

    The backend's own rendezvous knows how many are missing, but not which.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"vae_dist/start{start}/rank{number}" for number in range(world)]
    # rank 0 leaves last: the others ask its store who is missing
    patience = timedelta(seconds=timeout_s + (LAST_S if rank == 0 else 0))
    try:
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=rank == 0 and not agent_has_store,
            timeout=patience,
            wait_for_workers=False,
            multi_tenant=True,  # the process group's own store, in a moment, is on this server too
        )
    except dist.DistNetworkError as error:
        raise RankFailed(
            f"rank {rank} on {socket.gethostname()}: nobody answers at {host}:{port}, where rank "
            f"0's key-value store should be, for {timeout_s:g} s (runtime.timeout_s) ({error})"
        ) from None
    store.set(names[rank], socket.gethostname())
    try:
        store.wait(names, patience)
    except RuntimeError:
        try:
            missing = [number for number in range(world) if not store.check([names[number]])]
        except RuntimeError:
            missing = [0]
        raise RankFailed(
            f"{_ranks(missing)} of {world} did not come within {timeout_s:g} s "
            "(runtime.timeout_s): frozen, gone or not started; look at their output"
        ) from None
    return store


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


# errors of some, raised by all


@dataclass(frozen=True)
class _Trouble:
    """What went wrong on one rank, in a form that can be sent."""

    problems: tuple[str, ...]
    is_foreseen: bool


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    result: T | None = None
    error: Exception | None = None
    trouble: _Trouble | None = None


def _attempt(function: Callable[[], T]) -> _Attempt[T]:
    try:
        return _Attempt(function())
    except ConfigError as error:
        return _Attempt(error=error, trouble=_Trouble(error.problems, True))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        text = (
            f"{place}{error.strerror or error} (on {socket.gethostname()}); see to that disk or "
            "network, then give the same command again"
        )
        return _Attempt(error=error, trouble=_Trouble((text,), True))
    except Exception as error:
        return _Attempt(error=error, trouble=_Trouble((f"{type(error).__name__}: {error}",), False))


def _shared(attempt: _Attempt[T], troubles: dict[int, _Trouble], *, num_asked: int) -> Exception:
    """What this rank raises, given what went wrong on which ranks of those that were asked."""
    if attempt.error is not None and not isinstance(attempt.error, ConfigError | OSError):
        return attempt.error
    for rank, trouble in troubles.items():
        if not trouble.is_foreseen:
            return RankFailed(f"rank {rank}: {trouble.problems[0]}")
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, trouble in troubles.items():
        ranks_of.setdefault(trouble.problems, []).append(rank)
    problems: list[str] = []
    for (first, *rest), ranks in ranks_of.items():
        is_of_all = len(ranks) == num_asked
        problems += [first if is_of_all else f"{_ranks(ranks)}: {first}", *rest]
    return ConfigError(problems)
