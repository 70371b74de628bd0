"""The samples of a run in its order: windows are read ahead, lost samples are replaced.

In: the reader, the order, one of its sequences (a lane) and where to begin. Out: for each place
the sample's number among all, then its image and label. With aspect buckets the sizes in the
headers of a window's images decide which of them make a slot, and its size.

A lost sample keeps its place. It is replaced by the first readable sample of its window, in the
window's permuted order; if the window has none, by that of the nearest earlier window of the
sequence that has one, and if there is none, by that of the nearest later one. What replaces it
takes the size of its slot. The choice is a function of data and position, so every world size,
worker count and resume makes the same one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from vae_dist.data.buckets import Size, arrange
from vae_dist.data.index import Run
from vae_dist.data.order import MixedOrder, Order, Window
from vae_dist.data.reader import LoadedSample, Prepared, SampleReader, SkippedSample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.randomness import numpy_generator

MAX_LOST_IN_A_ROW = 4096  # samples of a sequence; more is not damage but the wrong kind of data

Samples = list[memoryview]  # undecoded


class ReadAhead:
    """Reads windows in a thread: all that wait are read together."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self._waiting: queue.SimpleQueue[tuple[Sequence[Run], Future[Samples]] | None]
        self._waiting = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def request(self, runs: Sequence[Run]) -> Future[Samples]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_all, daemon=True)
            self._thread.start()
        future: Future[Samples] = Future()
        self._waiting.put((runs, future))
        return future

    def close(self) -> None:
        self._waiting.put(None)

    def _read_all(self) -> None:
        while True:
            wanted = [self._waiting.get()]
            while not self._waiting.empty():
                wanted.append(self._waiting.get())
            requests = [request for request in wanted if request is not None]
            found: Sequence[Samples | Exception]
            try:
                found = self._reader.read_many([runs for runs, _ in requests])
            except Exception as error:  # else what waits for this read would hang
                found = [error] * len(requests)
            for (_, future), samples in zip(requests, found, strict=True):
                if isinstance(samples, Exception):
                    future.set_exception(samples)
                else:
                    future.set_result(samples)
            if None in wanted:
                return


class _Replacement(NamedTuple):
    """What stands for lost samples, and where the window ends that it was found in."""

    end_row: int
    name: str
    sample: LoadedSample


