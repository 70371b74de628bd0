import errno
import os
import socket
from types import SimpleNamespace

import pytest
import torch

from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from tests.support.steps import one_process
from vae_dist.config.errors import ConfigError
from vae_dist.config.launcher import launcher_problems, threads_of_user
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import RankFailed, Runtime

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "training.microbatch_size"),
        ("ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_USE_DEEPSPEED"),
        ("ACCELERATE_USE_FSDP=true", "--use_fsdp"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "runtime.compile"),
        ("ACCELERATE_USE_CPU=True MASTER_PORT=29500", "MULTI_CPU"),
        ("WORLD_SIZE=2", "RANK, MASTER_ADDR, MASTER_PORT not"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, variables, message):
    assert launcher_problems() == []
    for setting in variables.split():
        monkeypatch.setenv(*setting.split("="))
    (problem,) = launcher_problems()
    assert message in problem


def test_a_launcher_of_another_precision_is_refused_and_its_threads_do_not_count(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads_of_user() == 3
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match=r"asks for mixed precision fp16 but.*leave the launcher"):
        Runtime.use_precision(None, "bf16")
    assert threads_of_user() == 0


def collectives():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_backend", lambda *group: "nccl")
        runtime = one_process()
    total = runtime.sum_over_ranks(torch.tensor(float(runtime.rank + 1), dtype=torch.float64))
    # flags and objects go over gloo in CPU memory, beside a backend that takes no CPU tensors
    torch.distributed.GroupMember.WORLD = None
    flags = [runtime.any_rank(runtime.rank == 1), runtime.any_rank(False)]
    result = runtime.on_main(lambda: f"from rank {runtime.rank}")
    runtime.barrier()
    found = runtime.broadcast_tensors({"w": torch.ones(2)} if runtime.is_main else None)
    assert torch.equal(found["w"], torch.ones(2))
    line = ", ".join(f"rank {rank} cpu" for rank in range(runtime.world))
    assert runtime.hosts() == [f"on {HOST}: {line}"]
    return runtime.world, float(total), flags, result


def test_ranks_agree_and_one_process_needs_no_other():
    assert run_ranks(2, collectives) == [(2, 3.0, [True, False], "from rank 0")] * 2
    assert run_ranks(1, collectives) == [(1, 1.0, [False, False], "from rank 0")]


ERRORS = {
    "config": ConfigError(["first", "  second"]),
    "disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/log"),
    "bug": KeyError("a bug"),
}
FULL = f"/run/log: No space left on device (on {HOST})"
BOTH, BUG, SENT = "first\n  second", "KeyError: 'a bug'", "RankFailed: rank {}: KeyError: 'a bug'"
CASES = [  # kind, ranks that fail, what each of three raises on all, and on the main process
    ("config", [], ["returned 1"] * 3, "returned 1"),
    ("config", [1], [f"ConfigError: rank 1: {BOTH}"] * 3, "returned 1"),
    ("config", [0, 1, 2], [f"ConfigError: {BOTH}"] * 3, f"ConfigError: {BOTH}"),
    ("config", [0, 2], ["ConfigError: ranks 0, 2: first"] * 3, f"ConfigError: {BOTH}"),
    ("disk", [0], [f"ConfigError: rank 0: {FULL}"] * 3, f"ConfigError: {FULL}; see to that"),
    ("bug", [1], [SENT.format(1), BUG, SENT.format(1)], "returned 1"),
    ("bug", [0], [BUG, SENT.format(0), SENT.format(0)], ""),
]


def attempts():
    """What this rank raises in each case: in `on_all_ranks`, and in `on_main`."""
    runtime = one_process()

    def fail(kind, ranks):
        if runtime.rank in ranks:
            raise ERRORS[kind]
        return 1

    raised = []
    for kind, ranks, *_ in CASES:
        for call in (runtime.on_all_ranks, runtime.on_main):
            try:
                raised.append(f"returned {call(lambda k=kind, r=ranks: fail(k, r))}")
            except Exception as error:
                raised.append(f"{type(error).__name__}: {error}")
    return raised


def test_what_goes_wrong_on_some_ranks_is_raised_on_all():
    for rank, raised in enumerate(run_ranks(3, attempts)):
        for case, (_, _, on_all, on_main) in enumerate(CASES):
            assert raised[2 * case].startswith(on_all[rank])
            assert raised[2 * case + 1].startswith(on_main or on_all[rank])


def come_late(absent):
    if int(os.environ["RANK"]) == absent:
        return "absent"
    try:
        Runtime.join(RuntimeConfig(threads=1, timeout_s=1))
    except RankFailed as problem:
        return str(problem)


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_ends_the_wait_of_the_others(absent):
    for rank, text in enumerate(run_ranks(3, come_late, absent)):
        message = f"rank {rank} on {HOST}: not all 3 ranks met within 1 s"
        assert text == "absent" if rank == absent else message in text


def test_a_single_process_accelerator_under_a_launcher_of_two_is_refused(monkeypatch):
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr("vae_dist.distributed.PartialState", lambda **_: alone)
    for name in LAUNCHER_VARIABLES[:6]:
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .*--multi_gpu --num_processes 2"):
        Runtime.join(RuntimeConfig())
