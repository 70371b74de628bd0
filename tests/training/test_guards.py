from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.distributed import run_ranks
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.training.guards import SkipGuard, SpikeGuard, check_equal_over_ranks
from vae_dist.training.stop import TrainingFailed

CPU = torch.device("cpu")


def observe(
    guard: SkipGuard, first: int, flags: list[int], spikes: list[int] | None = None
) -> None:
    for i, flag in enumerate(flags):
        spike = torch.tensor(float(spikes[i] if spikes else 0))
        guard.observe(first + i, torch.tensor(float(flag)), spike, (f"shard-{first + i}.tar",))


def failure(guard: SkipGuard) -> str:
    alone: Any = SimpleNamespace(gather=lambda value: [value])
    try:
        guard.check(alone, torch.tensor(torch.nan))
    except TrainingFailed as error:
        return str(error)
    return ""


def test_skipped_steps_are_counted_and_a_good_one_ends_the_streak():
    guard = SkipGuard(CPU, max_consecutive=4)
    observe(guard, 1, [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1])
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 3}
    again = SkipGuard(CPU, max_consecutive=4)
    again.load_state(guard.state())  # as a resume does: the streak goes on
    observe(again, 7, [1])
    assert "4 steps in a row" in failure(again)
    observe(guard, 7, [0])
    assert failure(guard) == ""
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 0}


def test_too_many_in_a_row_name_step_metric_and_shards():
    guard = SkipGuard(CPU, max_consecutive=3)
    observe(guard, 1, [0, 0, 0, 1, 1, 1])
    message = failure(guard)
    for part in ("3 steps in a row", "step 6", "optim/grad_norm=nan", "shard-4.tar, shard-5.tar"):
        assert part in message


def test_a_streak_that_ended_before_the_host_looks_is_noticed():
    guard = SkipGuard(CPU, max_consecutive=3)
    observe(guard, 1, [0, 0, 1])
    assert failure(guard) == ""
    observe(guard, 4, [1, 1, 0])
    message = failure(guard)
    assert "3 steps in a row" in message and "shard-3.tar" in message
    observe(guard, 7, [1, 1, 0])
    assert failure(guard) == ""  # the one before has been reported


def norms(guard: SpikeGuard, values: list[float]) -> list[float]:
    return [float(guard(torch.tensor(value))) for value in values]


def test_a_spike_is_far_above_the_recent_norms():
    guard = SpikeGuard(CPU, factor=3.0)
    assert norms(guard, [1.0] * 31 + [1000.0]) == [0.0] * 32  # there is no experience yet
    guard = SpikeGuard(CPU, factor=3.0)
    usual = [1.0 + 0.01 * i for i in range(50)]  # 0.9 quantile: 1.441
    assert norms(guard, usual) == [0.0] * 50
    assert norms(guard, [4.0, 4.7, 4.0, float("nan"), float("inf")]) == [0, 1, 0, 0, 0]


def test_gradients_that_have_grown_for_good_are_accepted_in_time():
    guard = SpikeGuard(CPU, factor=2.0)
    norms(guard, [1.0] * 256)
    flags = norms(guard, [10.0] * 60)
    assert flags[0] == 1 and flags[-1] == 0
    assert 20 <= sum(flags) <= 30  # a tenth of the window


@pytest.mark.parametrize("before", [10, 40, 300])
def test_the_window_survives_a_resume_bit_for_bit(before):
    values = (torch.rand(400, generator=torch.Generator().manual_seed(0)) ** -1.5).tolist()
    one, first, second = (SpikeGuard(CPU, factor=2.0) for _ in range(3))
    whole = norms(one, values)
    head = norms(first, values[:before])
    second.load_state(first.state())
    assert head + norms(second, values[before:]) == whole and 0 < sum(whole) < 400


def test_a_factor_of_zero_skips_nothing_and_keeps_nothing():
    guard = SpikeGuard(CPU, factor=0.0)
    assert norms(guard, [1.0] * 40 + [1e9]) == [0.0] * 41
    assert guard.state() == {}


def compare(bad_rank: int, value: float = 1.0) -> str:
    """One bit of one weight of a rank is turned over."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    weights = {"a": torch.arange(5.0), "b": torch.full((3, 2), value)}
    if runtime.rank == bad_rank:
        weights["b"].view(torch.int32)[1, 1] ^= 1
    try:
        check_equal_over_ranks(runtime, weights, step=7)
    except TrainingFailed as failure:
        return str(failure)
    return ""


def test_one_bit_of_one_rank_is_found_and_every_rank_says_who():
    messages = run_ranks(3, compare, 1)
    assert len(set(messages)) == 1
    assert "after step 7 the weights of rank 1 of 3 differ from those of the rest" in messages[0]
    assert "1 of 2 tensors, b first" in messages[0]
    assert "the weights of ranks 0, 1 of 2 differ" in run_ranks(2, compare, 0)[0]
    assert run_ranks(2, compare, -1) == ["", ""]
    for value in (0.0, float("nan"), 1e-42):
        assert "b first" in run_ranks(2, compare, 1, value)[0]
