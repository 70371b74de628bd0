"""The order as arithmetic: each sample once an epoch, the same wherever one begins to read."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import MARKED, identities, load, make_shards, sample_at
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import ShardIndex
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import MixedOrder, Order, make_order, quotas

SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


def index_of(parts):
    """Of one data set, or of several with the weights 1, 2, ..."""
    lengths = np.array([length for part in parts for length in part], np.int64)
    weights = tuple((len(part), 1.0 + number) for number, part in enumerate(parts))
    names = tuple(str(shard) for shard in range(len(lengths)))
    return ShardIndex(names, lengths, lengths, parts=weights if len(parts) > 1 else ())


@given(
    parts=st.lists(SHARDS, min_size=1, max_size=3),
    lanes=st.integers(3, 24),
    slot_rows=st.integers(0, 4),
    window=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_each_sample_once_an_epoch_from_any_window(parts, lanes, slot_rows, window, seed):
    index = index_of(parts)
    keys = {"window": window * max(1, slot_rows), "seed": seed, "slot_rows": slot_rows}
    order = make_order(index, lanes=lanes, **keys)
    part_of_lane = order.part_of_lane if isinstance(order, MixedOrder) else np.zeros(lanes, int)
    first_shard = np.cumsum([0, *map(len, parts)])
    for part, lengths in enumerate(parts):
        mine, total = np.flatnonzero(part_of_lane == part), sum(lengths)
        seen = Counter()
        for rank, lane in enumerate(mine.tolist()):
            row = 0
            while row * len(mine) < 2 * total:
                found = order.window_at(lane, row)
                count = len(found.order)
                assert found.first_row == row and 0 < count <= keys["window"]
                assert count % max(1, slot_rows) == 0
                assert sorted(found.order.tolist()) == list(range(count))
                again = order.window_at(lane, row + seed % count)
                assert again.runs == found.runs and (again.order == found.order).all()
                for position in range(count):
                    # the tape of the epochs is dealt in order, whatever is permuted in a window
                    epoch, shard, i = found.place(position)
                    assert epoch == ((row + position) * len(mine) + rank) // total
                    seen[epoch, shard - int(first_shard[part]), i] += 1
                row = found.end_row
        for epoch in range(2):
            counts = {(s, i): n for (e, s, i), n in seen.items() if e == epoch}
            assert set(counts.values()) == {1}
            assert counts.keys() == {(s, i) for s, n in enumerate(lengths) for i in range(n)}


def test_the_order_is_that_of_runs_that_have_begun():
    """Each epoch, lane, window and data set has its own draw, and keeps it."""
    digest = hashlib.md5()
    for parts, slot_rows in (([[9, 0, 40, 7]], 0), ([[9, 0, 40, 7]], 3), ([[64], [5, 64]], 0)):
        order = make_order(index_of(parts), lanes=4, window=6, seed=5, slot_rows=slot_rows)
        digest.update(repr([sample_at(order, g) for g in range(500)]).encode())
    assert digest.hexdigest() == "defbadfbfe71de9ffcf9f3711e66d769"


def test_many_samples_cost_little_and_lanes_change_windows_in_turn_in_shards_of_their_own():
    order = Order([10_000] * 10_000, lanes=1024, window=32, seed=0)
    windows = [order.window_at(lane, 720_000) for lane in range(1024)]
    assert {window.epochs[0] for window in windows} == {7}
    assert len({window.runs[0].shard for window in windows}) > 900, "sorted classes are mixed"
    ends = Counter(window.end_row for window in windows)
    assert len(ends) > 30 and max(ends.values()) <= 64


def test_every_data_set_has_its_share_and_the_weights_belong_to_the_identity(tmp_path):
    assert quotas([1, 2, 4], 9) == [1, 3, 5] and quotas([1, 1, 1, 1000], 9) == [1, 1, 1, 6]
    with pytest.raises(ConfigError, match=r"mixes 3 data sets, but training.batch_size=2 is less"):
        quotas([1, 1, 1], 2)
    for name, lengths in (("a", (5, 0, 9)), ("b", (3, 20, 1, 4))):
        make_shards(tmp_path / name, lengths)
    parts = [{"path": str(tmp_path / name), "weight": 1} for name in "ab"]
    indexes = [load(tmp_path / "a"), load(parts)]
    indexes += [load([parts[0], {**parts[1], "weight": weight}]) for weight in (2, 3)]
    assert len({index.fingerprint for index in indexes}) == 4

    order = make_order(index := indexes[-1], lanes=8, window=4, seed=3)
    for half in (order.part_of_lane[:4], order.part_of_lane[4:]):  # of each of two ranks
        assert Counter(half.tolist()) == {0: 1, 1: 3}
    keys = {"batch_size": 8, "start_step": 5, "stop_step": 25}
    for batch in TrainingStream(index, order, MARKED, **keys):
        places = [sample_at(order, 8 * batch.step + lane)[1:] for lane in range(8)]
        # shards are marked by their own folder
        want = [(shard if shard < 3 else shard - 3, i) for shard, i in places]
        assert identities(batch.groups[0].images.numpy()) == want
