from __future__ import annotations

import pytest

from benchmarks.mnist_minute import FIRST_EPOCH_STEPS, SAFETY, Clock, steps_within
from benchmarks.report import median_ratio, split_options, table


def test_own_options_are_taken_out_of_the_words() -> None:
    options, keys = split_options(
        ["rounds=7", "config=mnist", "optimizer.lr=1e-3", "data="], {"rounds": "5", "data": "x"}
    )
    assert options == {"rounds": "7", "data": ""}
    assert keys == ["config=mnist", "optimizer.lr=1e-3"]


def test_table() -> None:
    lines = table(["arm", "rate"], [["ours", 12345.6], ["bare", 0.97123]]).splitlines()
    assert lines == ["| arm | rate |", "|---|---|", "| ours | 12,346 |", "| bare | 0.9712 |"]


def test_ratio_is_the_median_of_the_rounds() -> None:
    assert median_ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == 1.0
    with pytest.raises(ValueError):
        median_ratio([1.0], [1.0, 2.0])


def test_steps_that_fit_into_the_seconds() -> None:
    clock = Clock()
    # the first epoch takes 3 s, each later step 0.02 s
    clock.at_s = [3.0 * step / FIRST_EPOCH_STEPS for step in range(FIRST_EPOCH_STEPS + 1)]
    clock.at_s += [3.0 + 0.02 * step for step in range(1, 80)]
    steps = steps_within(60.0, clock)
    assert 3.0 + 0.02 * (steps - FIRST_EPOCH_STEPS) == pytest.approx(60 * SAFETY, abs=0.02)
