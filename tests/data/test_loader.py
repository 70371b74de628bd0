from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import LENGTHS, identities
from vae_dist.data import evaluation as evaluation_module
from vae_dist.data import loader as stream_module
from vae_dist.data import windows as lane_module
from vae_dist.data.buckets import make_buckets
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import LoadedSample, SampleReader
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import Work

BATCH, WINDOW, SEED = 8, 4, 5
N = sum(LENGTHS)
STEPS = 3 * N // BATCH + 1  # three epochs and a little

Step = list[tuple[int, int]]


class InterleavedPool:
    """What loader processes do, in one process: each worker's shares, in turn."""

    def __init__(self, work: Work, *, num_workers: int) -> None:
        self.work, self.num_workers = work, num_workers

    def __iter__(self) -> Iterator[Any]:
        count = max(1, self.num_workers)
        turns = [self.work(worker, count) for worker in range(count)]
        while turns:
            for turn in list(turns):
                try:
                    yield next(turn)
                except StopIteration:
                    turns.remove(turn)

    def close(self) -> None:
        pass


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WorkerPool", InterleavedPool)


def open_stream(index: ShardIndex, settings: ImageSettings, **kwargs: Any) -> TrainingStream:
    order = Order(index.lengths, lanes=BATCH, window=WINDOW, seed=SEED)
    return TrainingStream(index, order, settings, batch_size=BATCH, **kwargs)


def global_batches(
    index: ShardIndex, settings: ImageSettings, *, world: int, **kwargs: Any
) -> dict[int, Step]:
    """Step -> identities in slot order, the ranks' parts put together."""
    steps: dict[int, Step] = {}
    for rank in range(world):
        for batch in open_stream(index, settings, rank=rank, world=world, **kwargs):
            (group,) = batch.groups
            share = BATCH // world
            assert group.slots == tuple(range(rank * share, (rank + 1) * share))
            assert group.images.shape == (share, *settings.shape)
            assert group.images.dtype == torch.uint8
            steps.setdefault(batch.step, []).extend(identities(group.images.numpy()))
    return steps


def expected(start: int = 0, stop: int = STEPS) -> dict[int, Step]:
    """The oracle: sample by sample from the order's arithmetic."""
    order = Order(LENGTHS, lanes=BATCH, window=WINDOW, seed=SEED)
    return {
        k: [order.sample_at(g)[1:] for g in range(k * BATCH, (k + 1) * BATCH)]
        for k in range(start, stop)
    }


@pytest.fixture
def index(shards: str) -> ShardIndex:
    return load_index(shards, key="data.train", create=False)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 3)])
def test_loader_processes(
    index: ShardIndex, marked: ImageSettings, world: int, workers: int
) -> None:
    got = global_batches(index, marked, world=world, workers=workers, start_step=7, stop_step=12)
    assert got == expected(7, 12)


def test_labels_and_shards_come_with_the_images(index: ShardIndex, marked: ImageSettings) -> None:
    for batch in open_stream(index, marked, start_step=0, stop_step=5):
        (group,) = batch.groups
        shards = [shard for shard, _ in identities(group.images.numpy())]
        assert group.labels.tolist() == shards and group.labels.dtype == torch.int64
        assert batch.shards == tuple(sorted({index.paths[shard] for shard in shards}))
        assert batch.skipped == ()


