"""The samples of a run in its order: windows are read ahead, lost samples are replaced.

In: the reader, the order, one of its sequences and where to begin. Out: sample after sample. With
aspect buckets the sizes in the headers of a window's images decide which of them make a slot, and
its size.

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

from vae_dist.data.buckets import Size, arrange
from vae_dist.data.index import Run
from vae_dist.data.order import MixedOrder, Order, Window
from vae_dist.data.reader import LoadedSample, SampleReader, Samples, SkippedSample
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.randomness import numpy_generator

MAX_LOST_IN_A_ROW = 4096  # samples of a sequence; more is not damage but the wrong kind of data


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
            try:
                found = self._reader.read_many([runs for runs, _ in requests])
            except Exception as error:  # else what waits for this read would hang
                for _, future in requests:
                    future.set_exception(error)
            else:
                for (_, future), samples in zip(requests, found, strict=True):
                    future.set_result(samples)
            if None in wanted:
                return


class WindowReader:
    """Goes along one sequence of the order, from `row` on."""

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
        # what stands for the lost samples of this window, by size: its name, and the sample
        self._replacements: dict[Size | None, tuple[str, LoadedSample]] = {}

    def next(self, skipped: list[SkippedSample]) -> tuple[int, LoadedSample]:
        """The next sample, or its replacement, which is then added to `skipped`; and its shard."""
        if self._row == self._end_row:
            self._enter()
        place = self._row - self._window.first_row
        self._row += 1
        position = self._positions[place]
        size = self._sizes[place // self._order.slot_rows] if self._sizes else None
        epoch, shard, index = self._window.place(position)
        data = None if self._reader.is_cached(shard, index) else self._read()[position]
        try:
            return shard, self._reader.load(data, shard, index, epoch=epoch, size=size)
        except DamagedSampleError as error:
            lost = SkippedSample(self._reader.index.paths[shard], index, str(error), None)
        name, sample = self._replacement(size, lost)
        skipped.append(replace(lost, replaced_by=name))
        return shard, sample

    def _enter(self) -> None:
        """Go to the following window, and ask for the one after it."""
        window = self._window = self._following
        self._awaited, self._replacements = self._requested, {}
        self._end_row = window.end_row
        self._following = self._order.window_at(self._sequence, window.end_row)
        self._requested = self._request(self._following)
        shown = window.order
        if self._reader.settings.buckets:
            # in the window's permuted order, so that images of equal aspect are shuffled
            samples = self._read()
            place = (self._order.seed, "aspects", self._sequence, window.first_row)
            order, self._sizes = arrange(
                [self._reader.size_or_none(samples[p], window.place(p)[1]) for p in shown.tolist()],
                self._reader.settings.buckets,
                slot_rows=self._order.slot_rows,
                generator=numpy_generator(*place),
            )
            shown = shown[order]
        self._positions = shown.tolist()

    def _request(self, window: Window) -> Future[Samples] | None:
        """None where nothing need be read, as the cache has all."""
        samples = ((run.shard, index) for run in window.runs for index in range(*run[1:]))
        if all(self._reader.is_cached(shard, index) for shard, index in samples):
            return None
        return self._read_ahead.request(window.runs)

    def _read(self) -> Samples:
        """The undecoded samples of this window; waits for them."""
        if self._awaited is None:
            self._awaited = self._read_ahead.request(self._window.runs)
        return self._awaited.result()

    # what replaces a lost sample

    def _replacement(self, size: Size | None, lost: SkippedSample) -> tuple[str, LoadedSample]:
        """What stands for the lost samples of the current window. Raises ShardError."""
        if size not in self._replacements:
            candidates = (self._first_readable(window, size) for window in self._nearest_first())
            found = next(filter(None, candidates), None)
            if found is None:
                raise ShardError(
                    f"{MAX_LOST_IN_A_ROW} samples in a row cannot be read, the last is {lost}; "
                    "repair the shard, or take it out of the data set"
                )
            self._replacements[size] = found
        return self._replacements[size]

    def _nearest_first(self) -> Iterator[Window]:
        """This window, the earlier ones back to the first, then the later ones, as far as is
        looked."""
        yield self._window
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

    def _first_readable(self, window: Window, size: Size | None) -> tuple[str, LoadedSample] | None:
        is_mine = window is self._window
        samples = self._read() if is_mine else self._reader.read(window.runs)
        for position in window.order.tolist():
            epoch, shard, index = window.place(position)
            try:
                sample = self._reader.load(samples[position], shard, index, epoch=epoch, size=size)
            except DamagedSampleError:
                continue
            return self._reader.name(shard, index), sample
        return None
