"""Which sample is read when: pure arithmetic on the lengths of the shards.

An epoch is one long tape: the shards in an order drawn from (seed, epoch), turned by a random
offset. The tape is cut into `lanes` equal pieces, and all pieces are read at once, front to back.
The number g = 0, 1, 2, ... of a sample over the whole run says everything, N samples an epoch:

    lane = g mod lanes      row = g div lanes      epoch = g div N

Within a lane and an epoch, windows of `window` consecutive samples are permuted by
(seed, epoch, lane, window). With lanes = batch size, step k takes row k of every lane.

With `slot_rows` (aspect buckets) a lane is a slot, and step k takes its rows k slot_rows, ...,
(k + 1) slot_rows - 1. Windows are then cut on the rows of the whole run, in multiples of slot_rows,
so that the images of a slot always come from one window; a window may hold the tail of one epoch
and the head of the next.

Several data sets are mixed by weight (`MixedOrder`): each owns a quota of the lanes, dealt so that
neighbouring lanes differ, and goes through its own epochs in them. So a batch holds the same number
of images of each, and where a run stands is still one integer.

In: lengths of the shards, lanes, window, seed. Out: windows of lanes, as runs of samples of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import Run, ShardIndex
from vae_dist.randomness import derive_seed, numpy_generator

NUM_CACHED_EPOCHS = 3  # a lane reads in one epoch, looks back into the last, lanes change in turn


@dataclass(frozen=True)
class Window:
    """Consecutive samples of a lane: row first_row + i takes sample order[i] of the joined runs."""

    first_row: int
    runs: tuple[Run, ...]
    epochs: tuple[int, ...]  # of each run
    order: np.ndarray  # int64 permutation of range(num_samples)

    @property
    def end_row(self) -> int:
        return self.first_row + len(self.order)

    def place(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, index in the shard) of a position of the joined runs."""
        for epoch, run in zip(self.epochs, self.runs, strict=True):
            if position < run.stop - run.start:
                return epoch, run.shard, run.start + position
            position -= run.stop - run.start
        raise IndexError(position)


class _Plan(NamedTuple):
    """One epoch: its shards, their ends on the tape, the turn, and by lane its rows and start."""

    shards: np.ndarray
    ends: np.ndarray
    turn: int
    first_row: np.ndarray
    end_row: np.ndarray
    start: np.ndarray


class Order:
    """The order of all samples over all epochs, for ever; any part of it in O(window)."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        lanes: int,
        window: int,
        seed: int,
        slot_rows: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.num_samples = int(self.lengths.sum())
        self.lanes, self.window, self.seed, self.slot_rows = lanes, window, seed, slot_rows
        assert self.num_samples > 0 and lanes > 0 and window > 0, (self.num_samples, lanes, window)
        assert not slot_rows or window % slot_rows == 0, (window, slot_rows)
        self._plan = lru_cache(NUM_CACHED_EPOCHS)(self._plan_of)

    def window_at(self, lane: int, row: int) -> Window:
        """The window of a lane that holds a row (counted over the whole run)."""
        if self.slot_rows:
            return self._window_over_epochs(lane, row)
        epoch = self._epoch(lane, row)
        plan = self._plan(epoch)
        first, end = int(plan.first_row[lane]), int(plan.end_row[lane])
        # The first window of each lane has another length, so that not all lanes read at once.
        head = self.window - lane * self.window // self.lanes
        number = 0 if row - first < head else 1 + (row - first - head) // self.window
        low = first if number == 0 else first + head + (number - 1) * self.window
        high = min(end, first + head + number * self.window)
        runs = tuple(self._runs(plan, lane, low, high))
        generator = numpy_generator(self.seed, "window", epoch, lane, number)
        return Window(low, runs, (epoch,) * len(runs), generator.permutation(high - low))

    def _window_over_epochs(self, lane: int, row: int) -> Window:
        # Ahead by a number of slots that differs by lane, so that not all lanes read at once.
        ahead = lane * (self.window // self.slot_rows) // self.lanes * self.slot_rows
        number = (row + ahead) // self.window
        low, high = max(0, number * self.window - ahead), (number + 1) * self.window - ahead
        runs: list[Run] = []
        epochs: list[int] = []
        at = low
        while at < high:
            epoch = self._epoch(lane, at)
            plan = self._plan(epoch)
            end = min(high, int(plan.end_row[lane]))
            runs += self._runs(plan, lane, at, end)
            epochs += [epoch] * (len(runs) - len(epochs))
            at = end
        generator = numpy_generator(self.seed, "window", lane, number)
        return Window(low, tuple(runs), tuple(epochs), generator.permutation(high - low))

    def _epoch(self, lane: int, row: int) -> int:
        return (row * self.lanes + lane) // self.num_samples

    def _plan_of(self, epoch: int) -> _Plan:
        generator = numpy_generator(self.seed, "order", epoch)
        shards = generator.permutation(np.flatnonzero(self.lengths))
        turn = int(generator.integers(self.num_samples))
        lanes = np.arange(self.lanes)
        # rows of lane l before sample k * N of the run: how many g < k * N have g mod lanes == l
        first, end = (
            (k * self.num_samples - lanes + self.lanes - 1) // self.lanes
            for k in (epoch, epoch + 1)
        )
        start = np.cumsum(end - first) - (end - first)
        return _Plan(shards, np.cumsum(self.lengths[shards]), turn, first, end, start)

    def _runs(self, plan: _Plan, lane: int, row: int, end_row: int) -> Iterator[Run]:
        """What the rows row, ..., end_row - 1 of a lane are, all of them in the plan's epoch."""
        count = end_row - row
        at = int(plan.start[lane]) + row - int(plan.first_row[lane]) + plan.turn
        at %= self.num_samples
        while count > 0:
            i = int(np.searchsorted(plan.ends, at, "right"))
            shard = int(plan.shards[i])
            start = int(self.lengths[shard]) - (int(plan.ends[i]) - at)
            stop = min(int(self.lengths[shard]), start + count)
            yield Run(shard, start, stop)
            count -= stop - start
            at = (at + stop - start) % self.num_samples


