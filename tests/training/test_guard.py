import pytest
import torch

from vae_dist.training.guard import NonFiniteGuard, TrainingFailed


def observe(guard: NonFiniteGuard, first: int, flags: list[int]) -> None:
    for step, flag in enumerate(flags, start=first):
        guard.observe(step, torch.tensor(float(flag)), (f"shard-{step}.tar",))


def test_skipped_steps_are_counted_and_a_good_one_ends_the_streak():
    guard = NonFiniteGuard(torch.device("cpu"), max_consecutive=3)
    observe(guard, 1, [1, 1, 0, 1, 0, 1])
    guard.check()
    assert guard.state() == {"skipped_steps": 4, "nonfinite_streak": 1}


def test_too_many_in_a_row_name_step_and_shards():
    guard = NonFiniteGuard(torch.device("cpu"), max_consecutive=3)
    with pytest.raises(TrainingFailed, match=r"3 steps in a row, up to step 6.*shard-4.*shard-6"):
        observe(guard, 1, [0, 0, 0, 1, 1, 1])


def test_the_streak_goes_on_after_a_resume():
    guard = NonFiniteGuard(torch.device("cpu"), max_consecutive=3)
    guard.load_state({"skipped_steps": 9, "nonfinite_streak": 2})
    with pytest.raises(TrainingFailed):
        observe(guard, 3, [1])
    assert guard.state()["skipped_steps"] == 10
