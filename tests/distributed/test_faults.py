"""What ranks do to each other: one is signalled, killed or frozen; the others know it."""

import functools
import signal
import time

import pytest

from tests.support.faults import at_place, in_the_middle_of_a_write, run_command, signal_oneself
from tests.support.training import arguments, rows, status, train
from vae_dist.run.checkpoint import Checkpoints
from vae_dist.training import stop

LONG = ("training.steps=100000", "evaluation.every=0", "checkpoint.every=5")
CONSTANT = "optimizer.schedule=constant"
STALL = "no step for 5 s (runtime.timeout_s)"
SLOW = pytest.mark.slow


def run_long(tmp_path, digits, *overrides, prepare, world=2, but=None):
    argv = arguments(tmp_path / "run", digits, CONSTANT, *LONG, *overrides)
    return run_command(world, argv, prepare=prepare, but=but)


def test_a_lost_loader_process_is_named_with_its_rank_and_a_remedy(tmp_path, digits):
    def lose_a_loader():  # as torch's handler of SIGCHLD does
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    prepare = at_place("data", lose_a_loader, ranks=(1,), visit=8)
    assert run_long(tmp_path, digits, prepare=prepare) == [1, 1]
    found = status(tmp_path / "run")
    assert found["status"] == "failed" and "rank 1" in found["reason"]
    assert "a loader process died (DataLoader worker (pid 7) is killed" in found["reason"]
    assert "lower data.workers" in found["reason"]


@pytest.mark.parametrize(
    ("place", "number", "lost"),
    [
        ("step", signal.SIGKILL, 0),
        ("step", signal.SIGKILL, 1),
        ("step", signal.SIGSTOP, 1),
        pytest.param("step", signal.SIGSTOP, 0, marks=SLOW),
        pytest.param("shards", signal.SIGSTOP, 1, marks=SLOW),
    ],
)
def test_a_killed_or_frozen_rank_is_named_by_the_other(tmp_path, digits, place, number, lost):
    def lose():
        time.sleep(1)  # in which it publishes where it is
        signal_oneself(number)

    is_killed = number == signal.SIGKILL
    limit_s, visit = (10, 12) if is_killed else (5, 2 if place == "step" else 1)
    prepare = at_place(place, lose, ranks=(lost,), visit=visit)
    limit = f"runtime.timeout_s={limit_s}"  # which a rank that is gone need not wait for
    assert run_long(tmp_path, digits, limit, prepare=prepare, but=lost)[1 - lost] == 1
    found = status(tmp_path / "run")
    assert found["status"] == "failed" and found["step"] >= 5 * is_killed
    assert f"rank {lost}" in found["reason"] and "frozen or gone" in found["reason"]
    assert ("noticed as" if is_killed else STALL) in found["reason"]
    if (place, lost) == ("step", 1):  # rank 0 cannot say where it was
        assert f"frozen or gone, last at step {visit - 1} in step" in found["reason"]


def test_a_rank_that_stands_still_ends_all_but_a_first_step_may_last(tmp_path, digits, capfd):
    """As compilation does."""

    def prepare(rank):
        for visit, seconds in ((1, 6), (2, 1000)):
            stall = functools.partial(time.sleep, seconds)
            at_place("step", stall, ranks=(1,), visit=visit)(rank)

    assert run_long(tmp_path, digits, "runtime.timeout_s=5", prepare=prepare) == [1, 1]
    assert f"{STALL}: rank 0 (process " in capfd.readouterr().err
    assert "at step 1 in step" in status(tmp_path / "run")["reason"]


@SLOW
def test_the_last_write_may_take_long(tmp_path, digits):
    prepare = in_the_middle_of_a_write(functools.partial(time.sleep, 4), after_step=2)
    argv = arguments(tmp_path / "run", digits, "training.steps=3", "runtime.timeout_s=3")
    assert run_command(2, argv, prepare=prepare) == [0, 0]


@pytest.mark.parametrize(
    ("place", "visit", "who", "step"),
    [
        ("shards", 1, (1,), 0),
        ("evaluation", 2, (1,), 8),
        pytest.param("step", 7, (0, 1), 7, marks=SLOW),
        pytest.param("checkpoint", 3, (0,), 10, marks=SLOW),
    ],
)
def test_a_signal_stops_all_ranks_at_one_step(tmp_path, digits, place, visit, who, step):
    run, prepare = tmp_path / "run", at_place(place, signal_oneself, ranks=who, visit=visit)
    options = ("evaluation.every=8", "evaluation.batch_size=4", "data.workers=1")
    assert run_long(tmp_path, digits, *options, prepare=prepare) == [75, 75]
    found = status(run)
    assert found["status"] == "interrupted"
    # of the step at hand, or the one after it: ranks act on a request one step later
    assert found["step"] - step in (0, 1 * (step > 0))
    if not step:
        assert not (run / "log.jsonl").exists()
        return
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.load(found["step"]).step == found["step"]
    assert not list(checkpoints.folder.glob(".*"))
    last = found["step"] + 2
    assert train(run, digits, f"training.steps={last}", CONSTANT, *options, world=2) == [0, 0]
    assert sorted(rows(run)) == list(range(1, last + 1))
    assert "eval/rate_nats" in rows(run)[8]


def test_a_stop_file_stops_all_ranks_and_the_next_start_clears_it(tmp_path, digits):
    run = tmp_path / "run"
    prepare = at_place("step", (run / "STOP").touch, visit=4)
    assert run_long(tmp_path, digits, prepare=prepare) == [75, 75]
    found = status(run)
    assert found["status"] == "interrupted" and found["reason"] == f"{run / 'STOP'} exists"
    assert Checkpoints(run / "checkpoints").load(found["step"])
    assert train(run, digits, f"training.steps={found['step'] + 1}", CONSTANT) == [0]
    assert not (run / "STOP").exists()


def test_a_second_signal_during_a_write_harms_no_checkpoint(tmp_path, digits):
    """The disk takes for ever; a user who asks twice is not made to wait for it."""

    def never():
        for _ in range(4):  # as schedulers and agents repeat one request
            signal_oneself(signal.SIGUSR1)
            time.sleep(0.005)
        time.sleep(0.4)  # past the burst
        signal_oneself()
        time.sleep(1000)

    def prepare(rank):
        stop.BURST_S = 0.2
        in_the_middle_of_a_write(never, after_step=5)(rank)

    assert run_long(tmp_path, digits, world=1, prepare=prepare) == [128 + signal.SIGTERM]
    run, checkpoints = tmp_path / "run", Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [5] and checkpoints.load(5).step == 5
    assert [path.name for path in checkpoints.folder.glob(".step*")] == [".step_00000010.tmp"]
    assert train(run, digits, "training.steps=11", CONSTANT) == [0]
    assert sorted(rows(run)) == list(range(1, 12)) and not list(checkpoints.folder.glob(".*"))
