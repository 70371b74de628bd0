"""Step k shows what the order says, whoever reads it; a lost sample is replaced by one rule."""

import multiprocessing
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import conftest as shared
from tests.data.conftest import MARKED, identities, load, open_stream
from vae_dist.data.buckets import make_buckets
from vae_dist.data.index import ShardIndex
from vae_dist.data.loader import EvaluationStream, TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import LoadedSample, SampleReader
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import LoaderDied, deaths_explained

BUCKETS = make_buckets(area=64, multiple=2, max_aspect=2.0)


class Memory(SampleReader):
    """Samples that are their own place. Some are lost; each has its own shape, where it may."""

    lost_of = 0  # one in so many is lost

    @classmethod
    def is_lost(cls, place):
        return cls.lost_of > 0 and (place[0] * 31 + place[1] * 7) % cls.lost_of == 1

    def read_many(self, parts):
        return [
            [memoryview(bytes([run.shard, 0, i])) for run in runs for i in range(*run[1:])]
            for runs in parts
        ]

    def load(self, data, shard, index, *, epoch, size=None):
        if (own := self.size_or_none(data, shard)) is None:
            raise DamagedSampleError("lost")
        size = size or (own if self.settings.any_size else self.settings.size)
        marks = np.frombuffer(data, np.uint8)[:, None, None]
        return LoadedSample(np.broadcast_to(marks, (3, *size)), shard)

    def size_or_none(self, data, shard):
        place = (shard, data[2])
        return None if self.is_lost(place) else shape_of(place)


def shape_of(place):
    number = place[0] * 31 + place[1] * 7
    return 10 + number % 13, 10 + number % 17


def places_of(images):
    return identities(images[:, :, 0, 0].numpy())


@pytest.fixture
def in_memory(one_process, monkeypatch):
    monkeypatch.setattr("vae_dist.data.loader.SampleReader", Memory)


def index_of(lengths):
    numbers = np.array(lengths, np.int64)
    return ShardIndex(tuple(map(str, range(len(lengths)))), numbers, numbers)


def by_the_rule(order, stop, is_lost):
    """What each step shows, done slowly: windows of a lane, their first readable sample, the
    nearest earlier one, else the nearest later one."""
    lanes = []
    for lane in range(order.lanes):
        parts, donors, rows, row = [], [], [], 0
        while row < stop or not any(donors):
            window = order.window_at(lane, row)
            row = window.end_row
            parts.append([window.place(int(position))[1:] for position in window.order])
            donors.append(next((place for place in parts[-1] if not is_lost(place)), None))
        for k, places in enumerate(parts):
            donor = next(filter(None, [*donors[k::-1], *donors[k:]]))
            rows += [donor if is_lost(place) else place for place in places]
        lanes.append(rows)
    return [[rows[step] for rows in lanes] for step in range(stop)]


