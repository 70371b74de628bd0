"""Several data sets in one stream of batches, by weight.

In: the lengths of each data set's shards, its weight, and the lanes of the run. Out: an order like
`Order`. Each data set owns a quota of the lanes, dealt so that neighbouring lanes differ, and goes
through its own epochs in them: so a batch holds the same number of images of each data set, every
image of a data set is shown once in its epochs, and where a run stands is still one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import ShardIndex
from vae_dist.data.order import Order, Run, Window
from vae_dist.randomness import derive_seed


def make_order(
    index: ShardIndex, *, lanes: int, window: int, seed: int, slot_rows: int = 0
) -> Order | MixedOrder:
    """The order of a data set, or of the mixture that the index holds."""
    if not index.parts:
        return Order(index.lengths, lanes=lanes, window=window, seed=seed, slot_rows=slot_rows)
    return MixedOrder(index, lanes=lanes, window=window, seed=seed, slot_rows=slot_rows)


def quotas(weights: Sequence[float], lanes: int, *, key: str = "training.batch_size") -> list[int]:
    """Lanes of each data set: proportional to the weights, at least one, `lanes` in all.

    key: the config key that sets the number of lanes.

    Raises ConfigError when there are fewer lanes than data sets.
    """
    if lanes < len(weights):
        raise ConfigError(
            f"data.train mixes {len(weights)} data sets, but {key}={lanes} is less than that; "
            "raise it"
        )
    shares = np.array(weights, np.float64) / sum(weights) * lanes
    counts = np.maximum(1, np.floor(shares)).astype(int)
    while counts.sum() != lanes:
        step = 1 if counts.sum() < lanes else -1
        gap = step * (shares - counts)
        gap[(counts == 1) & (step < 0)] = -np.inf
        counts[int(np.argmax(gap))] += step
    return counts.tolist()


class MixedOrder:
    """Like `Order`; rows of a lane and sample numbers of the run mean the same."""

    def __init__(
        self, index: ShardIndex, *, lanes: int, window: int, seed: int, slot_rows: int = 0
    ) -> None:
        self.lanes, self.window, self.seed, self.slot_rows = lanes, window, seed, slot_rows
        self.num_samples = index.num_samples
        key = "data.slots" if slot_rows else "training.batch_size"
        counts = quotas([weight for _, weight in index.parts], lanes, key=key)
        self.part_of_lane = _dealt(counts)
        ranks = np.zeros(lanes, np.int64)  # of a lane among those of its data set
        self._orders: list[Order] = []
        self._first_shard: list[int] = []
        first = 0
        for part, (num_shards, _) in enumerate(index.parts):
            mine = np.flatnonzero(self.part_of_lane == part)
            ranks[mine] = np.arange(len(mine))
            lengths = index.lengths[first : first + num_shards]
            if not lengths.sum():
                raise ConfigError(f"data.train: data set {part} of the mixture holds no sample")
            own_seed = derive_seed(seed, "mixture", part)
            self._orders.append(
                Order(lengths, lanes=len(mine), window=window, seed=own_seed, slot_rows=slot_rows)
            )
            self._first_shard.append(first)
            first += num_shards
        self._rank_of_lane = ranks

    def window_at(self, lane: int, row: int) -> Window:
        """The window of a lane that holds a row; its epoch is that of the lane's data set."""
        part = int(self.part_of_lane[lane])
        window = self._orders[part].window_at(int(self._rank_of_lane[lane]), row)
        base = self._first_shard[part]
        runs = tuple(Run(run.shard + base, run.start, run.stop) for run in window.runs)
        return replace(window, lane=lane, runs=runs)

    def sample_at(self, g: int) -> tuple[int, int, int]:
        """(epoch of its data set, shard, index in the shard) of sample number g of the run."""
        window = self.window_at(g % self.lanes, g // self.lanes)
        return window.place(int(window.order[g // self.lanes - window.first_row]))


def _dealt(counts: Sequence[int]) -> np.ndarray:
    """For each lane its data set: at each lane the one that lags most behind its share."""
    total = sum(counts)
    given = np.zeros(len(counts))
    dealt = np.empty(total, np.int64)
    for lane in range(total):
        behind = np.array(counts) * (lane + 1) / total - given
        behind[given >= counts] = -np.inf
        dealt[lane] = int(np.argmax(behind))
        given[dealt[lane]] += 1
    return dealt
