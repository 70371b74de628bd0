"""What ranks do to each other: one is signalled, killed or frozen, and the others know it."""

import signal

import pytest

from tests.support.faults import Ranks
from tests.support.training import arguments, status
from vae_dist.evaluation import run as evaluation

LONG = ("training.steps=100000", "optimizer.schedule=constant", "evaluation.every=0")


def ranks(tmp_path, digits, *overrides, prepare=None) -> Ranks:
    argv = arguments(tmp_path / "run", digits, *LONG, "checkpoint.every=5", *overrides)
    return Ranks(2, argv, output=tmp_path / "output", prepare=prepare)


@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_rank_is_named_by_the_others_in_time(tmp_path, digits, frozen):
    with ranks(tmp_path, digits, "runtime.timeout_s=4") as group:
        group.wait_for_step(11)  # checkpoint 5 is on the disk before 10 is begun
        group.signal(signal.SIGSTOP, frozen)
        assert group.wait(1 - frozen, timeout_s=50) == [1]
        assert "no step for 4 s (runtime.timeout_s)" in group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and f"rank {frozen}" in found["reason"]
        assert "frozen or gone" in found["reason"] and found["step"] >= 5


def test_a_killed_rank_is_named_by_the_other_at_once(tmp_path, digits):
    with ranks(tmp_path, digits, "runtime.timeout_s=20") as group:
        group.wait_for_step(5)
        group.signal(signal.SIGKILL, 1)
        assert group.wait(0, timeout_s=50) == [1]
        reason = status(tmp_path / "run")["reason"]
        assert "frozen or gone: rank 1" in reason and "noticed as" in reason


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param((0,), marks=pytest.mark.slow, id="main"),
        pytest.param((1,), id="other"),
        pytest.param((0, 1), marks=pytest.mark.slow, id="all"),
    ],
)
def test_a_signal_to_some_ranks_stops_all_at_one_step(tmp_path, digits, chosen):
    with ranks(tmp_path, digits) as group:
        group.wait_for_step(3)
        for _ in range(2):  # as a scheduler and an agent do it
            group.signal(signal.SIGUSR1, *chosen)
        assert group.wait() == [75, 75], group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "interrupted"
        assert (tmp_path / "run" / "checkpoints" / f"step_{found['step']:08d}").is_dir()
        assert group.orphans() == []


def stopped_evaluation(rank: int) -> None:
    """Rank 1 gets a signal in its second batch."""
    sums = evaluation._sums
    calls = 0

    def once(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return sums(*args, **kwargs)

    evaluation._sums = once


def test_a_signal_during_evaluation_stops_it_in_the_middle(tmp_path, digits):
    options = ("evaluation.every=4", "evaluation.batch_size=20", "checkpoint.every=0")
    with ranks(tmp_path, digits, *options, prepare=stopped_evaluation) as group:
        assert group.wait() == [75, 75], group.text()
        found = status(tmp_path / "run")
        assert (found["status"], found["step"]) == ("interrupted", 4)


def signal_at_once(rank: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    from vae_dist import session

    start = session.run_session

    def signalled(*args):
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return start(*args)

    session.run_session = signalled


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_a_frozen_one(tmp_path, digits):
    with ranks(tmp_path, digits) as group:
        group.wait_for_step(11)
        group.signal(signal.SIGSTOP, 1)
        group.signal(signal.SIGTERM, 0)
        assert group.wait(0, timeout_s=3) == [None]  # it waits for the other, inside a collective
        group.signal(signal.SIGTERM, 0)
        assert group.wait(0, timeout_s=10) == [128 + signal.SIGTERM]
    options = arguments(tmp_path / "run", digits, *LONG, "training.steps=60")
    with Ranks(2, options, output=tmp_path / "again") as group:
        assert group.wait() == [0, 0], group.text()
        assert "steps from step" in group.text()


def test_a_signal_during_start_up_stops_before_training(tmp_path, digits):
    with ranks(tmp_path, digits, prepare=signal_at_once) as group:
        assert group.wait() == [75, 75], group.text()
        found = status(tmp_path / "run")
        assert (found["status"], found["step"]) == ("interrupted", 0)
        assert not (tmp_path / "run" / "log.jsonl").exists()
