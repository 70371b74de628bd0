"""Aspect buckets: their sizes, which images go together, and images of several sizes as they are.

That batches do not depend on the layout is shown in `test_loader`.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.conftest import damage, png
from vae_dist.config.schema import DataConfig
from vae_dist.data.buckets import arrange, aspect, make_buckets, nearest, square
from vae_dist.data.evaluation import EvaluationStream
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import make_order
from vae_dist.data.settings import image_settings
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

RESOLUTION = {"area": 256, "multiple": 4, "max_aspect": 2.0}
SHAPES = [(30, 20), (20, 30), (16, 16), (24, 23), (60, 12), (12, 50), (20, 29), (17, 20)]
COUNT, SLOTS, PER_SLOT, WINDOW = 90, 8, 2, 8
STEPS = 2 * COUNT // (SLOTS * PER_SLOT) + 3
IN_ORDER = [i for shard in range(3) for i in range(shard, COUNT, 3)]  # as the shards hold them
LOST = (3, 40, 41)

Shown = dict[tuple[int, int], tuple[tuple[int, int], list[int]]]  # (step, slot) -> size, images


@given(area=st.integers(1, 5000), multiple=st.integers(1, 40), max_aspect=st.floats(1, 6))
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


def test_images_of_one_aspect_go_together() -> None:
    buckets = make_buckets(area=65536, multiple=16, max_aspect=2.0)
    assert square(buckets) == (256, 256) and len(buckets) == 11
    assert nearest(buckets, math.log(3 / 2)) == (208, 304)
    assert nearest(buckets, math.log(10)) == (176, 352)
    sizes, buckets = [(10, 20), (20, 10), (16, 16)] * 4, make_buckets(**RESOLUTION)
    orders = set()
    for seed in range(4):
        generator = np.random.default_rng(seed)
        order, chosen = arrange(sizes, buckets, slot_rows=4, generator=generator)
        assert sorted(order.tolist()) == list(range(12))
        for slot, size in zip(order.reshape(-1, 4), chosen, strict=True):
            assert {nearest(buckets, aspect(sizes[i])) for i in slot} == {size}
        orders.add(tuple(order.tolist()))
    assert len(orders) == 4, "neighbours vary"


def make_index(folder: Path, lost: tuple[int, ...] = ()) -> ShardIndex:
    """Images of one colour, which is their number; three shards."""
    samples = (
        {
            "__key__": f"{i:04d}",
            "png": png(np.full((*SHAPES[i % len(SHAPES)], 3), (i, i // 2, 7), np.uint8)),
            "cls": str(i).encode(),
        }
        for i in range(COUNT)
    )
    paths = write_shards(samples, folder / "s", num_shards=3)
    for number in lost:
        damage(str(paths[number % 3]), number // 3, header=number == 40)
    return load_index(str(folder / "s"), key="data.train", create=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_index(tmp_path_factory.mktemp("buckets"))


def settings_of(index: ShardIndex, resolution: Any, **options: Any) -> ImageSettings:
    data = DataConfig(channels=3, resolution=resolution, max_pixels=10**6)
    return image_settings(index, data, **options)


def shown(
    index: ShardIndex, settings: ImageSettings, *, world: int = 1, start: int = 0, **keys: Any
) -> Shown:
    per_slot = PER_SLOT if settings.buckets else 1
    keys = {"stop_step": STEPS, **keys}
    slot_rows = per_slot if settings.buckets else 0
    order = make_order(index, lanes=SLOTS, window=WINDOW, seed=3, slot_rows=slot_rows)
    found: Shown = {}
    for rank in range(world):
        keys |= {"batch_size": SLOTS * per_slot, "slots": SLOTS, "rank": rank, "world": world}
        for batch in TrainingStream(index, order, settings, start_step=start, **keys):
            shapes = [group.images.shape[1:] for group in batch.groups]
            assert len(set(shapes)) == len(shapes)
            for group in batch.groups:
                numbers = group.images[:, 0, 0, 0]
                assert (group.images[:, 0].flatten(1) == numbers[:, None]).all()
                assert group.labels.tolist() == numbers.tolist()
                size = (group.images.shape[2], group.images.shape[3])
                slots = zip(group.slots, numbers.chunk(len(group.slots)), strict=True)
                for slot, own in slots:
                    assert len(own) == per_slot
                    found[batch.step, slot] = (size, own.tolist())
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_slot_has_one_of_the_buckets_and_what_replaces_a_lost_sample_its_size(
    tmp_path: Path,
) -> None:
    index = make_index(tmp_path, LOST)
    settings = settings_of(index, RESOLUTION)
    reference = shown(index, settings)
    assert {size for size, _ in reference.values()} == set(settings.buckets)
    distance = [
        abs(aspect(size) - aspect(SHAPES[number % len(SHAPES)]))
        for size, numbers in reference.values()
        for number in numbers
    ]
    assert np.median(distance) < 0.25
    assert {n for _, numbers in reference.values() for n in numbers} == {*range(COUNT)} - {*LOST}
    got = shown(index, settings, world=2, workers=2, start=5, stop_step=8)
    assert got == {key: value for key, value in reference.items() if 5 <= key[0] < 8}


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_shows_each_image_once_at_its_own_bucket(
    index: ShardIndex, one_process: None, world: int
) -> None:
    settings = settings_of(index, RESOLUTION).without_augmentation()
    seen: dict[int, tuple[int, int]] = {}
    for rank in range(world):
        stream = EvaluationStream(index, settings, batch_size=16, rank=rank, world=world, workers=2)
        batches = list(stream)
        assert Counter(batch.is_first for batch in batches)[True] == len(stream)
        for batch in batches:
            assert (batch.weights == 1).all() and len(batch.images) == len(batch.samples)
            for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
                assert int(image[0, 0, 0]) == IN_ORDER[sample] and sample not in seen
                seen[sample] = (image.shape[1], image.shape[2])
    own = [nearest(settings.buckets, aspect(SHAPES[n % len(SHAPES)])) for n in IN_ORDER]
    assert seen == dict(enumerate(own))


def test_native_images_of_any_size_are_slots_of_their_own(
    index: ShardIndex, one_process: None
) -> None:
    settings = settings_of(index, "native", any_size=True)
    found = shown(index, settings, stop_step=9)
    assert len(found) == 9 * SLOTS
    assert all(size == SHAPES[number % len(SHAPES)] for size, (number,) in found.values())
    assert shown(index, settings, stop_step=9, world=4, workers=2) == found
