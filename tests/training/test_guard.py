import pytest
import torch

from vae_dist.training.guard import SkipGuard, SpikeGuard

CPU = torch.device("cpu")


def observe(
    guard: SkipGuard, first: int, flags: list[int], spikes: list[int] | None = None
) -> None:
    for i, flag in enumerate(flags):
        spike = torch.tensor(float(spikes[i] if spikes else 0))
        guard.observe(first + i, torch.tensor(float(flag)), spike, (f"shard-{first + i}.tar",))


def test_skipped_steps_are_counted_and_a_good_one_ends_the_streak():
    guard = SkipGuard(CPU, max_consecutive=4)
    observe(guard, 1, [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1])
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 3}
    observe(guard, 7, [0])
    assert guard.failure() is None
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 0}


def test_too_many_in_a_row_name_step_metric_and_shards():
    guard = SkipGuard(CPU, max_consecutive=3)
    observe(guard, 1, [0, 0, 0, 1, 1, 1])
    failure = guard.failure()
    assert failure is not None and failure.step == 6
    assert set(failure.shards) >= {"shard-4.tar", "shard-5.tar", "shard-6.tar"}
    words = failure.words(float("nan"), failure.shards)
    for part in ("3 steps in a row", "step 6", "optim/grad_norm=nan", "shard-5.tar"):
        assert part in words


def test_a_streak_that_ended_before_the_host_looks_is_noticed():
    guard = SkipGuard(CPU, max_consecutive=3)
    observe(guard, 1, [0, 0, 1])
    assert guard.failure() is None
    observe(guard, 4, [1, 1, 0])
    failure = guard.failure()
    assert failure is not None and failure.streak == 3 and "shard-3.tar" in failure.shards
    observe(guard, 7, [1, 1, 0])
    assert guard.failure() is None  # the one before has been reported


def test_the_host_looks_often_enough():
    guard = SkipGuard(CPU, max_consecutive=3)
    assert [guard.is_due(step) for step in range(1, 7)] == [False, False, True] * 2


def test_the_streak_goes_on_after_a_resume():
    guard = SkipGuard(CPU, max_consecutive=3)
    guard.load_state({"skipped_steps": 9, "spike_steps": 4, "skip_streak": 2})
    observe(guard, 3, [1])
    assert guard.failure() is not None and guard.state()["skipped_steps"] == 10


def norms(guard: SpikeGuard, values: list[float]) -> list[float]:
    return [float(guard(torch.tensor(value))) for value in values]


def test_a_spike_is_far_above_the_recent_norms():
    guard = SpikeGuard(CPU, factor=3.0)
    usual = [1.0 + 0.01 * i for i in range(50)]  # 0.9 quantile: 1.441
    assert norms(guard, usual) == [0.0] * 50
    assert norms(guard, [4.0, 4.7, 4.0, float("nan"), float("inf")]) == [0, 1, 0, 0, 0]


def test_nothing_is_a_spike_before_there_is_experience():
    guard = SpikeGuard(CPU, factor=3.0)
    assert norms(guard, [1.0] * 31 + [1000.0]) == [0.0] * 32
    assert norms(guard, [1000.0]) == [1.0]


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
