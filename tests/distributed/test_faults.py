"""What ranks do to each other: one is signalled, killed, frozen or starved; the others know it."""

import functools
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
from vae_dist.training import signals
from vae_dist.training.watch import STARTUP

LONG = ("training.steps=100000", "optimizer.schedule=constant", "evaluation.every=0")
freeze = functools.partial(signal_oneself, signal.SIGSTOP)


def ranks(tmp_path, digits, *overrides, prepare=None) -> Ranks:
    argv = arguments(tmp_path / "run", digits, *LONG, "checkpoint.every=5", *overrides)
    return Ranks(2, argv, output=tmp_path / "output", prepare=prepare)


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


# one is lost


def lose_a_loader() -> None:
    """As torch's handler of SIGCHLD does."""
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize("unlucky", [slow(0), 1])
def test_a_lost_loader_process_is_named_with_its_rank_and_a_remedy(tmp_path, digits, unlucky):
    prepare = at_place("data", lose_a_loader, ranks=(unlucky,), visit=8)
    with ranks(tmp_path, digits, prepare=prepare) as group:
        assert group.wait(0, timeout_s=60) == [1], group.text()
        assert group.wait(1, timeout_s=60) == [1], group.text()
        assert "frozen or gone" not in group.output[unlucky].read_text()  # the others are well
    found = status(tmp_path / "run")
    assert found["status"] == "failed"
    assert f"rank {unlucky}" in found["reason"]
    assert "a loader process died (DataLoader worker (pid 7) is killed" in found["reason"]
    assert "lower data.workers" in found["reason"]


@pytest.mark.parametrize("frozen", [slow(0), 1])
def test_a_frozen_rank_is_named_by_the_others_in_time(tmp_path, digits, frozen):
    with ranks(tmp_path, digits, "runtime.timeout_s=4") as group:
        group.wait_for_step(11)  # checkpoint 5 is on the disk before 10 is begun
        group.signal(signal.SIGSTOP, frozen)
        assert group.wait(1 - frozen, timeout_s=50) == [1]
        assert "no step for 4 s (runtime.timeout_s)" in group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and f"rank {frozen}" in found["reason"]
        assert "frozen or gone" in found["reason"] and found["step"] >= 5


