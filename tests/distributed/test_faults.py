"""What ranks do to each other: one is signalled, killed, frozen or starved; the others know it."""

import functools
import re
import signal
import time

import pytest

from tests.support.faults import (
    Ranks,
    at_place,
    in_the_middle_of_a_write,
    is_running,
    last_step,
    signal_oneself,
    starve,
)
from tests.support.training import arguments, rows, same_weights, status, train
from vae_dist.run.checkpoint import Checkpoints
from vae_dist.training import stop

LONG = ("training.steps=100000", "optimizer.schedule=constant", "evaluation.every=0")
SLOW = pytest.mark.slow


def ranks(tmp_path, digits, *overrides, prepare=None) -> Ranks:
    argv = arguments(tmp_path / "run", digits, *LONG, "checkpoint.every=5", *overrides)
    return Ranks(2, argv, output=tmp_path / "output", prepare=prepare)


# one is lost


def lose_a_loader() -> None:
    """As torch's handler of SIGCHLD does."""
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_a_lost_loader_process_is_named_with_its_rank_and_a_remedy(tmp_path, digits):
    prepare = at_place("data", lose_a_loader, ranks=(1,), visit=8)
    with ranks(tmp_path, digits, prepare=prepare) as group:
        assert group.wait(timeout_s=60) == [1, 1], group.text()
    found = status(tmp_path / "run")
    assert found["status"] == "failed" and "rank 1" in found["reason"]
    assert "a loader process died (DataLoader worker (pid 7) is killed" in found["reason"]
    assert "lower data.workers" in found["reason"]


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        ("step", 1),
        ("shards", 1),
        pytest.param("step", 0, marks=SLOW),
    ],
)
def test_a_frozen_rank_is_named_by_the_others_in_time(tmp_path, digits, place, lost):
    freeze = functools.partial(signal_oneself, signal.SIGSTOP)
    prepare = at_place(place, freeze, ranks=(lost,), visit=1 if place == "shards" else 2)
    with ranks(tmp_path, digits, "runtime.timeout_s=4", prepare=prepare) as group:
        assert group.wait(1 - lost, timeout_s=60) == [1], group.text()
        assert "no step for 4 s (runtime.timeout_s): " in group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and f"rank {lost}" in found["reason"]
        assert "frozen or gone" in found["reason"]
        if lost == 1 and place == "step":  # a frozen rank 0 cannot say where it is
            # of its last record, which is some seconds old at most
            assert re.search(r"frozen or gone, last at step [01] in", found["reason"])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_by_the_other_at_once(tmp_path, digits, lost):
    with ranks(tmp_path, digits, "runtime.timeout_s=20") as group:
        group.wait_for_step(11)  # checkpoint 5 is on the disk before 10 is begun
        group.signal(signal.SIGKILL, lost)
        assert group.wait(1 - lost, timeout_s=50) == [1]
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and found["step"] >= 5
        assert f"rank {lost}" in found["reason"] and "frozen or gone" in found["reason"]
        assert "noticed as" in found["reason"]


def test_a_starved_rank_delays_the_others_and_nothing_else(tmp_path, digits):
    """Its loader delivers nothing for a while."""
    gate, options = tmp_path / "gate", ("training.steps=20", "evaluation.every=0")
    prepare = at_place("data", functools.partial(starve, gate), ranks=(1,), visit=9)
    argv = arguments(tmp_path / "run", digits, *options, "runtime.timeout_s=20")
    with Ranks(2, argv, output=tmp_path / "output", prepare=prepare) as group:
        group.wait_for_step(8)
        assert group.wait(timeout_s=1) == [None, None] and last_step(tmp_path / "run") == 8
        gate.touch()
        assert group.wait() == [0, 0], group.text()
    whole = tmp_path / "whole"
    assert train(whole, digits, *options, world=2) == [0, 0]
    assert same_weights(tmp_path / "run", whole, 20)


def test_a_first_step_and_the_last_write_may_take_long(tmp_path, digits):
    """As compilation does, and a slow disk; start-up, where shards are indexed, counts neither."""
    linger = functools.partial(time.sleep, 6)
    at_first, at_last = (
        at_place("step", linger, ranks=(1,)),
        in_the_middle_of_a_write(linger, after_step=2),
    )

    def prepare(rank: int) -> None:
        at_first(rank)
        at_last(rank)

    options = ("training.steps=3", "evaluation.every=0", "runtime.timeout_s=4")
    argv = arguments(tmp_path / "run", digits, *options)
    with Ranks(2, argv, output=tmp_path / "output", prepare=prepare) as group:
        assert group.wait() == [0, 0], group.text()


# requests to stop

