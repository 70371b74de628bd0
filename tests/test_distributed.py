import errno
import os
import socket

import pytest
import torch

from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.launcher import launcher_problems, threads_of_user
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import RankFailed, Runtime


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.microbatch_size"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--use_fsdp"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "runtime.compile"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "MULTI_CPU"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = launcher_problems()
    assert message in problem


def test_a_launcher_of_another_precision_is_refused(monkeypatch):
    assert launcher_problems() == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match=r"asks for mixed precision fp16 but.*precision=fp16"):
        Runtime.use_precision(None, "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match=r"mixed precision fp8 but.*leave the launcher's out$"):
        Runtime.use_precision(None, "bf16")


def test_threads_that_the_user_names_count_and_those_of_a_launcher_do_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads_of_user() == 3
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert threads_of_user() == 0


def collectives() -> tuple[int, float, list[bool], list[str], str, str]:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    total = runtime.sum_over_ranks(torch.tensor(float(runtime.rank + 1), dtype=torch.float64))
    flags = [runtime.any_rank(runtime.rank == 1), runtime.any_rank(False)]
    calls: list[str] = []

    def work() -> str:
        calls.append("called")
        return f"from rank {runtime.rank}"

    result = runtime.on_main(work)

    def fail() -> None:
        raise ConfigError(["first", "second"])

    try:
        runtime.on_main(fail)
        error = ""
    except ConfigError as problem:
        error = str(problem)
    runtime.barrier()
    found = runtime.broadcast_tensors({"w": torch.ones(2)} if runtime.is_main else None)
    assert torch.equal(found["w"], torch.ones(2))
    line = ", ".join(f"rank {rank} cpu" for rank in range(runtime.world))
    assert runtime.hosts() == [f"on {socket.gethostname()}: {line}"]
    return runtime.world, float(total), flags, calls, result, error


def test_ranks_agree():
    for rank, outcome in enumerate(run_ranks(2, collectives)):
        called = ["called"] if rank == 0 else []
        assert outcome == (2, 3.0, [True, False], called, "from rank 0", "first\nsecond")


def test_one_process_needs_no_other():
    assert run_ranks(1, collectives)[0][:2] == (1, 1.0)


def attempts(kind: str, ranks: list[int]) -> list[str]:
    """What each rank raises after `ranks` failed: in `on_all_ranks`, and on the main process."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")

    def fail() -> int:
        if runtime.rank not in ranks:
            return 1
        if kind == "config":
            raise ConfigError(["first", "  second"])
        if kind == "own":
            raise ConfigError(f"from {runtime.rank}")
        if kind == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/environment.json")
        raise KeyError("a bug")

    raised = []
    for call in (runtime.on_all_ranks, runtime.on_main):
        try:
            raised.append(f"returned {call(fail)}")
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


@pytest.mark.parametrize(
    ("kind", "ranks", "expected"),
    [
        ("config", [], "returned 1"),
        ("config", [1], "ConfigError: rank 1: first\n  second"),
        ("config", [0, 1, 2], "ConfigError: first\n  second"),
        ("own", [0, 2], "ConfigError: rank 0: from 0\nrank 2: from 2"),
        ("config", [0, 2], "ConfigError: ranks 0, 2: first\n  second"),
    ],
)
def test_what_goes_wrong_on_some_ranks_is_raised_on_all(kind, ranks, expected):
    for on_all, on_main in run_ranks(3, attempts, kind, ranks):
        assert on_all == expected
        assert on_main.startswith("ConfigError: f" if 0 in ranks else "returned 1")


def test_a_disk_error_of_one_rank_reaches_all_in_words():
    for on_all, on_main in run_ranks(2, attempts, "disk", [0]):
        for text, begin in (
            (on_all, "ConfigError: rank 0: /run"),
            (on_main, "ConfigError: /run"),
        ):
            assert text.startswith(f"{begin}/environment.json: No space left on device (on ")
            assert "then give the same command again" in text


def test_what_nobody_foresaw_keeps_its_type_where_it_arose():
    first, second = run_ranks(2, attempts, "bug", [1])
    assert first[0] == "RankFailed: rank 1: KeyError: 'a bug'" and second[0] == "KeyError: 'a bug'"
    first, second = run_ranks(2, attempts, "bug", [0])
    assert first == ["KeyError: 'a bug'"] * 2
    assert second == ["RankFailed: rank 0: KeyError: 'a bug'"] * 2


def with_another_backend() -> list[object]:
    """What the ranks tell each other where the backend of the gradients is not gloo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_backend", lambda *group: "nccl")
        runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    assert runtime.control is not None and runtime.control.name() == "gloo"
    used: list[object] = []
    all_reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather_object
    broadcast = torch.distributed.broadcast_object_list

    def noted(function):
        def call(*args, group=None, **kwargs):
            used.append(group is runtime.control)
            return function(*args, group=group, **kwargs)

        return call

    torch.distributed.all_reduce = noted(all_reduce)
    torch.distributed.all_gather_object = noted(gather)
    torch.distributed.broadcast_object_list = noted(broadcast)
    work, answer = runtime.ask_any_rank(runtime.rank == 1)
    work.wait()
    found = [answer.device.type, answer.item(), runtime.any_rank(False)]
    found += [runtime.broadcast(runtime.rank), runtime.gather(runtime.rank), all(used), len(used)]
    runtime.barrier()
    return found


def test_flags_and_objects_go_over_gloo_in_cpu_memory_beside_another_backend():
    expected = ["cpu", 1, False, 0, [0, 1], True, 4]
    assert run_ranks(2, with_another_backend) == [expected] * 2


def come_late(absent: int) -> str:
    if int(os.environ["RANK"]) == absent:
        return "absent"
    try:
        Runtime.join(RuntimeConfig(threads=1, timeout_s=1))
    except RankFailed as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_ends_the_wait_of_the_others(absent):
    for rank, text in enumerate(run_ranks(3, come_late, absent)):
        message = f"rank {rank} on {socket.gethostname()}: not all 3 ranks met within 1 s"
        assert text == "absent" if rank == absent else message in text


def half_launched() -> str:
    os.environ["WORLD_SIZE"] = "1"  # what Accelerate sees ...
    from accelerate import Accelerator

    Accelerator(cpu=True)
    os.environ["WORLD_SIZE"] = "2"  # ... and what was launched
    try:
        Runtime.start(RuntimeConfig(threads=1), precision="no")
    except ConfigError as problem:
        return str(problem)
    return ""


def test_a_single_process_accelerator_under_a_launcher_of_two_is_refused():
    (message,) = run_ranks(1, half_launched)
    assert "WORLD_SIZE=2" in message and "--multi_gpu --num_processes 2" in message