@pytest.mark.parametrize(
    ("place", "frozen"),
    [
        ("shards", 1),
        slow("newest checkpoint", 1),
        slow("model", 0),
        slow("model", 1),
        slow("evaluation", 0),
        slow("evaluation", 1),
        slow("checkpoint", 0),
        slow("checkpoint", 1),
    ],
)
def test_a_rank_that_freezes_anywhere_is_named(tmp_path, digits, place, frozen):
    prepare = at_place(place, freeze, ranks=(frozen,), visit=2 if place == "evaluation" else 1)
    options = ("runtime.timeout_s=6", "evaluation.every=7", "evaluation.batch_size=20")
    with ranks(tmp_path, digits, *options, prepare=prepare) as group:
        assert group.wait(1 - frozen, timeout_s=60) == [1], group.text()
        is_in_startup = place in STARTUP
        begin = "start-up stands still" if is_in_startup else "no step"
        assert f"{begin} for 6 s (runtime.timeout_s): " in group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and f"rank {frozen}" in found["reason"]
        assert "frozen or gone" in found["reason"]
        if frozen == 1:  # rank 0's frozen store cannot say where it is
            assert (f"in start-up ({place})" if is_in_startup else "at step") in found["reason"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_other_at_once(tmp_path, digits, killed):
    with ranks(tmp_path, digits, "runtime.timeout_s=20") as group:
        group.wait_for_step(11)  # checkpoint 5 is on the disk before 10 is begun
        group.signal(signal.SIGKILL, killed)
        assert group.wait(1 - killed, timeout_s=50) == [1]
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and found["step"] >= 5
        assert f"rank {killed}" in found["reason"] and "frozen or gone" in found["reason"]
        assert "noticed as" in found["reason"]


@pytest.mark.parametrize("killed", [slow(0), 1])
def test_a_rank_that_dies_in_start_up_is_named(tmp_path, digits, killed):
    kill = functools.partial(signal_oneself, signal.SIGKILL)
    prepare = at_place("model", kill, ranks=(killed,))
    with ranks(tmp_path, digits, "runtime.timeout_s=20", prepare=prepare) as group:
        assert group.wait(1 - killed, timeout_s=50) == [1], group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and f"rank {killed}" in found["reason"]


@pytest.mark.slow
def test_the_lowest_rank_that_lives_has_the_last_word(tmp_path, digits):
    argv = arguments(tmp_path / "run", digits, *LONG, "checkpoint.every=5", "data.slots=3")
    argv += ["training.batch_size=48", "runtime.timeout_s=20"]
    with Ranks(3, argv, output=tmp_path / "output") as group:
        group.wait_for_step(11)
        group.signal(signal.SIGKILL, 0, 1)
        assert group.wait(2, timeout_s=60) == [1], group.text()
        found = status(tmp_path / "run")
        assert found["status"] == "failed" and "rank 0" in found["reason"]


def test_a_starved_rank_delays_the_others_and_nothing_else(tmp_path, digits):
    """Its loader delivers nothing for longer than the watch needs for a diagnosis."""
    gate, options = tmp_path / "gate", ("training.steps=20", "evaluation.every=0")
    prepare = at_place("data", functools.partial(starve, gate), ranks=(1,), visit=9)
    argv = arguments(tmp_path / "run", digits, *options, "runtime.timeout_s=20")
    with Ranks(2, argv, output=tmp_path / "output", prepare=prepare) as group:
        group.wait_for_step(8)
        assert group.wait(timeout_s=2) == [None, None] and last_step(tmp_path / "run") == 8
        gate.touch()
        assert group.wait() == [0, 0], group.text()
    whole = tmp_path / "whole"
    assert train(whole, digits, *options, world=2) == [0, 0]
    assert same_weights(tmp_path / "run", whole, 20)


@pytest.mark.slow
def test_a_rank_that_starves_for_good_is_named(tmp_path, digits):
    starved = functools.partial(starve, tmp_path / "never")
    prepare = at_place("data", starved, ranks=(1,), visit=9)
    with ranks(tmp_path, digits, "runtime.timeout_s=4", prepare=prepare) as group:
        assert group.wait(timeout_s=60) == [1, 1], group.text()
        reason = status(tmp_path / "run")["reason"]
        assert "alive but behind: rank 1" in reason and "at step 8 in data" in reason


# requests to stop

PHASES = {
    "start-up": lambda who: at_place("shards", signal_oneself, ranks=who),
    "training": lambda who: at_place("step", signal_oneself, ranks=who, visit=7),
    "evaluation": lambda who: at_place("evaluation", signal_oneself, ranks=who, visit=3),
    "saving": lambda who: at_place("checkpoint", signal_oneself, ranks=who, visit=2),
}
FAST = {("start-up", "other"), ("evaluation", "other"), ("saving", "main"), ("training", "all")}


@pytest.mark.parametrize(
    ("phase", "whom"),
    [
        pytest.param(phase, whom, marks=() if (phase, whom) in FAST else pytest.mark.slow)
        for phase in PHASES
        for whom in ("main", "other", "all")
    ],
)
def test_a_signal_stops_all_ranks_at_one_step_whenever_it_comes(tmp_path, digits, phase, whom):
    who = {"main": (0,), "other": (1,), "all": (0, 1)}[whom]
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
    first = {"training": 7, "evaluation": 12, "saving": 10}[phase]
    assert found["step"] in (first, first + 1)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.load(found["step"]).step == found["step"]
    assert not list(checkpoints.folder.glob(".*"))
    options = ("training.steps=16", "optimizer.schedule=constant", *options)
    assert train(tmp_path / "run", digits, *options, world=2) == [0, 0]
    assert sorted(rows(tmp_path / "run")) == list(range(1, 17))


def test_one_request_to_all_ranks_may_be_delivered_twice(tmp_path, digits):
    with ranks(tmp_path, digits) as group:
        group.wait_for_step(3)
        for _ in range(2):  # as a scheduler and an agent do it
            group.signal(signal.SIGUSR1)
        assert group.wait() == [75, 75], group.text()
        assert status(tmp_path / "run")["status"] == "interrupted"


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


def test_a_signal_in_the_middle_of_a_write_waits_for_it(tmp_path, digits):
    prepare = in_the_middle_of_a_write(signal_oneself, after_step=5)
    with ranks(tmp_path, digits, prepare=prepare) as group:
        assert group.wait() == [75, 75], group.text()
    found, checkpoints = status(tmp_path / "run"), Checkpoints(tmp_path / "run" / "checkpoints")
    assert found["status"] == "interrupted" and found["step"] >= 10
    assert [checkpoints.load(step).step for step in checkpoints.steps()][-1] == found["step"]
    assert not list(checkpoints.folder.glob(".*"))


def test_a_second_signal_during_a_write_harms_no_checkpoint(tmp_path, digits):
    """The disk takes for ever; whoever asks twice is not made to wait for it."""
    stuck = tmp_path / "stuck"

    def never() -> None:
        stuck.touch()
        signal_oneself()
        time.sleep(1)  # past the burst
        signal_oneself()
        time.sleep(1000)

    write = in_the_middle_of_a_write(never, after_step=5)

    def prepare(rank: int) -> None:
        signals.BURST_S = 0.3
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
        assert "going on at step" in group.text()


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
