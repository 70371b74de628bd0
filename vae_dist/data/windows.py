"""The samples of a run in its order: windows are read ahead, lost samples are replaced.

In: the reader, the order, one of its sequences and where to begin. Out: for each place the sample's
number among all, then its image and label. With aspect buckets the sizes in the headers of a
window's images decide which of them make a slot, and its size.

A lost sample keeps its place. It is replaced by the first readable sample of its window, in the
window's permuted order; if the window has none, by that of the nearest earlier window of the
sequence that has one, and if there is none, by that of the nearest later one. What replaces it
takes the size of its slot. The choice is a function of data and position, so every world size,
worker count and resume makes the same one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
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
        if self._thread is None:  # daemon: a process does not wait for a server when it ends
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
    """What stands for the lost samples of the window that begins at `row`."""

    row: int
    end_row: int  # of the window that it was found in
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
        self._positions: list[int] = []  # in the window, in the order in which they are shown
        self._sizes: list[Size] = []  # of the window's slots, with aspect buckets
        self._replacements: dict[Size | None, _Replacement] = {}  # of this window and the last one
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
        position = self._positions[place]
        shard, index = self._window.sample(position)
        try:
            data = self._read()[position]
            return self._reader.prepare(data, shard, index, size=self._size(place), out=out)
        except DamagedSampleError as error:
            return error

    def load(
        self,
        place: int,
        prepared: Prepared | DamagedSampleError | None,
        skipped: list[SkippedSample],
    ) -> LoadedSample:
        """Image and label of a sample, or of its replacement, which is then added to `skipped`."""
        epoch, shard, index = self._window.place(self._positions[place])
        try:
            if isinstance(prepared, DamagedSampleError):
                raise prepared
            return self._reader.load(prepared, shard, index, epoch=epoch)
        except DamagedSampleError as error:
            lost = SkippedSample(self._reader.index.paths[shard], index, str(error), None)
            replacement = self._replacement(self._size(place), lost)
            skipped.append(replace(lost, replaced_by=replacement.name))
            return replacement.sample

    def _size(self, place: int) -> Size | None:
        return self._sizes[place // self._order.slot_rows] if self._sizes else None

    def _enter(self) -> None:
        """Go to the following window, and ask for the one after it."""
        last, self._window, self._awaited = self._window, self._following, self._requested
        window = self._window
        self._end_row = window.end_row
        self._following = self._order.window_at(self._sequence, window.end_row)
        self._requested = self._request(self._following)
        known = self._replacements.items()
        self._replacements = {size: found for size, found in known if found.row == last.first_row}
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
        if self._awaited is None:
            self._awaited = self._read_ahead.request(self._window.runs)
        return self._awaited.result()

    # what replaces a lost sample

    def _replacement(self, size: Size | None, lost: SkippedSample) -> _Replacement:
        """What stands for the lost samples of the current window. Raises ShardError."""
        window, known = self._window, self._replacements.get(size)
        if known is None or known.row != window.first_row:
            found = self._first_readable(window, self._read(), size)
            if found is None and known is None:
                windows = ((w, self._reader.read_runs(w.runs)) for w in self._others())
                answers = (self._first_readable(*window, size) for window in windows)
                found = next(filter(None, answers), None)
            elif found is None and known and window.first_row - known.end_row < MAX_LOST_IN_A_ROW:
                found = known  # the window before had lost samples, too: its replacement is nearest
            if found is None:
                raise ShardError(
                    f"{MAX_LOST_IN_A_ROW} samples in a row cannot be read, the last is {lost}; "
                    "repair the shard, or take it out of the data set"
                )
            self._replacements[size] = known = found._replace(row=window.first_row)
        return known

    def _others(self) -> Iterator[Window]:
        """The earlier windows back to the first, then the later ones, as far as is looked."""
        first, row = self._window.first_row, self._window.first_row
        while row > 0:
            if first - row >= MAX_LOST_IN_A_ROW:
                return
            window = self._order.window_at(self._sequence, row - 1)
            yield window
            row = window.first_row
        row = self._window.end_row
        while row - self._window.end_row < MAX_LOST_IN_A_ROW:
            window = self._order.window_at(self._sequence, row)
            yield window
            row = window.end_row

    def _first_readable(
        self, window: Window, samples: Samples, size: Size | None
    ) -> _Replacement | None:
        for position in window.order.tolist():
            epoch, shard, index = window.place(position)
            try:
                prepared = self._reader.prepare(samples[position], shard, index, size=size)
                sample = self._reader.load(prepared, shard, index, epoch=epoch)
            except DamagedSampleError:
                continue
            name = self._reader.name(shard, index)
            return _Replacement(window.first_row, window.end_row, name, sample)
        return None
