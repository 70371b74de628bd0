"""The watch of the ranks: two of them in one process, over a store that can freeze."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.training import watch
from vae_dist.training.watch import RankWatch

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

TIMEOUT_S = 0.4
Ends = list[tuple[int, str, bool]]  # rank, report, whether the main process is gone


class Store(dict[str, bytes]):
    """As much of torch's key-value store as the watch uses; frozen, no operation returns."""

    frozen = False

    def clone(self) -> Store:
        return self

    def set_timeout(self, timeout: object) -> None: ...

    def set(self, key: str, value: str) -> None:
        while self.frozen:
            time.sleep(0.01)
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.setdefault(key, value.encode())


class Group:
    """The watches of two ranks and their ends."""

    def __init__(self) -> None:
        self.ends: Ends = []
        self.store = Store()
        self.ranks = [self._watch(rank) for rank in range(2)]

    def _watch(self, rank: int) -> RankWatch:
        runtime: Any = SimpleNamespace(rank=rank, world=2)

        def on_lost(report: str, main_is_gone: bool) -> None:
            self.ends.append((rank, report, main_is_gone))

        return RankWatch(runtime, timeout_s=TIMEOUT_S, on_lost=on_lost)

    def at(self, *phases: str) -> None:
        """Each rank is there for the second time, from when on its time counts."""
        for one, phase in zip(self.ranks, phases, strict=True):
            one.at(7, phase)
            one.at(7, phase)

    def wait(self, number: int, *, timeout_s: float = 10) -> Ends:
        end = time.monotonic() + timeout_s
        while len(self.ends) < number and time.monotonic() < end:
            time.sleep(0.01)
        return sorted(self.ends)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    made = Group()

    def end_this_thread(code: int) -> None:
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


def test_a_stall_ends_every_rank_with_the_table_of_all(group: Group) -> None:
    group.at("step", "checkpoint")
    for rank, report, main_is_gone in group.wait(2):
        assert report.startswith("no step for 0.4 s (runtime.timeout_s): rank 0 (process ")
        assert "at step 7 in step; rank 1" in report and "at step 7 in checkpoint" in report
        assert rank in (0, 1) and not main_is_gone


@pytest.mark.parametrize("phases", [("step", "data"), ("evaluation", "step")])
def test_an_outage_that_a_reader_sits_out_is_no_stall(
    group: Group, phases: tuple[str, str]
) -> None:
    for one in group.ranks:
        one.reading_s = 1.0
    group.at(*phases)
    assert group.wait(1, timeout_s=0.9) == []
    assert len(group.wait(2)) == 2


@pytest.mark.parametrize("step", [-1, 7])
def test_start_up_and_a_first_time_are_not_timed(group: Group, step: int) -> None:
    group.at("step", "step")
    group.ranks[1].at(step, "last checkpoint")
    assert group.wait(1, timeout_s=1.0) == []


def test_what_one_rank_fails_with_is_what_all_say(group: Group) -> None:
    assert group.ranks[1].explain(KeyError("a bug")) == ("rank 1: KeyError: 'a bug'", False)
    assert group.wait(1) == [(0, "rank 1: KeyError: 'a bug'", False)]


def test_a_store_that_does_not_answer_means_that_the_main_process_is_gone(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in group.ranks:
        one._silent_beats = 5
    group.at("step", "step")
    while group.ranks[1]._states[0]["step"] != 7:
        time.sleep(0.01)
    group.store.frozen = True
    report, main_is_gone = group.ranks[1].explain(RuntimeError("connection closed"))
    assert main_is_gone and "frozen or gone, last at step 7 in step" in report
    assert report.endswith("(noticed as RuntimeError)")
