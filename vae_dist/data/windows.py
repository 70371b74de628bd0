"""One lane, read row by row: it holds the undecoded samples of one window.

In: the reader, the order, a lane and the row to begin with. Out: images and labels, one for each
row, for ever; with aspect buckets slot by slot, each slot at the size of its bucket, which the
sizes in the headers of the window's images decide.

A lost sample keeps its place. It is replaced by the first readable sample of its window, in the
window's permuted order; if the window has none, by that of the lane's nearest earlier window that
has one, and if there is none, by that of the nearest later one. What replaces it takes the size of
its slot. The choice is a function of data and position, so every world size, worker count and
resume makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vae_dist.data.buckets import Size, arrange
from vae_dist.data.order import MixedOrder, Order, Window
from vae_dist.data.reader import LoadedSample, PlainJpeg, SampleReader, SkippedSample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.randomness import numpy_generator

MAX_LOST_IN_A_ROW = 4096  # samples of a lane; more is not damage but the wrong kind of data


class _Donor(NamedTuple):
    """What replaces lost samples, and where the window ends that it was found in."""

    end_row: int
    name: str
    sample: LoadedSample


class _Samples(Sequence[memoryview]):
    """The undecoded samples of a window, read together when the first one is asked for: of a data
    set whose images are all kept, none is."""

    def __init__(self, reader: SampleReader, window: Window) -> None:
        self._reader, self._window = reader, window
        self._read: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._window.order)

    def __getitem__(self, position: Any) -> Any:
        if not self._read:
            runs = self._window.runs
            self._read = [sample for run in runs for sample in self._reader.read(*run)]
        return self._read[position]


class Lane:
    """Iterates by `advance()` and `load()`; `shard` is that of the row's own sample."""

    def __init__(
        self, reader: SampleReader, order: Order | MixedOrder, lane: int, row: int
    ) -> None:
        self.reader, self.order, self.lane, self.row = reader, order, lane, row
        self.shard = -1
        self.window: Window | None = None
        self.samples: Sequence[memoryview] = ()
        self.shown: list[int] = []  # positions in the window, by row
        self.numbers: list[int] = []  # among all samples, by row, where images are kept
        self.sizes: list[Size] = []  # of the window's slots, with aspect buckets
        self.previous_row = -1  # first row of the window before this one
        self.donors: dict[Size | None, _Donor] = {}  # by the size that was asked for
        self.asked_row = -1  # first row of the window that the donors are for
        self.position, self.index = -1, -1  # of the row's sample, in the window and in its shard
        self.size: Size | None = None  # that this row's image is brought to

    def take(self, skipped: list[SkippedSample], room: np.ndarray | None = None) -> LoadedSample:
        """`advance`, then `load`."""
        self.advance()
        return self.load(skipped, room)

    def advance(self) -> None:
        """Go to the next row."""
        window = self._window()
        number = self.row - window.first_row
        self.row += 1
        self.size = self.sizes[number // self.order.slot_rows] if self.sizes else None
        self.position = self.shown[number]
        self.shard, self.index = window.sample(self.position)

    def plain_jpeg(self) -> PlainJpeg | None:
        """The sample of this row if it needs nothing but its decoding."""
        if self.reader.has_kept(self.shard, self.index):
            return None
        return self.reader.plain_jpeg(self.samples[self.position], self.shard, self.index)

    def load(self, skipped: list[SkippedSample], room: np.ndarray | None = None) -> LoadedSample:
        """The sample of this row, or its replacement, which is then noted in `skipped`.

        The image may be `room`, which is where the caller wants it.
        """
        assert self.window is not None
        try:
            return self._load(self.window, self.samples, self.position, self.size, room)
        except DamagedSampleError as error:
            donor = self._donor(self.window, self.size)
            path = self.reader.index.paths[self.shard]
            skipped.append(SkippedSample(path, self.index, str(error), donor.name))
            return donor.sample

    def next_number(self) -> int:
        """Of the next row's sample, among all samples, where images are kept as they are shown."""
        first_row = self._window().first_row
        return self.numbers[self.row - first_row]

    def pass_by(self) -> None:
        """Leave out the next row, whose image is taken from what is kept."""
        self.row += 1

    def next_numbers(self, count: int) -> list[int]:
        """Of the next rows, which are passed by."""
        found: list[int] = []
        while len(found) < count:
            start = self.row - self._window().first_row
            part = self.numbers[start : start + count - len(found)]
            self.row += len(part)
            found += part
        return found

    def _window(self) -> Window:
        """That of the next row."""
        if self.window is None or self.row == self.window.end_row:
            self._enter()
        assert self.window is not None
        return self.window

    def _enter(self) -> None:
        """Read the window of this row."""
        self.previous_row = -1 if self.window is None else self.window.first_row
        self.window = window = self.order.window_at(self.lane, self.row)
        self.samples = _Samples(self.reader, window)
        shown = window.order
        buckets = self.reader.settings.buckets
        if buckets:
            # in the window's permuted order, so that images of equal aspect are shuffled
            places = [(self.samples[p], window.sample(p)[0]) for p in window.order.tolist()]
            order, self.sizes = arrange(
                [self.reader.size_or_none(sample, shard) for sample, shard in places],
                buckets,
                slot_rows=self.order.slot_rows,
                generator=numpy_generator(self.order.seed, "aspects", self.lane, window.first_row),
            )
            shown = window.order[order]
        self.shown = shown.tolist()
        if self.reader.constant is not None:
            self.numbers = self.reader.numbers(window.runs)[shown].tolist()

    def _load(
        self,
        window: Window,
        samples: Sequence[memoryview],
        position: int,
        size: Size | None,
        room: np.ndarray | None = None,
    ) -> LoadedSample:
        epoch, shard, index = window.place(position)
        if size is None and (kept := self.reader.kept(shard, index, epoch=epoch)) is not None:
            return kept
        return self.reader.load(samples[position], shard, index, epoch=epoch, room=room, size=size)

    def _donor(self, window: Window, size: Size | None) -> _Donor:
        """What replaces a lost sample of the window that is being read."""
        known = None
        if self.asked_row != window.first_row:
            # If the window before asked too, its donor is the nearest for this one as well.
            before = self.donors if self.asked_row == self.previous_row else {}
            self.donors, known = {}, before.get(size)
            self.asked_row = window.first_row
        if size not in self.donors:
            donor = self._first_readable(window, self.samples, size)
            if donor is None and known is not None:
                if window.first_row - known.end_row >= MAX_LOST_IN_A_ROW:
                    raise self._too_many(window, size)
                donor = known
            self.donors[size] = donor or self._nearest_donor(window, size)
        return self.donors[size]

    def _first_readable(
        self, window: Window, samples: Sequence[memoryview], size: Size | None
    ) -> _Donor | None:
        for position in window.order.tolist():
            try:
                sample = self._load(window, samples, position, size)
            except DamagedSampleError:
                continue
            name = self.reader.name(*window.sample(position))
            return _Donor(window.end_row, name, sample)
        return None

    def _nearest_donor(self, lost: Window, size: Size | None) -> _Donor:
        """The donor of the nearest earlier window that has one, else of the nearest later one."""
        row = lost.first_row
        while row > 0:
            if lost.first_row - row >= MAX_LOST_IN_A_ROW:
                raise self._too_many(lost, size)
            window = self.order.window_at(self.lane, row - 1)
            donor = self._first_readable(window, _Samples(self.reader, window), size)
            if donor is not None:
                return donor
            row = window.first_row
        row = lost.end_row
        while row - lost.end_row < MAX_LOST_IN_A_ROW:
            window = self.order.window_at(self.lane, row)
            donor = self._first_readable(window, _Samples(self.reader, window), size)
            if donor is not None:
                return donor
            row = window.end_row
        raise self._too_many(lost, size)

    def _too_many(self, lost: Window, size: Size | None) -> ShardError:
        try:
            self._load(lost, self.samples, int(lost.order[0]), size)
            reason = "no reason"
        except DamagedSampleError as error:
            reason = str(error)
        name = self.reader.name(*lost.sample(int(lost.order[0])))
        return ShardError(
            f"{MAX_LOST_IN_A_ROW} samples in a row cannot be read, the last is {name}: {reason}; "
            "repair the shard, or take it out of the data set"
        )
