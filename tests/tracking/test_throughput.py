from __future__ import annotations

import pytest

from vae_dist.tracking.throughput import Meter


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_row_counts_images_of_all_ranks_and_waiting() -> None:
    clock = Clock()
    meter = Meter(total_steps=10, first_step=2, world=2, clock=clock)
    for _ in range(4):
        with meter.data_wait():
            clock.now += 0.5
        clock.now += 1.5
        meter.step(8)
    assert meter.row() == {
        "time/images_per_second": pytest.approx(4 * 8 * 2 / 8.0),
        "time/images_per_second_per_device": pytest.approx(4 * 8 / 8.0),
        "time/data_wait_fraction": pytest.approx(0.25),
        "time/step_seconds": pytest.approx(2.0),
        "time/left_seconds": pytest.approx(4 * 2.0),
    }


def test_pauses_count_nowhere() -> None:
    clock = Clock()
    meter = Meter(total_steps=10, clock=clock)
    clock.now += 1.0
    meter.step(8)
    with meter.pause():
        clock.now += 1000.0
    assert meter.row()["time/images_per_second"] == pytest.approx(8.0)


def test_a_row_covers_the_steps_since_the_row_before() -> None:
    clock = Clock()
    meter = Meter(total_steps=100, clock=clock)
    for seconds in (1.0, 3.0):
        clock.now += seconds
        meter.step(6)
        row = meter.row()
        assert row["time/step_seconds"] == pytest.approx(seconds)
    assert 98 * 1.0 < row["time/left_seconds"] < 98 * 3.0


def test_there_is_no_row_without_a_step() -> None:
    clock = Clock()
    meter = Meter(total_steps=1, clock=clock)
    clock.now += 5.0
    assert meter.row() == {}
