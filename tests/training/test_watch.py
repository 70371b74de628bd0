"""The watch of the ranks: two of them in one process, over a store that can freeze."""

import threading
import time
from types import SimpleNamespace

import pytest

from vae_dist.training import watch
from vae_dist.training.watch import RankWatch

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

TIMEOUT_S = 0.4


class Store(dict):
    """As much of torch's key-value store as the watch uses; frozen, no operation returns."""

    frozen = False

    def clone(self):
        return self

    def set_timeout(self, timeout): ...

    def set(self, key, value):
        while self.frozen:
            time.sleep(0.01)
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]

    def compare_set(self, key, expected, value):
        return self.setdefault(key, value.encode())


class Group:
    """The watches of two ranks and their ends: (rank, report, whether the main process is gone)."""

    def __init__(self):
        self.ends, self.changed = [], threading.Condition()
        self.store, self.ranks = Store(), [self._watch(rank) for rank in range(2)]

    def _watch(self, rank):
        def on_lost(report, main_is_gone):
            with self.changed:
                self.ends.append((rank, report, main_is_gone))
                self.changed.notify()

        runtime = SimpleNamespace(rank=rank, world=2)
        return RankWatch(runtime, timeout_s=TIMEOUT_S, on_lost=on_lost)

    def at(self, *phases):
        """Each rank is there for the second time, from when on its time counts."""
        for one, phase in zip(self.ranks, phases, strict=True):
            one.at(7, phase)
            one.at(7, phase)

    def wait(self, number, *, timeout_s=10.0):
        with self.changed:
            self.changed.wait_for(lambda: len(self.ends) >= number, timeout_s)
            return sorted(self.ends)


@pytest.fixture
def group(monkeypatch):
    made = Group()

    def end_this_thread(code):
        assert code == 1
        raise SystemExit

    monkeypatch.setattr(watch.os, "_exit", end_this_thread)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: made.store)
    with made.ranks[0], made.ranks[1]:
        yield made
    made.store.frozen = False
    for thread in threading.enumerate():
        if thread.name == "rank-watch":
            thread.join(5)


def test_a_stall_ends_every_rank_with_the_table_of_all(group):
    group.at("step", "checkpoint")
    ends = group.wait(2)
    assert [rank for rank, _, _ in ends] == [0, 1]
    for _, report, main_is_gone in ends:
        assert report.startswith("no step for 0.4 s (runtime.timeout_s): rank 0 (process ")
        assert "at step 7 in step; rank 1" in report and "at step 7 in checkpoint" in report
        assert not main_is_gone


@pytest.mark.parametrize("phases", [("step", "data"), ("evaluation", "step")])
def test_an_outage_that_a_reader_sits_out_is_no_stall(group, phases):
    for one in group.ranks:
        one.reading_s = 0.5
    group.at(*phases)
    assert group.wait(1, timeout_s=0.7) == []
    assert len(group.wait(2)) == 2


@pytest.mark.parametrize("step", [-1, 7])
def test_start_up_and_a_first_time_are_not_timed(group, step):
    group.at("step", "step")
    group.ranks[1].at(step, "last checkpoint")
    assert group.wait(1, timeout_s=0.8) == []


def test_what_one_rank_fails_with_is_what_all_say(group):
    assert group.ranks[1].explain(KeyError("a bug")) == ("rank 1: KeyError: 'a bug'", False)
    assert group.wait(1) == [(0, "rank 1: KeyError: 'a bug'", False)]


def test_a_store_that_does_not_answer_means_that_the_main_process_is_gone(group):
    for one in group.ranks:
        one._silent_beats = 5
    group.at("step", "step")
    while group.ranks[1]._states[0]["step"] != 7:
        time.sleep(0.01)
    group.store.frozen = True
    report, main_is_gone = group.ranks[1].explain(RuntimeError("connection closed"))
    assert main_is_gone and "frozen or gone, last at step 7 in step" in report
    assert report.endswith("(noticed as RuntimeError)")
