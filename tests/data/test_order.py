from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.data.order import Order, Window

LENGTHS = [0, 1, 7, 60, 33, 2, 90, 128, 45, 45, 13, 77, 1, 100, 64, 3, 50, 0, 5]
ALL = {(shard, i) for shard, length in enumerate(LENGTHS) for i in range(length)}


def take(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.sample_at(g)[1:] for g in range(start, stop)]


def windows_of(order: Order, lane: int, count: int) -> list[Window]:
    found = [order.window_at(lane, 0)]
    while len(found) < count:
        found.append(order.window_at(lane, found[-1].end_row))
    return found


def test_windows_follow_each_other_and_can_be_entered_anywhere() -> None:
    order = Order(LENGTHS, lanes=16, window=8, seed=0)
    rows = windows_of(order, 5, 20)
    assert [w.first_row for w in rows] == [0] + [w.end_row for w in rows[:-1]]
    for row in range(rows[-1].end_row):
        entered = Order(LENGTHS, lanes=16, window=8, seed=0).window_at(5, row)
        (same,) = (w for w in rows if w.first_row <= row < w.end_row)
        assert (entered.first_row, entered.runs, entered.epochs) == (
            same.first_row,
            same.runs,
            same.epochs,
        )
        np.testing.assert_array_equal(entered.order, same.order)


def test_lanes_read_their_windows_at_different_steps() -> None:
    order = Order([6400], lanes=16, window=8, seed=0)
    ends = Counter(order.window_at(lane, 0).end_row for lane in range(16))
    assert set(ends) == set(range(1, 9)) and max(ends.values()) == 2


def test_a_shard_is_read_front_to_back_by_one_or_two_lanes() -> None:
    order = Order([100] * 32, lanes=8, window=10, seed=0)
    readers: dict[int, set[int]] = {}
    for lane in range(8):
        last: dict[int, int] = {}
        window = order.window_at(lane, 0)
        while window.epochs[0] == 0:
            for run in window.runs:
                readers.setdefault(run.shard, set()).add(lane)
                if run.shard in last:  # again only where the turn has cut a shard in two
                    assert run.start >= last[run.shard] or run.start == 0
                last[run.shard] = run.stop
            window = order.window_at(lane, window.end_row)
    assert max(map(len, readers.values())) <= 3
    assert sum(len(lanes) for lanes in readers.values()) <= 32 + 8 + 1


def test_a_batch_mixes_class_sorted_shards() -> None:
    """1,000 shards of one class each: a batch of 64 holds nearly 64 classes."""
    order = Order([20] * 1000, lanes=64, window=8, seed=0)
    classes = [len({order.sample_at(g)[1] for g in range(64 * k, 64 * k + 64)}) for k in (0, 9)]
    assert min(classes) >= 60


def test_many_shards_cost_little() -> None:
    """10^8 samples in 10^4 shards: any sample is found without going through the others."""
    order = Order([10_000] * 10_000, lanes=1024, window=32, seed=0)
    epoch, shard, index = order.sample_at(7 * 10**8 + 12345)
    assert epoch == 7 and 0 <= shard < 10_000 and 0 <= index < 10_000


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 24),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 300),
)
@settings(max_examples=150, deadline=None)
def test_order_of_any_shape(
    lengths: list[int], lanes: int, window: int, seed: int, start: int
) -> None:
    order = Order(lengths, lanes=lanes, window=window, seed=seed)
    total = sum(lengths)
    epoch = start % 3
    numbers = range(epoch * total, (epoch + 1) * total)
    got = [order.sample_at(g) for g in numbers]
    assert {e for e, _, _ in got} == {epoch}
    counts = Counter((shard, index) for _, shard, index in got)
    assert len(counts) == total and set(counts.values()) == {1}
    assert all(0 <= index < lengths[shard] for shard, index in counts)
    # From any row on, the windows of a lane follow each other without gap and without overlap.
    lane, row = start % lanes, start
    for _ in range(3):
        found = order.window_at(lane, row)
        assert found.first_row <= row < found.end_row and len(found.order) <= window
        row = found.end_row
