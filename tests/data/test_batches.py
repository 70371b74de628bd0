"""Batches of files of all kinds: the same from any layout, cached or decoded; at the sizes of
aspect buckets, or at their own."""

import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import written
from tests.support.picture_sources import encoded
from vae_dist.config.schema import DataConfig
from vae_dist.data import reader as reader_module
from vae_dist.data.buckets import arrange, aspect, make_buckets, nearest
from vae_dist.data.loader import EvaluationStream, TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.data.transforms import ImageSettings

BATCH, SIZE = 4, (8, 6)
KINDS = ("jpg", "large jpg", "grey jpg", "png", "masked", "no image", "cut jpg", "bad label")
LOST = ("no image", "cut jpg")  # without classes a label that cannot be read is none


def sample_of(kind, number):
    random = np.random.default_rng(number)
    height, width = (3 * SIZE[0], 4 * SIZE[1]) if kind == "large jpg" else SIZE
    image = random.integers(0, 256, (height, width, 3), np.uint8)
    suffix = "png" if kind in ("png", "masked") else "jpg"
    image = image[:, :, 0] if kind == "grey jpg" else image
    data = encoded(image) if suffix == "png" else encoded(image, "JPEG", quality=90)
    data = {"no image": b"none", "cut jpg": data[:-40]}.get(kind, data)
    sample = {suffix: data, "cls": b"four" if kind == "bad label" else b"%d" % number}
    mask = encoded(random.integers(0, 2, (height, width), np.uint8) * 255)
    return {**sample, "mask.png": mask} if kind == "masked" else sample