FIRST_STEPS = {"start-up": 0, "training": 7, "evaluation": 12, "saving": 10}
PHASES = {
    "start-up": lambda who: at_place("shards", signal_oneself, ranks=who),
    "training": lambda who: at_place("step", signal_oneself, ranks=who, visit=7),
    "evaluation": lambda who: at_place("evaluation", signal_oneself, ranks=who, visit=3),
    "saving": lambda who: at_place("checkpoint", signal_oneself, ranks=who, visit=2),
}


@pytest.mark.parametrize(
    ("phase", "who"),
    [
        ("start-up", (1,)),
        ("evaluation", (1,)),
        ("training", (0, 1)),
        pytest.param("saving", (0,), marks=SLOW),
    ],
)
def test_a_signal_stops_all_ranks_at_one_step_whenever_it_comes(tmp_path, digits, phase, who):
    options = ("evaluation.every=12", "evaluation.batch_size=20")
    with ranks(tmp_path, digits, *options, prepare=PHASES[phase](who)) as group:
        assert group.wait() == [75, 75], group.text()
        assert group.orphans() == []
    found = status(tmp_path / "run")
    assert found["status"] == "interrupted"
    if phase == "start-up":
        assert found["step"] == 0 and not (tmp_path / "run" / "log.jsonl").exists()
        return
    # of the step at hand, or the one after it: ranks act on a request one step later
    assert found["step"] - FIRST_STEPS[phase] in (0, 1)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.load(found["step"]).step == found["step"]
    assert not list(checkpoints.folder.glob(".*"))
    options = ("training.steps=16", "optimizer.schedule=constant", *options)
    assert train(tmp_path / "run", digits, *options, world=2) == [0, 0]
    assert sorted(rows(tmp_path / "run")) == list(range(1, 17))


def test_a_stop_file_stops_all_ranks(tmp_path, digits):
    run = tmp_path / "run"
    with ranks(tmp_path, digits) as group:
        group.wait_for_step(3)
        (run / "STOP").touch()
        assert group.wait() == [75, 75], group.text()
    found = status(run)
    assert found["status"] == "interrupted" and found["reason"] == f"{run / 'STOP'} exists"
    assert Checkpoints(run / "checkpoints").load(found["step"])
    options = (f"training.steps={found['step'] + 2}", "optimizer.schedule=constant")
    assert train(run, digits, *options, "evaluation.every=0", world=2) == [0, 0]  # not again
    assert not (run / "STOP").exists()


def test_a_second_signal_during_a_write_harms_no_checkpoint(tmp_path, digits):
    """The disk takes for ever; a user who asks twice is not made to wait for it."""
    stuck = tmp_path / "stuck"

    def never() -> None:
        stuck.touch()
        signal_oneself()
        time.sleep(1)  # past the burst
        signal_oneself()
        time.sleep(1000)

    write = in_the_middle_of_a_write(never, after_step=5)

    def prepare(rank: int) -> None:
        stop.BURST_S = 0.3
        write(rank)

    run = tmp_path / "run"
    with ranks(tmp_path, digits, "runtime.timeout_s=20", prepare=prepare) as group:
        assert group.wait(0) == [128 + signal.SIGTERM], group.text()
        assert stuck.exists()
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps() == [5] and checkpoints.load(5).step == 5
    assert [path.name for path in checkpoints.folder.glob(".step*")] == [".step_00000010.tmp"]
    options = ("training.steps=12", "optimizer.schedule=constant", "evaluation.every=0")
    assert train(run, digits, *options) == [0]
    assert sorted(rows(run)) == list(range(1, 13)) and not list(checkpoints.folder.glob(".*"))


# the disk


def test_a_checkpoint_folder_that_cannot_be_written_costs_warnings_until_it_can(tmp_path, digits):
    """chmod does not stop root: in its place is a file, which refuses as a read-only disk does."""
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with ranks(tmp_path, digits) as group:
        group.wait_for_step(11)
        folder.rename(tmp_path / "away")
        folder.touch()
        reached = last_step(run)
        group.wait_for_step(reached + 12)  # two checkpoints later it trains
        assert is_running(run) and "warning: cannot write checkpoint" in group.text()
        folder.unlink()
        (tmp_path / "away").rename(folder)
        kept = max(Checkpoints(folder).steps())
        assert Checkpoints(folder).load(kept).step == kept >= 5
        group.wait_for_step(last_step(run) + 12)
        group.signal(signal.SIGTERM)
        assert group.wait() == [75, 75], group.text()
    found = status(run)
    assert found["status"] == "interrupted" and found["step"] > kept
    assert Checkpoints(folder).load(found["step"]).step == found["step"]
