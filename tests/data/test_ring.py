from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import LENGTHS, identities
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.ring import MAX_LENT, NUM_AHEAD, Ring
from vae_dist.data.transforms import ImageSettings

BATCH = 8
UINT8 = np.dtype(np.uint8)


def fill(ring: Ring, value: int) -> None:
    """What two workers do in a step."""
    for worker in range(2):
        room = ring.next_room(worker)
        assert room is not None
        room[worker::2] = value


def test_a_room_goes_round_once_its_tensor_is_gone() -> None:
    ring = Ring((2, 2, 2, 3), UINT8, num_workers=2)
    addresses = []
    for step in range(3 * (MAX_LENT + NUM_AHEAD)):
        ring.take_back()
        fill(ring, step)
        images = ring.lend()
        assert (images == step).all()
        addresses.append(images.data_ptr())
    assert len(set(addresses)) == MAX_LENT + NUM_AHEAD


def test_who_keeps_everything_keeps_it_unchanged() -> None:
    ring = Ring((2, 2, 2, 3), UINT8, num_workers=2)
    kept = []
    for step in range(20):
        ring.take_back()
        fill(ring, step)
        kept.append(ring.lend().permute(0, 3, 1, 2)[:1])  # a view keeps its room too
    assert [int(images.max()) for images in kept] == list(range(20))
    assert [int(images.min()) for images in kept] == list(range(20))
    del kept[0]
    for step in range(20, 30):
        ring.take_back()
        fill(ring, step)
        kept.append(ring.lend())
    assert [int(images.min()) for images in kept] == list(range(1, 30))


def test_rooms_begin_where_decoders_are_fast() -> None:
    ring = Ring((2, 4, 4, 1), np.dtype(np.uint16), num_workers=1)
    ring.next_room(0)
    images = ring.lend()
    assert images.data_ptr() % 32 == 16 and images.dtype == torch.uint16


def test_a_closed_ring_ends_its_workers() -> None:
    ring = Ring((1, 1, 1, 1), UINT8, num_workers=1)
    for _ in range(MAX_LENT + NUM_AHEAD):
        assert ring.next_room(0) is not None
    ring.close()
    assert ring.next_room(0) is None


@pytest.fixture
def stream(shards: str, marked: ImageSettings) -> TrainingStream:
    index: ShardIndex = load_index(shards, key="data.train", create=False)
    order = Order(index.lengths, lanes=BATCH, window=4, seed=5)
    kwargs: dict[str, Any] = {"start_step": 0, "stop_step": 24, "workers": 2}
    return TrainingStream(index, order, marked, batch_size=BATCH, **kwargs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_that_are_kept_are_not_written_over(stream: TrainingStream) -> None:
    order = Order(LENGTHS, lanes=BATCH, window=4, seed=5)
    batches = list(stream)
    for step, batch in enumerate(batches):
        want = [order.sample_at(g)[1:] for g in range(step * BATCH, (step + 1) * BATCH)]
        assert identities(batch.groups[0].images.numpy()) == want
        assert batch.groups[0].labels.tolist() == [shard for shard, _ in want]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("how", ["close", "break"])
def test_workers_that_wait_for_a_room_end_at_once(stream: TrainingStream, how: str) -> None:
    batches = iter(stream)
    next(batches)
    time.sleep(0.3)  # until the rooms are full
    begun = time.perf_counter()
    if how == "close":
        stream.close()
    del batches
    assert time.perf_counter() - begun < 2