def shown(index, images, order, *, world=1, **keys):
    """Images, labels and masks of the global batches, and what they say of damage."""
    keys = {"batch_size": BATCH, "world": world, **keys}
    streams = [TrainingStream(index, order, images, rank=rank, **keys) for rank in range(world)]
    steps, skipped = [], Counter()
    for batches in zip(*streams, strict=True):
        skipped.update(sample for batch in batches for sample in batch.skipped)
        groups = [(g.images, g.labels, g.masks) for batch in batches for g in batch.groups]
        steps.append([torch.cat(p) for p in zip(*groups, strict=True) if p[0] is not None])
    for stream in streams:
        stream.close()
    return steps, skipped


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("most_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_batches_do_not_depend_on_cache_world_and_loader_processes(most_workers, data):
    draw = data.draw
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=BATCH, max_size=14))
    kinds.append("large jpg")  # which can replace what is lost
    start, stop = draw(st.integers(0, 3)), 3 * len(kinds) // BATCH + 2
    mask = draw(st.sampled_from(["none", "random", "half", "member"]))
    with tempfile.TemporaryDirectory() as folder:
        samples = [sample_of(kind, number) for number, kind in enumerate(kinds)]
        index = written(Path(folder) / "set", samples, 2)
        crop = draw(st.sampled_from(["center", "random"]))
        images = ImageSettings(3, SIZE, True, 2**16, crop, flip=draw(st.booleans()), mask=mask)
        window, seed = draw(st.integers(1, 5)), draw(st.integers(0, 99))
        order = Order(index.lengths, lanes=BATCH, window=window, seed=seed)
        keys = {"start_step": start, "stop_step": stop}
        want, skipped = shown(index, images, order, **keys)
        keys["cache_bytes"] = draw(st.sampled_from([0, 3000, 2**20]))
        keys["world"] = draw(st.sampled_from([1, 2, 4]))
        keys["workers"] = draw(st.integers(min(1, most_workers), most_workers))
        found, damaged = shown(index, images, order, **keys)
    assert len(found) == stop - start and damaged == skipped
    for mine, theirs in zip(found, want, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    refused = LOST if mask == "member" else (*LOST, "masked")
    lost = {(sample.shard, sample.index) for sample in skipped}
    assert len(lost) == sum(kind in refused for kind in kinds)


def test_each_image_is_decoded_and_read_once(tmp_path, monkeypatch):
    samples = [sample_of("large jpg", number) for number in range(12)]
    index = written(tmp_path / "set", samples, 2)
    order = Order(index.lengths, lanes=BATCH, window=2, seed=3)
    images = ImageSettings(3, SIZE, True, 2**16, flip=True)
    decoded, read = Mock(wraps=reader_module.decode_sample), Mock(wraps=SampleReader.read_many)
    monkeypatch.setattr(reader_module, "decode_sample", decoded)
    monkeypatch.setattr(SampleReader, "read_many", lambda self, parts: read(self, parts))
    keys = {"start_step": 0, "stop_step": 18}  # six epochs
    shown(index, images, order, **keys, cache_bytes=2**20)
    assert decoded.call_count == 12
    # the windows of one epoch, of one or two samples, and one ahead in each lane
    assert sum(len(call.args[1]) for call in read.call_args_list) <= 12 + 4
    shown(index, images, order, **keys, cache_bytes=6 * (8 * 6 * 3 + 300))
    assert decoded.call_count >= 12 + 6 + 6 * 5, "only six are kept"


RESOLUTION = {"area": 256, "multiple": 4, "max_aspect": 2.0}
SHAPES = [(30, 20), (20, 30), (16, 16), (24, 23), (60, 12), (12, 50), (20, 29), (17, 20)]
COUNT, SLOTS, PER_SLOT = 90, 8, 2


def test_buckets_are_the_largest_sizes_that_fit_and_images_of_one_aspect_go_together():
    upright = [(96, 40), (80, 48), (72, 56)]
    lying = [(width, height) for height, width in reversed(upright)]
    assert make_buckets(area=4096, multiple=8, max_aspect=3.0) == (*upright, (64, 64), *lying)
    assert make_buckets(area=5000, multiple=33, max_aspect=1.5) == ((66, 66),)
    assert make_buckets(area=1000, multiple=32, max_aspect=1.5) == ()
    buckets = make_buckets(area=65536, multiple=16, max_aspect=2.0)
    assert nearest(buckets, 0.0) == (256, 256) and len(buckets) == 11
    sizes = [(10, 20), (20, 10), None, (16, 14)] * 2
    order, chosen = arrange(sizes, buckets, slot_rows=2, generator=np.random.default_rng(0))
    assert order.tolist() == [1, 5, 6, 7, 3, 2, 0, 4]
    assert chosen == [(352, 176), (272, 240), (272, 240), (176, 352)]


def test_a_slot_has_one_bucket_and_in_an_evaluation_each_image_its_own(tmp_path, one_process):
    """Images of one colour, their number; what replaces a lost one has the size of its slot."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(COUNT)]
    colours = [np.full((*shape, 3), (i, i // 2, 7), np.uint8) for i, shape in enumerate(shapes)]
    samples = [{"png": encoded(image), "cls": b"%d" % i} for i, image in enumerate(colours)]
    for number in (lost := {3, 40, 41}):
        samples[number]["png"] = b"no PNG"
    index = written(tmp_path / "s", samples, 3)
    data = DataConfig(channels=3, resolution=RESOLUTION, max_pixels=10**6)
    images, shown = image_settings(index, data), []
    order = Order(index.lengths, lanes=SLOTS, window=8, seed=3, slot_rows=PER_SLOT)
    keys = {"batch_size": SLOTS * PER_SLOT, "slots": SLOTS, "start_step": 0, "stop_step": 14}
    for batch in TrainingStream(index, order, images, **keys):
        for group in batch.groups:
            assert (group.images[:, 0].flatten(1) == group.labels[:, None]).all()
            shown += [(tuple(group.images.shape[2:]), number) for number in group.labels.tolist()]
    assert {size for size, _ in shown} == set(images.buckets)
    assert {number for _, number in shown} == {*range(COUNT)} - lost
    assert np.median([abs(aspect(size) - aspect(shapes[n])) for size, n in shown]) < 0.25

    in_order, seen = [i for shard in range(3) for i in range(shard, COUNT, 3)], {}
    for rank in range(2):
        stream = EvaluationStream(index, images, batch_size=16, rank=rank, world=2, workers=2)
        batches = list(stream)
        assert sum(batch.is_first for batch in batches) == len(stream)
        for batch in batches:
            for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
                number = int(image[0, 0, 0])
                assert number == in_order[sample] and number not in seen
                seen[number] = tuple(image.shape[1:])
    own = {number: nearest(images.buckets, aspect(shape)) for number, shape in enumerate(shapes)}
    assert seen == {number: size for number, size in own.items() if number not in lost}