LENGTHS_OF_ANY = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
IN_MEMORY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@given(data=st.data())
@IN_MEMORY
def test_streams_of_any_shape(in_memory, data):
    """A step shows the same, from wherever the stream began and however it is shared; without
    buckets the samples k B, ..., (k + 1) B - 1 of the order."""
    draw = data.draw
    lengths, Memory.lost_of = draw(LENGTHS_OF_ANY), draw(st.sampled_from([0, 2, 11]))
    places = [(shard, i) for shard, n in enumerate(lengths) for i in range(n)]
    if all(map(Memory.is_lost, places)):
        return  # nothing can replace anything
    kind, start = draw(st.sampled_from(["one", "any", "buckets"])), draw(st.integers(0, 30))
    slots, bucketed = draw(st.sampled_from([1, 2, 4, 8])), kind == "buckets"
    per_slot = 1 if kind == "any" else draw(st.integers(1, 4))
    batch, buckets = slots * per_slot, BUCKETS if bucketed else ()
    images = ImageSettings(3, (8, 8), kind != "any", 100, buckets=buckets, any_size=kind == "any")
    lanes, rows = (slots, per_slot) if bucketed else (batch, 0)
    window = per_slot * draw(st.integers(1, 5))
    order = Order(lengths, lanes=lanes, window=window, seed=1, slot_rows=rows)

    def shown(world, workers, start):
        """By step and slot the places and the size; by step what was lost, and the shards."""
        found, lost, shards = {}, Counter(), set()
        for rank in range(world):
            keys = {"rank": rank, "world": world, "workers": workers, "slots": slots}
            keys |= {"batch_size": batch, "start_step": start, "stop_step": stop}
            for part in TrainingStream(index_of(lengths), order, images, **keys):
                lost.update((part.step, s.shard, s.index) for s in part.skipped)
                shards.update((part.step, shard) for shard in part.shards)
                assert [g.slots for g in part.groups] == sorted(g.slots for g in part.groups)
                for group in part.groups:
                    size, marks = tuple(group.images.shape[2:]), places_of(group.images)
                    assert group.labels.tolist() == [shard for shard, _ in marks]
                    own = {"buckets": BUCKETS, "any": tuple(map(shape_of, marks))}
                    assert size in own.get(kind, [images.size])
                    for n, slot in enumerate(group.slots):
                        assert slot // (slots // world) == rank and (part.step, slot) not in found
                        found[part.step, slot] = marks[n * per_slot : (n + 1) * per_slot], size
        return found, lost, shards

    stop = start + 3
    worlds = st.sampled_from([w for w in (1, 2, 4, 8) if slots % w == 0])
    got, lost, shards = shown(draw(worlds), draw(st.sampled_from([0, 2, 3])), start)
    assert got.keys() == {(step, slot) for step in range(start, stop) for slot in range(slots)}
    whole = shown(1, 0, 0)
    assert got == {k: v for k, v in whole[0].items() if k[0] >= start}
    assert lost == Counter({k: n for k, n in whole[1].items() if k[0] >= start})
    assert shards == {k for k in whole[2] if k[0] >= start}
    for step, want in enumerate([] if bucketed else by_the_rule(order, stop, Memory.is_lost)):
        places = [shared.sample_at(order, g)[1:] for g in range(step * batch, (step + 1) * batch)]
        assert [place for slot in range(slots) for place in whole[0][step, slot][0]] == want
        of_step = Counter((step, str(s), i) for s, i in places if Memory.is_lost((s, i)))
        assert of_step == Counter({k: n for k, n in whole[1].items() if k[0] == step})
        assert {k for k in whole[2] if k[0] == step} == {(step, str(s)) for s, _ in places}


@given(data=st.data())
@IN_MEMORY
def test_an_evaluation_shows_each_image_once(in_memory, data):
    """Over all ranks, in equal batches, and again when it is iterated again; lost ones and padding
    have no weight."""
    draw = data.draw
    lengths, Memory.lost_of = draw(LENGTHS_OF_ANY), draw(st.sampled_from([0, 2, 11]))
    world, limit = draw(st.sampled_from([1, 2, 4])), draw(st.none() | st.integers(1, 60))
    places = [(shard, i) for shard, n in enumerate(lengths) for i in range(n)][:limit]
    keys = {"batch_size": draw(st.integers(1, 20)), "workers": draw(st.integers(0, 3))}
    keys |= {"world": world, "max_images": limit}
    index, images = index_of(lengths), ImageSettings(3, (2, 2), True, 100)
    streams = [EvaluationStream(index, images, rank=rank, **keys) for rank in range(world)]
    for _ in range(2):
        batches = [list(stream) for stream in streams]
        sizes = [[len(batch.images) for batch in of_rank] for of_rank in batches]
        assert all(size == sizes[0] and len(size) == len(streams[0]) for size in sizes)
        seen, skipped = {}, []
        for batch in (batch for of_rank in batches for batch in of_rank):
            skipped += [(int(sample.shard), sample.index) for sample in batch.skipped]
            shown = zip(batch.samples.tolist(), places_of(batch.images), batch.weights, strict=True)
            for n, mark, weight in shown:
                assert weight == (n >= 0) and n not in seen
                if weight:
                    seen[n] = mark
        assert sorted(skipped) == [place for place in places if Memory.is_lost(place)]
        assert seen == {n: p for n, p in enumerate(places) if p not in skipped}