class WindowReader:
    """Goes along one sequence of the order: `advance`, then `prepare` and `load` each place."""

    def __init__(
        self,
        reader: SampleReader,
        order: Order | MixedOrder,
        sequence: int,
        row: int,
        read_ahead: ReadAhead,
    ) -> None:
        self._reader, self._order, self._sequence, self._row = reader, order, sequence, row
        self._read_ahead = read_ahead
        self._window = self._following = order.window_at(sequence, row)
        self._requested = self._request(self._following)
        self._end_row = row  # of the current window: none is entered yet
        self._awaited: Future[Samples] | None = None
        self._samples: Samples = []  # of the current window, once they are there
        self._positions: list[int] = []  # in the window, in the order in which they are shown
        self._sizes: list[Size] = []  # of the window's slots, with aspect buckets
        self._first_row = self._previous_row = -1  # of the current window, and of the one before
        self._replacements: dict[Size | None, _Replacement] = {}  # by the size asked for
        self._replaced_row = -1  # first row of the window that these are for
        self.numbers: list[int] = []  # among all samples, in the order in which they are shown

    def advance(self, count: int) -> range:
        """The next `count` places, all of one window: what `prepare` and `load` take."""
        if self._row == self._end_row:
            self._enter()
        start = self._row - self._window.first_row
        self._row += count
        return range(start, start + count)

    def prepare(
        self, place: int, *, out: np.ndarray | None = None
    ) -> Prepared | DamagedSampleError | None:
        """A sample before it is decoded, or why it cannot be; None where the cache has its image.

        The image may come to be `out`, (C, H, W), where the caller wants it.
        """
        if self._reader.is_cached(self.numbers[place]):
            return None
        position, size = self._positions[place], self._size(place)
        return self._prepared(self._window, self._read(), position, size, out)

    def load(
        self,
        place: int,
        prepared: Prepared | DamagedSampleError | None,
        skipped: list[SkippedSample],
    ) -> LoadedSample:
        """Image and label of a sample, or of its replacement, which is then added to `skipped`."""
        position = self._positions[place]
        try:
            return self._loaded(self._window, prepared, position)
        except DamagedSampleError as error:
            replacement = self._replacement(self._size(place))
            shard, index = self._window.sample(position)
            path = self._reader.index.paths[shard]
            skipped.append(SkippedSample(path, index, str(error), replacement.name))
            return replacement.sample

    def _size(self, place: int) -> Size | None:
        return self._sizes[place // self._order.slot_rows] if self._sizes else None

    def _enter(self) -> None:
        """Go to the following window, and ask for the one after it."""
        self._window, self._awaited, self._samples = self._following, self._requested, []
        window = self._window
        self._previous_row, self._first_row = self._first_row, window.first_row
        self._end_row = window.end_row
        self._following = self._order.window_at(self._sequence, window.end_row)
        self._requested = self._request(self._following)
        shown = window.order
        if self._reader.settings.buckets:
            # in the window's permuted order, so that images of equal aspect are shuffled
            samples = self._read()
            order, self._sizes = arrange(
                [self._reader.size_or_none(samples[p], *window.sample(p)) for p in shown.tolist()],
                self._reader.settings.buckets,
                slot_rows=self._order.slot_rows,
                generator=numpy_generator(
                    self._order.seed, "aspects", self._sequence, window.first_row
                ),
            )
            shown = shown[order]
        self._positions = shown.tolist()
        self.numbers = self._reader.numbers(window.runs)[shown].tolist()

    def _request(self, window: Window) -> Future[Samples] | None:
        """None where nothing need be read, as the cache has all."""
        if self._reader.are_cached(self._reader.numbers(window.runs)):
            return None
        return self._read_ahead.request(window.runs)

    def _read(self) -> Samples:
        """The undecoded samples of this window; waits for them."""
        if not self._samples:
            awaited = self._awaited or self._read_ahead.request(self._window.runs)
            self._samples = awaited.result()
        return self._samples

    def _prepared(
        self,
        window: Window,
        samples: Samples,
        position: int,
        size: Size | None,
        out: np.ndarray | None = None,
    ) -> Prepared | DamagedSampleError:
        shard, index = window.sample(position)
        try:
            return self._reader.prepare(samples[position], shard, index, size=size, out=out)
        except DamagedSampleError as error:
            return error

    def _loaded(
        self, window: Window, prepared: Prepared | DamagedSampleError | None, position: int
    ) -> LoadedSample:
        if isinstance(prepared, DamagedSampleError):
            raise prepared
        epoch, shard, index = window.place(position)
        return self._reader.load(prepared, shard, index, epoch=epoch)

    # what replaces a lost sample

    def _replacement(self, size: Size | None) -> _Replacement:
        """What stands for the lost samples of the current window."""
        window, known = self._window, None
        if self._replaced_row != window.first_row:
            # where the window before had lost samples too, its replacement is the nearest one
            before = self._replacements if self._replaced_row == self._previous_row else {}
            self._replacements, known = {}, before.get(size)
            self._replaced_row = window.first_row
        if size not in self._replacements:
            found = self._first_readable(window, self._read(), size)
            if found is None and known is not None:
                if window.first_row - known.end_row >= MAX_LOST_IN_A_ROW:
                    raise self._too_many(window, size)
                found = known
            self._replacements[size] = found or self._nearest(window, size)
        return self._replacements[size]

    def _first_readable(
        self, window: Window, samples: Samples, size: Size | None
    ) -> _Replacement | None:
        for position in window.order.tolist():
            try:
                prepared = self._prepared(window, samples, position, size)
                sample = self._loaded(window, prepared, position)
            except DamagedSampleError:
                continue
            name = self._reader.name(*window.sample(position))
            return _Replacement(window.end_row, name, sample)
        return None

    def _nearest(self, lost: Window, size: Size | None) -> _Replacement:
        """From the nearest earlier window that has a readable sample, else the nearest later."""
        row = lost.first_row
        while row > 0 and lost.first_row - row < MAX_LOST_IN_A_ROW:
            window = self._order.window_at(self._sequence, row - 1)
            found = self._first_readable(window, self._reader.read_runs(window.runs), size)
            if found is not None:
                return found
            row = window.first_row
        if row > 0:
            raise self._too_many(lost, size)
        row = lost.end_row
        while row - lost.end_row < MAX_LOST_IN_A_ROW:
            window = self._order.window_at(self._sequence, row)
            found = self._first_readable(window, self._reader.read_runs(window.runs), size)
            if found is not None:
                return found
            row = window.end_row
        raise self._too_many(lost, size)

    def _too_many(self, lost: Window, size: Size | None) -> ShardError:
        position, reason = int(lost.order[0]), "no reason"
        try:
            self._loaded(lost, self._prepared(lost, self._read(), position, size), position)
        except DamagedSampleError as error:
            reason = str(error)
        return ShardError(
            f"{MAX_LOST_IN_A_ROW} samples in a row cannot be read, the last is "
            f"{self._reader.name(*lost.sample(position))}: {reason}; repair the shard, or take it "
            "out of the data set"
        )
