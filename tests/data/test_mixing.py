from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import identities, make_shards
from tests.data.test_loader import one_process
from vae_dist.config.errors import ConfigError
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import MixedOrder, make_order, quotas
from vae_dist.data.transforms import ImageSettings

__all__ = ["one_process"]  # a fixture

BATCH, FIRST, SECOND = 8, (5, 0, 9), (3, 20, 1, 4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("mixture")
    make_shards(folder / "a", FIRST)
    make_shards(folder / "b", SECOND)
    parts = [{"path": str(folder / "a"), "weight": 1}, {"path": str(folder / "b"), "weight": 3}]
    return load_index(parts, key="data.train", create=False)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    st.integers(6, 300),
)
@settings(max_examples=60, deadline=None)
def test_quotas_follow_the_weights(weights: list[float], lanes: int) -> None:
    counts = quotas(weights, lanes)
    assert sum(counts) == lanes and min(counts) >= 1
    for weight, count in zip(weights, counts, strict=True):
        share = weight / sum(weights) * lanes
        assert count <= max(1, share + 1)


def test_too_few_lanes() -> None:
    with pytest.raises(ConfigError, match=r"mixes 3 data sets, but training.batch_size=2 is less"):
        quotas([1, 1, 1], 2)


def read(index: ShardIndex, *, world: int, workers: int, start: int, stop: int) -> dict[int, list]:
    order = make_order(index, lanes=BATCH, window=4, seed=3)
    marked = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)
    steps: dict[int, list] = {}
    for rank in range(world):
        stream = TrainingStream(
            index, order, marked, batch_size=BATCH, start_step=start, stop_step=stop,
            rank=rank, world=world, workers=workers,
        )  # fmt: skip
        for batch in stream:
            (group,) = batch.groups
            folder = [shard for shard, _ in identities(group.images.numpy())]
            assert len(folder) == BATCH // world
            steps.setdefault(batch.step, []).extend(identities(group.images.numpy()))
    return steps


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (4, 2), (8, 0)])
def test_every_layout_and_resume_shows_the_same_steps(
    mixture: ShardIndex, one_process: None, world: int, workers: int
) -> None:
    order = make_order(mixture, lanes=BATCH, window=4, seed=3)
    got = read(mixture, world=world, workers=workers, start=5, stop=25)
    marks = {i: (i if i < 3 else i - 3) for i in range(7)}  # shards are marked by their own folder
    for step in range(5, 25):
        want = [order.sample_at(g)[1:] for g in range(step * BATCH, (step + 1) * BATCH)]
        assert got[step] == [(marks[shard], index) for shard, index in want]


def test_every_data_set_has_its_share_and_its_epochs(mixture: ShardIndex) -> None:
    order = make_order(mixture, lanes=BATCH, window=4, seed=3)
    assert isinstance(order, MixedOrder)
    assert Counter(order.part_of_lane.tolist()) == {0: 2, 1: 6}
    for half in (order.part_of_lane[:4], order.part_of_lane[4:]):
        assert Counter(half.tolist()) == {0: 1, 1: 3}  # of each of two ranks
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for g in range(40 * BATCH):
        epoch, shard, index = order.sample_at(g)
        seen.setdefault((int(shard >= 3), epoch), []).append((shard, index))
    for part, lengths in ((0, FIRST), (1, SECOND)):
        for epoch in range(3):
            counts = Counter(seen[part, epoch])
            assert len(counts) == sum(lengths) and set(counts.values()) == {1}


def test_weights_belong_to_the_identity(mixture: ShardIndex, tmp_path: Path) -> None:
    folder = str(Path(mixture.paths[0]).parent)
    alone = load_index(folder, key="data.train", create=False)
    ones = [{"path": folder, "weight": w} for w in (1, 1)]
    more = [{"path": folder, "weight": w} for w in (1, 2)]
    prints = {load_index(spec, key="k", create=False).fingerprint for spec in (ones, more)}
    assert len(prints | {alone.fingerprint}) == 3