def test_global_generators_are_left_alone(index: ShardIndex, marked: ImageSettings) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(open_stream(index, marked, start_step=0, stop_step=1, workers=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


# Any shape of a data set, in memory

MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)


class Memory(SampleReader):
    """Samples that are their own place, some lost with buckets, each of a shape of its own."""

    def read_many(self, parts: Any) -> Any:
        return [
            [
                memoryview(bytes([shard, i // 256, i % 256]))
                for shard, start, stop in runs
                for i in range(start, stop)
            ]
            for runs in parts
        ]

    def prepare(
        self, data: Any, shard: int, index: int, *, size: Any = None, out: Any = None
    ) -> Any:
        if self.settings.buckets and is_lost(shard, index):
            raise DamagedSampleError("lost")
        marks = np.frombuffer(data, np.uint8)[:, None, None]
        if self.settings.buckets:
            return np.broadcast_to(marks, (3, *size))
        return marks.reshape(1, 1, 3)

    def load(self, sample: Any, shard: int, index: int, *, epoch: int) -> LoadedSample:
        if isinstance(sample, memoryview):
            sample = self.prepare(sample, shard, index)
        return LoadedSample(sample, shard)

    def size_or_none(self, data: Any, shard: int, index: int) -> tuple[int, int] | None:
        place = shard * 31 + index * 7
        return None if is_lost(shard, index) else (10 + place % 13, 10 + place % 17)


def is_lost(shard: int, index: int) -> bool:
    return (shard * 31 + index * 7) % 11 == 3


LENGTHS_OF_ANY = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
IN_MEMORY = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stream_module, evaluation_module):
        monkeypatch.setattr(module, "WorkerPool", InterleavedPool)
        monkeypatch.setattr(module, "SampleReader", Memory)


def batches_of(lengths: list[int], order: Order, images: ImageSettings, **kwargs: Any) -> Any:
    numbers = np.array(lengths, np.int64)
    index = ShardIndex(tuple(map(str, range(len(lengths)))), numbers, numbers)
    batch_size = order.lanes * max(1, order.slot_rows)
    return TrainingStream(index, order, images, batch_size=batch_size, **kwargs)


@given(
    lengths=LENGTHS_OF_ANY,
    slots=st.sampled_from([1, 2, 4, 8]),
    per_slot=st.integers(1, 3),
    window=st.integers(1, 20),
    workers=st.integers(0, 5),
    start=st.integers(0, 40),
    data=st.data(),
)
@IN_MEMORY
def test_streams_of_any_shape(
    in_memory: None,
    lengths: list[int],
    slots: int,
    per_slot: int,
    window: int,
    workers: int,
    start: int,
    data: st.DataObject,
) -> None:
    """Step k shows the samples k B, ..., (k + 1) B - 1 of the order, whoever reads them."""
    batch = slots * per_slot
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if slots % w == 0]))
    order = Order(lengths, lanes=batch, window=window, seed=1)
    got: dict[int, list[tuple[int, int]]] = {}
    for rank in range(world):
        layout = {"rank": rank, "world": world, "workers": workers, "slots": slots}
        steps = {"start_step": start, "stop_step": start + 5}
        for part in batches_of(lengths, order, MARKED, **layout, **steps):
            (group,) = part.groups
            assert group.slots == tuple(range(rank * slots // world, (rank + 1) * slots // world))
            got.setdefault(part.step, []).extend(identities(group.images.numpy()))
    for step in range(start, start + 5):
        want = [order.sample_at(g)[1:] for g in range(step * batch, (step + 1) * batch)]
        assert got[step] == want


@given(
    lengths=LENGTHS_OF_ANY,
    slots=st.sampled_from([1, 2, 4, 8]),
    per_slot=st.integers(1, 4),
    slots_of_window=st.integers(1, 5),
    workers=st.integers(0, 5),
    start=st.integers(0, 30),
    data=st.data(),
)
@IN_MEMORY
def test_bucketed_streams_of_any_shape(
    in_memory: None,
    lengths: list[int],
    slots: int,
    per_slot: int,
    slots_of_window: int,
    workers: int,
    start: int,
    data: st.DataObject,
) -> None:
    """A step shows the same, from wherever the stream was begun and however it is shared."""
    if all(is_lost(shard, i) for shard, n in enumerate(lengths) for i in range(n)):
        return  # nothing can replace anything
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if slots % w == 0]))
    window = per_slot * slots_of_window
    order = Order(lengths, lanes=slots, window=window, seed=1, slot_rows=per_slot)
    buckets = make_buckets(area=64, multiple=2, max_aspect=2.0)
    images = ImageSettings(3, (8, 8), True, 100, buckets=buckets)

    def shown(world: int, workers: int, start: int, stop: int) -> dict[tuple[int, int], Any]:
        found: dict[tuple[int, int], Any] = {}
        for rank in range(world):
            layout = {"rank": rank, "world": world, "workers": workers, "slots": slots}
            steps = {"start_step": start, "stop_step": stop}
            for part in batches_of(lengths, order, images, **layout, **steps):
                for group in part.groups:
                    size = tuple(group.images.shape[2:])
                    assert size in buckets
                    marks = group.images[:, :, 0, 0].reshape(len(group.slots), -1).tolist()
                    for slot, own in zip(group.slots, marks, strict=True):
                        assert (part.step, slot) not in found
                        found[part.step, slot] = (own, size)
        return found

    got = shown(world, workers, start, start + 3)
    from_the_beginning = shown(1, 0, 0, start + 3)
    assert got == {k: v for k, v in from_the_beginning.items() if k[0] >= start}


