from types import SimpleNamespace

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.steps import one_process
from vae_dist.training.guards import DamageGuard, SkipGuard, SpikeGuard, check_equal_over_ranks
from vae_dist.training.stop import TrainingFailed

CPU = torch.device("cpu")


def observe(guard, first, flags, spikes=None):
    for i, flag in enumerate(flags):
        spike = torch.tensor(float(spikes[i] if spikes else 0))
        guard.observe(torch.tensor(float(flag)), spike, (f"shard-{first + i}.tar",))


def test_skipped_steps_are_counted_and_a_good_one_ends_the_streak():
    guard = SkipGuard(CPU, max_consecutive=4)
    observe(guard, 1, [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1])
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 3}
    again = SkipGuard(CPU, max_consecutive=4)
    again.load_state(guard.state())  # as a resume does: the streak goes on
    observe(again, 7, [1])
    one_rank = SimpleNamespace(gather=lambda value: [value])
    with pytest.raises(TrainingFailed) as failure:
        again.check(one_rank, torch.tensor(torch.nan), step=7)
    for part in ("4 steps in a row", "step 7", "optim/grad_norm=nan", "shard-7.tar"):
        assert part in str(failure.value)
    observe(guard, 7, [0])
    guard.check(one_rank, torch.tensor(1.0), step=7)
    assert guard.state() == {"skipped_steps": 3, "spike_steps": 2, "skip_streak": 0}


def norms(guard, values):
    return [float(guard(torch.tensor(value))) for value in values]


def test_a_spike_is_far_above_the_recent_norms():
    guard = SpikeGuard(CPU, factor=3.0)
    assert norms(guard, [1.0] * 31 + [1000.0]) == [0.0] * 32  # there is no experience yet
    guard = SpikeGuard(CPU, factor=3.0)
    usual = [1.0 + 0.01 * i for i in range(50)]  # 0.9 quantile: 1.441
    assert norms(guard, usual) == [0.0] * 50
    assert norms(guard, [4.0, 4.7, 4.0, float("nan"), float("inf")]) == [0, 1, 0, 0, 0]
    guard = SpikeGuard(CPU, factor=2.0)  # gradients that have grown for good are accepted in time
    norms(guard, [1.0] * 256)
    flags = norms(guard, [10.0] * 60)
    assert flags[0] == 1 and flags[-1] == 0 and 20 <= sum(flags) <= 30  # a tenth of the window
    off = SpikeGuard(CPU, factor=0.0)
    assert norms(off, [1.0] * 40 + [1e9]) == [0.0] * 41 and off.state() == {}


def test_damage_is_a_fraction_of_all_that_was_seen_and_of_an_epoch_at_least():
    guard = DamageGuard(limit=0.1, num_samples=100, warn=print)
    guard.check(10, 16)  # one bad sample in the first batch does not end a run
    guard.check(11, 110)
    with pytest.raises(TrainingFailed, match="11 of 109 samples could not be read"):
        guard.check(11, 109)


def compare(cases):
    """What is said for each (rank of which one bit of one weight is turned over, its value)."""
    runtime, said = one_process(), []
    for bad_rank, value in cases:
        weights = {"a": torch.arange(5.0), "b": torch.full((3, 2), value)}
        if runtime.rank == bad_rank:
            weights["b"].view(torch.int32)[1, 1] ^= 1
        try:
            said.append(check_equal_over_ranks(runtime, weights, step=7) or "")
        except TrainingFailed as failure:
            said.append(str(failure))
    return said


def test_one_bit_of_one_rank_is_found_and_every_rank_says_who():
    cases = [(1, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan")), (1, 1e-42)]
    found, *others = run_ranks(3, compare, cases)
    assert others == [found] * 2 and found[1] == ""
    assert "after step 7 the weights of ranks 0, 2 and of rank 1 differ" in found[0]
    assert all("1 of 2 tensors, b first" in text for text in (found[0], *found[2:]))
