import os

import pytest
import torch

from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.runtime import Runtime, launcher_problems


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "mixed precision fp16 but training.precision=bf16",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.microbatch_size"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--use_fsdp"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = launcher_problems("bf16")
    assert message in problem


def test_a_launcher_that_agrees_is_not(monkeypatch):
    assert launcher_problems("bf16") == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launcher_problems("bf16") == []


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
    return runtime.world, float(total), flags, calls, result, error


def test_ranks_agree():
    for rank, outcome in enumerate(run_ranks(2, collectives)):
        called = ["called"] if rank == 0 else []
        assert outcome == (2, 3.0, [True, False], called, "from rank 0", "first\nsecond")


def test_one_process_needs_no_other():
    assert run_ranks(1, collectives)[0][:2] == (1, 1.0)


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


def fp16_on_cpu() -> str:
    try:
        Runtime.start(RuntimeConfig(device="cpu"), precision="fp16")
    except ConfigError as problem:
        return str(problem)
    return ""


def test_fp16_needs_a_gpu():
    assert "training.precision=fp16 needs a GPU" in run_ranks(1, fp16_on_cpu)[0]