@given(
    lengths=LENGTHS_OF_ANY,
    batch_size=st.integers(1, 20),
    max_images=st.one_of(st.none(), st.integers(1, 60)),
    world=st.sampled_from([1, 2, 4]),
    workers=st.integers(0, 3),
)
@IN_MEMORY
def test_an_evaluation_shows_each_image_once(
    in_memory: None,
    lengths: list[int],
    batch_size: int,
    max_images: int | None,
    world: int,
    workers: int,
) -> None:
    """Over all ranks, in equal batches, and again when it is iterated again."""
    in_order = [(shard, i) for shard, length in enumerate(lengths) for i in range(length)]
    numbers = np.array(lengths, np.int64)
    index = ShardIndex(tuple(map(str, range(len(lengths)))), numbers, numbers)
    keys = {"batch_size": batch_size, "world": world, "workers": workers}
    streams = [
        EvaluationStream(index, MARKED, rank=rank, max_images=max_images, **keys)
        for rank in range(world)
    ]
    for _ in range(2):
        seen: dict[int, tuple[int, int]] = {}
        batches = [list(stream) for stream in streams]
        sizes = [[len(batch.images) for batch in of_rank] for of_rank in batches]
        assert all(size == sizes[0] and len(size) == len(streams[0]) for size in sizes)
        for batch in (batch for of_rank in batches for batch in of_rank):
            marks = identities(batch.images.numpy())
            for n, mark, weight in zip(
                batch.samples.tolist(), marks, batch.weights.tolist(), strict=True
            ):
                if weight:
                    assert n not in seen
                    seen[n] = mark
        assert seen == dict(enumerate(in_order[:max_images]))


# Damage. `lost` holds the samples that cannot be read.


def damage(path: str, index: int, *, header: bool) -> None:
    offset = int(np.fromfile(path + ".idx", "<u8")[index])
    with open(path, "r+b") as file:
        # the second member is the PNG: cls header and data take two blocks, its header the third
        file.seek(offset if header else offset + 3 * 512)
        file.write(b"\xff" * 64)


def expected_with_replacements(lost: set[tuple[int, int]], stop: int) -> dict[int, Step]:
    """The rule, done slowly: windows of a lane, their first readable sample, the nearest one."""
    order = Order(LENGTHS, lanes=BATCH, window=WINDOW, seed=SEED)
    lanes: list[list[tuple[int, int]]] = []
    for lane in range(BATCH):
        windows: list[list[tuple[int, int]]] = []
        row = 0
        while row <= 2 * stop + 20:
            window = order.window_at(lane, row)
            row = window.end_row
            windows.append([window.sample(int(position)) for position in window.order])
        donors = [next((s for s in window if s not in lost), None) for window in windows]
        rows: list[tuple[int, int]] = []
        for k, window in enumerate(windows):
            later = [d for d in donors[k:] if d is not None]
            earlier = [d for d in donors[: k + 1] if d is not None]
            donor = earlier[-1] if earlier else later[0]
            rows += [donor if sample in lost else sample for sample in window]
        lanes.append(rows)
    return {step: [rows[step] for rows in lanes] for step in range(stop)}


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def lose(folder: Path, lost: set[tuple[int, int]]) -> ShardIndex:
    for shard, i in lost:
        damage(str(folder / f"set-{shard:02d}.tar"), i, header=i % 2 == 0)
    return load_index(str(folder), key="data.train", create=False)


WHOLE_SHARDS = {(shard, i) for shard in (3, 5) for i in range(LENGTHS[shard])}


