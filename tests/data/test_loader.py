from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import LENGTHS, identities, png
from vae_dist.data import loader as stream_module
from vae_dist.data import windows as lane_module
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.tar import ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import Work
from vae_dist.data.writer import write_shards

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


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_layout_shows_the_same_steps(
    index: ShardIndex, marked: ImageSettings, one_process: None, world: int, workers: int
) -> None:
    got = global_batches(index, marked, world=world, workers=workers, start_step=0, stop_step=STEPS)
    assert got == expected()
    flat = [sample for step in range(STEPS) for sample in got[step]]
    for epoch in range(3):
        counts = Counter(flat[epoch * N : (epoch + 1) * N])
        assert len(counts) == N and set(counts.values()) == {1}


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (4, 0), (8, 3)])
def test_tars_without_an_index_show_the_same_steps(
    shards: str, tmp_path: Path, marked: ImageSettings, one_process: None, world: int, workers: int
) -> None:
    for tar in Path(shards).glob("*.tar"):
        shutil.copy(tar, tmp_path)
    index = load_index(str(tmp_path), key="data.train", create=True)
    layout = {"world": world, "workers": workers, "start_step": 5, "stop_step": 12}
    assert global_batches(index, marked, **layout) == expected(5, 12)


def test_resume_at_every_step(index: ShardIndex, marked: ImageSettings, one_process: None) -> None:
    for start in range(STEPS - 2):
        layout = {"world": (1, 2, 4)[start % 3], "workers": (0, 3)[start % 2]}
        got = global_batches(index, marked, start_step=start, stop_step=start + 2, **layout)
        assert got == expected(start, start + 2), start


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 3)])
def test_loader_processes(
    index: ShardIndex, marked: ImageSettings, world: int, workers: int
) -> None:
    got = global_batches(index, marked, world=world, workers=workers, start_step=7, stop_step=12)
    assert got == expected(7, 12)


def test_more_workers_than_lanes(
    index: ShardIndex, marked: ImageSettings, one_process: None
) -> None:
    got = global_batches(index, marked, world=4, workers=9, start_step=0, stop_step=3)
    assert got == expected(0, 3)


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


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("batch_size", "max_images"), [(5, None), (64, None), (3, 13), (1, 1)])
def test_evaluation_shows_each_image_once(
    index: ShardIndex,
    marked: ImageSettings,
    one_process: None,
    world: int,
    workers: int,
    batch_size: int,
    max_images: int | None,
) -> None:
    in_order = [(shard, i) for shard, length in enumerate(LENGTHS) for i in range(length)]
    seen: dict[int, tuple[int, int]] = {}
    sizes = []
    for rank in range(world):
        stream = EvaluationStream(
            index,
            marked,
            batch_size=batch_size,
            rank=rank,
            world=world,
            workers=workers,
            max_images=max_images,
        )
        batches = list(stream)
        assert len(stream) == len(batches)
        sizes.append([len(batch.images) for batch in batches])
        for batch in batches:
            for image, sample, weight, label in zip(
                identities(batch.images.numpy()),
                batch.samples.tolist(),
                batch.weights.tolist(),
                batch.labels.tolist(),
                strict=True,
            ):
                if weight:
                    assert sample not in seen and label == image[0]
                    seen[sample] = image
    assert all(size == sizes[0] for size in sizes)
    assert seen == dict(enumerate(in_order[:max_images]))


def test_evaluation_gives_lost_samples_no_weight(copied: Path, marked: ImageSettings) -> None:
    damaged = lose(copied, {(3, 4), (5, 41)})
    batches = list(EvaluationStream(damaged, marked, batch_size=16, workers=1))
    assert sum(float(batch.weights.sum()) for batch in batches) == N - 2
    assert [(s.index, s.replaced_by) for b in batches for s in b.skipped] == [(4, None), (41, None)]


def test_evaluation_can_be_iterated_again(index: ShardIndex, marked: ImageSettings) -> None:
    stream = EvaluationStream(index, marked, batch_size=50, world=2)
    first, second = ([b.samples.tolist() for b in stream] for _ in range(2))
    assert first == second


def test_random_crops_are_those_of_the_sample_in_every_layout(
    tmp_path: Path, one_process: None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8)
    samples = ({"__key__": f"{i:03d}", "png": png(pixels)} for i in range(16))
    write_shards(samples, tmp_path / "s", num_shards=2)
    index = load_index(str(tmp_path / "s"), key="data.train", create=False)
    settings = ImageSettings(1, (9, 4), True, 100, crop="random", flip=True)
    runs = [
        torch.cat(
            [
                torch.cat([b.groups[0].images for b in open_stream(index, settings, **layout)])
                for layout in layouts
            ]
        )
        for layouts in (
            [{"start_step": 0, "stop_step": 4}],
            [{"start_step": k, "stop_step": k + 1, "workers": 3} for k in range(4)],
        )
    ]
    assert torch.equal(*runs)
    epochs = runs[0].reshape(2, 16, -1)
    assert len(epochs[0].unique(dim=0)) > 8, "samples differ in their crops"
    assert {tuple(i) for i in epochs[0].tolist()} != {tuple(i) for i in epochs[1].tolist()}