class MixedOrder:
    """Like `Order`; rows of a lane and sample numbers of the run mean the same, epochs are those of
    the lane's data set."""

    def __init__(
        self, index: ShardIndex, *, lanes: int, window: int, seed: int, slot_rows: int = 0
    ) -> None:
        self.lanes, self.window, self.seed, self.slot_rows = lanes, window, seed, slot_rows
        key = "data.slots" if slot_rows else "training.batch_size"
        counts = quotas([weight for _, weight in index.parts], lanes, key=key)
        self.part_of_lane = _dealt(counts)
        self._rank_of_lane = np.zeros(lanes, np.int64)  # among those of its data set
        self._orders: list[Order] = []
        self._first_shard = [0]
        for part, (num_shards, _) in enumerate(index.parts):
            self._rank_of_lane[self.part_of_lane == part] = np.arange(counts[part])
            first = self._first_shard[part]
            lengths = index.lengths[first : first + num_shards]
            own_seed = derive_seed(seed, "mixture", part)
            self._orders.append(
                Order(
                    lengths, lanes=counts[part], window=window, seed=own_seed, slot_rows=slot_rows
                )
            )
            self._first_shard.append(first + num_shards)

    def window_at(self, lane: int, row: int) -> Window:
        """The window of a lane that holds a row."""
        part = int(self.part_of_lane[lane])
        window = self._orders[part].window_at(int(self._rank_of_lane[lane]), row)
        base = self._first_shard[part]
        return replace(
            window, runs=tuple(run._replace(shard=run.shard + base) for run in window.runs)
        )


def make_order(
    index: ShardIndex, *, lanes: int, window: int, seed: int, slot_rows: int = 0
) -> Order | MixedOrder:
    """The order of a data set, or of the mixture that the index holds."""
    if not index.parts:
        return Order(index.lengths, lanes=lanes, window=window, seed=seed, slot_rows=slot_rows)
    return MixedOrder(index, lanes=lanes, window=window, seed=seed, slot_rows=slot_rows)


def quotas(weights: Sequence[float], lanes: int, *, key: str = "training.batch_size") -> list[int]:
    """Lanes of each data set: proportional to the weights, at least one, `lanes` in all.

    key: the config key that sets the number of lanes. Raises ConfigError when there are fewer
    lanes than data sets.
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


def _dealt(counts: Sequence[int]) -> np.ndarray:
    """For each lane its data set: at each lane the one that lags most behind its share."""
    total = sum(counts)
    given = np.zeros(len(counts))
    dealt = np.empty(total, np.int64)
    for lane in range(total):
        behind = np.array(counts) * (lane + 1) / total - given
        dealt[lane] = int(np.argmax(behind))
        given[dealt[lane]] += 1
    return dealt