@pytest.mark.parametrize(
    "lost", [{(3, 4), (3, 5), (5, 40), (1, 0)}, WHOLE_SHARDS | {(6, 0), (6, 1), (7, 3)}]
)
def test_lost_samples_are_replaced_alike_in_every_layout(
    copied: Path, marked: ImageSettings, one_process: None, lost: set[tuple[int, int]]
) -> None:
    damaged = lose(copied, lost)
    stop = 2 * N // BATCH
    want = expected_with_replacements(lost, stop)
    for world, workers in ((1, 0), (4, 3)):
        layout = {"world": world, "workers": workers}
        assert global_batches(damaged, marked, start_step=0, stop_step=stop, **layout) == want
    for start in range(0, stop, 3):
        got = global_batches(damaged, marked, world=2, start_step=start, stop_step=start + 1)
        assert got == {start: want[start]}, start


def test_lost_samples_are_named_each_time(copied: Path, marked: ImageSettings) -> None:
    lost = {(3, 4), (5, 41)}
    damaged = lose(copied, lost)
    undamaged = expected()
    skipped = []
    for batch in open_stream(damaged, marked, start_step=0, stop_step=STEPS):
        assert len(batch.skipped) == sum(sample in lost for sample in undamaged[batch.step])
        skipped += batch.skipped
    assert {(s.shard, s.index) for s in skipped} == {(damaged.paths[s], i) for s, i in lost}
    reasons = {s.index: s.reason for s in skipped}
    assert "tar header" in reasons[4] and "PNG" in reasons[41]
    assert all(".tar sample " in str(s.replaced_by) for s in skipped)


def test_a_cut_shard_loses_its_tail_only(copied: Path, marked: ImageSettings) -> None:
    index = load_index(str(copied), key="data.train", create=False)
    os.truncate(index.paths[5], int(index.offsets(5)[20]) + 100)
    skipped = [
        s.index
        for batch in open_stream(index, marked, start_step=0, stop_step=N // BATCH)
        for s in batch.skipped
    ]
    assert set(skipped) <= set(range(20, 45)) and len(skipped) >= 20


def test_a_shard_that_is_gone_stops_the_run(copied: Path, marked: ImageSettings) -> None:
    index = load_index(str(copied), key="data.train", create=False)
    os.remove(index.paths[5])
    with pytest.raises(ShardError, match=r"set-05\.tar: cannot be read \(No such file"):
        list(open_stream(index, marked, start_step=0, stop_step=STEPS))


def test_any_error_of_the_reading_thread_reaches_who_waits(
    index: ShardIndex, marked: ImageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SampleReader, parts: Any) -> Any:
        raise MemoryError("no memory for a window")

    monkeypatch.setattr(SampleReader, "read_many", fail)
    with pytest.raises(MemoryError, match="no memory for a window"):
        next(iter(open_stream(index, marked, start_step=0, stop_step=1)))


def test_data_of_the_wrong_kind_stops_the_run(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_LOST_IN_A_ROW", 20)
    settings = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=2)
    with pytest.raises(ShardError, match=r"20 samples in a row .*data\.max_pixels=2"):
        next(iter(open_stream(index, settings, start_step=0, stop_step=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_native_images_of_two_sizes_are_refused(index: ShardIndex, workers: int) -> None:
    settings = ImageSettings(channels=1, size=(2, 5), resize=False, max_pixels=100)
    stream = open_stream(index, settings, start_step=0, stop_step=1, workers=workers)
    with pytest.raises(ShardError, match=r"^\S+ sample \d+: the image is 1 x 3 .* 2 x 5;"):
        next(iter(stream))


def test_workers_ignore_the_signals_of_their_group_and_end_with_close(
    index: ShardIndex, marked: ImageSettings
) -> None:
    stream = open_stream(index, marked, start_step=0, stop_step=10**6, workers=1)
    batches = iter(stream)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    for _ in range(8):
        next(batches)
    stream.close()
    deadline = time.monotonic() + 5
    while worker.is_alive() and time.monotonic() < deadline:
        worker.join(0.01)
    assert not worker.is_alive()


# Evaluation


def test_evaluation_gives_lost_samples_no_weight(copied: Path, marked: ImageSettings) -> None:
    damaged = lose(copied, {(3, 4), (5, 41)})
    batches = list(EvaluationStream(damaged, marked, batch_size=16, workers=1))
    assert sum(float(batch.weights.sum()) for batch in batches) == N - 2
    assert [(s.index, s.replaced_by) for b in batches for s in b.skipped] == [(4, None), (41, None)]
