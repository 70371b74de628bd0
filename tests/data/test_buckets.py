"""Aspect buckets: their sizes, which images go together, and the batches of any layout."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.conftest import png
from tests.data.test_loader import InterleavedPool, damage
from vae_dist.config.schema import DataConfig
from vae_dist.data import loader as stream_module
from vae_dist.data.buckets import arrange, aspect, make_buckets, nearest, square
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order, make_order
from vae_dist.data.settings import image_settings
from vae_dist.data.tar import ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

RESOLUTION = {"area": 256, "multiple": 4, "max_aspect": 2.0}
SHAPES = [(30, 20), (20, 30), (16, 16), (24, 23), (60, 12), (12, 50), (20, 29), (17, 20)]
COUNT, SLOTS, PER_SLOT, WINDOW = 90, 8, 2, 8
BATCH = SLOTS * PER_SLOT
STEPS = 2 * COUNT // BATCH + 3
IN_ORDER = [i for shard in range(3) for i in range(shard, COUNT, 3)]  # as the shards hold them

Step = dict[int, tuple[tuple[int, int], list[int]]]  # slot -> size and numbers of its images


@given(
    area=st.integers(1, 5000),
    multiple=st.integers(1, 40),
    max_aspect=st.floats(1, 6),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_buckets_are_the_largest_sizes_that_fit(
    area: int, multiple: int, max_aspect: float
) -> None:
    buckets = make_buckets(area=area, multiple=multiple, max_aspect=max_aspect)
    assert bool(buckets) == (area >= multiple * multiple)
    assert {(w, h) for h, w in buckets} == set(buckets), "upright and lying images count alike"
    assert [aspect(size) for size in buckets] == sorted(aspect(size) for size in buckets)
    for h, w in buckets:
        assert h * w <= area and h % multiple == w % multiple == 0
        assert max(h, w) <= max_aspect * min(h, w) + 1e-6
        for taller, wider in ((h + multiple, w), (h, w + multiple)):
            too_long = max(taller, wider) > max_aspect * min(taller, wider)
            assert taller * wider > area or too_long


def test_the_buckets_of_a_common_choice() -> None:
    buckets = make_buckets(area=65536, multiple=16, max_aspect=2.0)
    assert square(buckets) == (256, 256) and len(buckets) == 11
    assert nearest(buckets, math.log(3 / 2)) == (208, 304)
    assert nearest(buckets, math.log(10)) == (176, 352)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=3, max_size=30))
@hypothesis_settings(max_examples=60, deadline=None)
def test_an_arrangement_uses_each_image_once(sizes: list[tuple[int, int]]) -> None:
    sizes = sizes[: len(sizes) // 3 * 3]
    buckets = make_buckets(**RESOLUTION)
    order, chosen = arrange(
        [None if i % 7 == 5 else size for i, size in enumerate(sizes)],
        buckets,
        slot_rows=3,
        generator=np.random.default_rng(0),
    )
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert len(chosen) == len(sizes) // 3 and set(chosen) <= set(buckets)


def test_images_of_one_aspect_go_together() -> None:
    sizes = [(10, 20), (20, 10), (16, 16)] * 4
    buckets = make_buckets(**RESOLUTION)
    orders = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        order, chosen = arrange(sizes, buckets, slot_rows=4, generator=generator)
        for slot, size in zip(order.reshape(-1, 4), chosen, strict=True):
            assert {nearest(buckets, aspect(sizes[i])) for i in slot} == {size}
        orders.append(order.tolist())
    assert len({tuple(order) for order in orders}) == 4, "neighbours vary"


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    lanes=st.integers(1, 8),
    slot_rows=st.integers(1, 5),
    slots_of_window=st.integers(1, 6),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_windows_over_epochs(
    lengths: list[int], lanes: int, slot_rows: int, slots_of_window: int
) -> None:
    """Each sample once per epoch on the tape; windows follow each other; each is whole slots."""
    window = slot_rows * slots_of_window
    order = Order(lengths, lanes=lanes, window=window, seed=1, slot_rows=slot_rows)
    total = sum(lengths)
    seen: Counter[tuple[int, int, int]] = Counter()
    for lane in range(lanes):
        row = 0
        while row * lanes < 3 * total:
            found = order.window_at(lane, row)
            assert found.first_row == row and len(found.order) % slot_rows == 0
            inside = row + int(found.order[0]) % len(found.order)
            again = order.window_at(lane, inside)
            assert again.runs == found.runs and (again.order == found.order).all()
            for position in range(len(found.order)):
                place = found.place(position)
                assert place[0] == ((row + position) * lanes + lane) // total
                seen[place] += 1
            row = found.end_row
    for epoch in range(3):
        counts = [n for (e, _, _), n in seen.items() if e == epoch]
        assert len(counts) == total and set(counts) == {1}


def make_index(folder: Path) -> ShardIndex:
    """Images of one colour, which is their number; three shards."""
    samples = (
        {
            "__key__": f"{i:04d}",
            "png": png(np.full((*SHAPES[i % len(SHAPES)], 3), (i, i // 2, 7), np.uint8)),
            "cls": str(i).encode(),
        }
        for i in range(COUNT)
    )
    write_shards(samples, folder / "s", num_shards=3)
    return load_index(str(folder / "s"), key="data.train", create=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_index(tmp_path_factory.mktemp("buckets"))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WorkerPool", InterleavedPool)


def bucketed(index: ShardIndex, **keys: Any) -> ImageSettings:
    return image_settings(
        index, DataConfig(channels=3, resolution=RESOLUTION, max_pixels=10**6, **keys)
    )


def steps_of(index: ShardIndex, *, world: int = 1, **kwargs: Any) -> dict[int, Step]:
    order = make_order(index, lanes=SLOTS, window=WINDOW, seed=3, slot_rows=PER_SLOT)
    settings = bucketed(index)
    found: dict[int, Step] = {}
    for rank in range(world):
        stream = TrainingStream(
            index, order, settings, batch_size=BATCH, slots=SLOTS, rank=rank, world=world, **kwargs
        )
        for batch in stream:
            shapes = [group.images.shape[1:] for group in batch.groups]
            assert len(set(shapes)) == len(shapes)
            for group in batch.groups:
                numbers = group.images[:, 0, 0, 0].tolist()
                assert (group.images[:, 0].flatten(1).unique(dim=1).shape[1]) == 1
                if not batch.skipped:
                    assert group.labels.tolist() == numbers
                for slot, own in zip(
                    group.slots, torch.tensor(numbers).chunk(len(group.slots)), strict=True
                ):
                    assert slot // (SLOTS // world) == rank
                    size = (group.images.shape[2], group.images.shape[3])
                    found.setdefault(batch.step, {})[slot] = (size, own.tolist())
    return found


@pytest.fixture(scope="module")
def reference(index: ShardIndex) -> dict[int, Step]:
    return steps_of(index, start_step=0, stop_step=STEPS)


def test_a_slot_has_one_of_the_buckets(index: ShardIndex, reference: dict[int, Step]) -> None:
    buckets = bucketed(index).buckets
    sizes = Counter(size for step in reference.values() for size, _ in step.values())
    assert set(sizes) == set(buckets)
    distance = [
        abs(aspect(size) - aspect(SHAPES[number % len(SHAPES)]))
        for step in reference.values()
        for size, numbers in step.values()
        for number in numbers
    ]
    assert np.median(distance) < 0.25


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_processes(index: ShardIndex, reference: dict[int, Step]) -> None:
    got = steps_of(index, world=2, workers=2, start_step=5, stop_step=8)
    assert got == {k: reference[k] for k in (5, 6, 7)}


def test_what_replaces_a_lost_sample_takes_the_size_of_its_slot(
    tmp_path: Path, reference: dict[int, Step], one_process: None
) -> None:
    index = make_index(tmp_path)
    lost = {number: (number % 3, number // 3) for number in (3, 40, 41)}
    for number, (shard, at) in lost.items():
        damage(index.paths[shard], at, header=number == 40)
    got = steps_of(index, start_step=0, stop_step=STEPS)
    shown = {n for step in got.values() for _, numbers in step.values() for n in numbers}
    assert not shown & set(lost) and len(shown) == COUNT - len(lost)
    assert all(len(numbers) == PER_SLOT for step in got.values() for _, numbers in step.values())
    for world, workers, start in ((2, 3, 0), (4, 1, 4), (1, 2, 7)):
        again = steps_of(index, world=world, workers=workers, start_step=start, stop_step=STEPS)
        assert again == {k: got[k] for k in range(start, STEPS)}


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_shows_each_image_once_at_its_own_bucket(
    index: ShardIndex, one_process: None, world: int
) -> None:
    settings = bucketed(index).without_augmentation()
    seen: dict[int, tuple[int, int]] = {}
    firsts = []
    for rank in range(world):
        stream = EvaluationStream(index, settings, batch_size=16, rank=rank, world=world, workers=2)
        batches = list(stream)
        firsts.append([batch.is_first for batch in batches].count(True))
        for batch in batches:
            assert batch.images.shape[0] == len(batch.samples)
            for sample, image, weight in zip(
                batch.samples.tolist(), batch.images, batch.weights.tolist(), strict=True
            ):
                assert weight == 1 and int(image[0, 0, 0]) == IN_ORDER[sample]
                assert sample not in seen
                seen[sample] = (image.shape[1], image.shape[2])
    assert firsts == [len(stream)] * world
    buckets = settings.buckets
    assert seen == {
        i: nearest(buckets, aspect(SHAPES[n % len(SHAPES)])) for i, n in enumerate(IN_ORDER)
    }


def test_native_images_of_any_size_are_slots_of_their_own(
    index: ShardIndex, one_process: None
) -> None:
    settings = image_settings(
        index, DataConfig(channels=3, resolution="native", max_pixels=10**6), any_size=True
    )
    order = Order(index.lengths, lanes=8, window=4, seed=3)
    runs = []
    for world, workers in ((1, 0), (4, 2)):
        found: dict[tuple[int, int], tuple[int, tuple[int, int]]] = {}
        for rank in range(world):
            stream = TrainingStream(
                index, order, settings, batch_size=8, start_step=0, stop_step=9,
                rank=rank, world=world, workers=workers,
            )  # fmt: skip
            for batch in stream:
                for group in batch.groups:
                    for slot, image in zip(group.slots, group.images, strict=True):
                        number, size = int(image[0, 0, 0]), (image.shape[1], image.shape[2])
                        assert size == SHAPES[number % len(SHAPES)]
                        found[batch.step, slot] = (number, size)
        assert len(found) == 9 * 8
        runs.append(found)
    assert runs[0] == runs[1]


def test_native_images_of_one_size_may_not_differ(index: ShardIndex) -> None:
    settings = image_settings(index, DataConfig(channels=3, resolution="native", max_pixels=10**6))
    order = Order(index.lengths, lanes=8, window=4, seed=3)
    stream = TrainingStream(index, order, settings, batch_size=8, start_step=0, stop_step=1)
    with pytest.raises(ShardError, match=r"share a size.*aspect buckets.*data\.slots=training"):
        next(iter(stream))