def test_lost_samples_are_named_and_replaced_and_a_shard_that_is_gone_stops_the_run(copied):
    """Damaged ones, and of a shard that was cut its tail only."""
    index, lost = load(copied), {(3, 4), (8, 0), *((5, i) for i in range(20, 45))}

    def offset_of(shard, i):
        return int(np.fromfile(index.paths[shard] + ".idx", "<u8")[i])

    # a header, and a PNG: a label and its header lie before that, and its own header
    for shard, i, header in ((3, 4, True), (8, 0, False)):
        with open(index.paths[shard], "r+b") as file:
            file.seek(offset_of(shard, i) + (0 if header else 3 * 512))
            file.write(b"\xff" * 64)
    os.truncate(index.paths[5], offset_of(5, 20) + 100)
    order = Order(shared.LENGTHS, lanes=shared.BATCH, window=shared.WINDOW, seed=shared.SEED)
    rule, undamaged = by_the_rule(order, shared.STEPS, lost.__contains__), shared.expected()
    skipped, steps = [], {"start_step": 0, "stop_step": shared.STEPS}
    for batch in open_stream(index, **steps):
        assert identities(batch.groups[0].images.numpy()) == rule[batch.step]
        assert len(batch.skipped) == sum(sample in lost for sample in undamaged[batch.step])
        skipped += batch.skipped
    reasons = {(sample.shard, sample.index): sample.reason for sample in skipped}
    assert reasons.keys() == {(index.paths[shard], i) for shard, i in lost}
    assert "tar header" in reasons[index.paths[3], 4] and "PNG" in reasons[index.paths[8], 0]
    assert all(".tar sample " in str(sample.replaced_by) for sample in skipped)
    os.remove(index.paths[5])
    problem = r"set-05\.tar: cannot be read \(No such file.*put it back or repair it"
    with pytest.raises(ShardError, match=problem):
        list(open_stream(index, **steps))


def test_any_error_of_the_reading_thread_reaches_who_waits(index, monkeypatch):
    monkeypatch.setattr(SampleReader, "read_many", Mock(side_effect=MemoryError("no memory")))
    with pytest.raises(MemoryError, match="no memory"):
        next(iter(open_stream(index, start_step=0, stop_step=1)))


def test_data_of_the_wrong_kind_stops_the_run(index, monkeypatch):
    monkeypatch.setattr("vae_dist.data.windows.MAX_LOST_IN_A_ROW", 20)
    one_size = r"^\S+ sample \d+: the image is 1x3 .* 2x5; .*share a size.*aspect buckets.*slots="
    for images, message in (
        (replace(MARKED, max_pixels=2), r"20 samples in a row .*data\.max_pixels=2"),
        (replace(MARKED, size=(2, 5)), one_size),
    ):
        with pytest.raises(ShardError, match=message):  # as it was raised in the loader process
            next(iter(open_stream(index, images, start_step=0, stop_step=1, workers=1)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("ending", ["close", "kill"])
def test_loader_processes(index, ending):
    """They change nothing, nor does what they draw; they ignore the signals of their group, and end
    together, by close or when one of them is killed, which is an error."""
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    stream = open_stream(index, start_step=7, stop_step=1000, workers=3)
    batches = iter(stream)
    held = [next(batches)]
    first, *others = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(first.pid, number)
    held += [next(batches) for _ in range(8)]
    shown = {batch.step: identities(batch.groups[0].images.numpy()) for batch in held}
    assert shown == shared.expected(7, 16)
    assert len(others) == 2 and all(worker.is_alive() for worker in (first, *others))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    if ending == "close":
        stream.close()
    else:
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(LoaderDied) as died, deaths_explained("ask for more memory"):
            list(batches)
        assert re.search("a loader process died .*: ask for more memory", str(died.value))
    assert not multiprocessing.active_children()
