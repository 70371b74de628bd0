"""Small shards whose images say who they are: pixels (shard, index // 256, index % 256)."""

import shutil
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from tests.support.picture_sources import encoded as png
from vae_dist.config.errors import ConfigError
from vae_dist.data import loader, sources
from vae_dist.data.index import index_shard, load_index, write_info, write_sidecar
from vae_dist.data.order import Order
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import ShardWriter, write_shards

LENGTHS = (0, 1, 7, 30, 2, 45, 19, 5, 1, 12)
BATCH, WINDOW, SEED = 8, 4, 5
STEPS = 3 * sum(LENGTHS) // BATCH + 1  # three epochs and a little
MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)


def marked_png(shard, index):
    return png(np.array([[shard, index // 256, index % 256]], np.uint8))


def identities(images):
    """(shard, index) of each of the images (b, 1, 1, 3)."""
    return [(int(s), 256 * int(high) + int(low)) for s, high, low in images.reshape(-1, 3)]


def load(spec, *, create=False):
    spec = str(spec) if isinstance(spec, Path) else spec
    return load_index(spec, key="data.train", create=create)


def refused(spec, message, *, create=False):
    with pytest.raises(ConfigError, match=message):
        load(spec, create=create)


def written(folder, samples, num_shards=1):
    """The samples, which get keys in their order, as shards in that folder."""
    keyed = ({"__key__": f"{i:04d}", **sample} for i, sample in enumerate(samples))
    write_shards(keyed, folder, num_shards=num_shards)
    return load(folder)


def make_shards(folder, lengths=LENGTHS):
    """One tar for each length, with sidecars."""
    folder.mkdir()
    for shard, length in enumerate(lengths):
        writer = ShardWriter(folder / f"set-{shard:02d}.tar")
        for i in range(length):
            label = str(shard).encode()
            writer.write({"__key__": f"{i:04d}", "png": marked_png(shard, i), "cls": label})
        writer.close()
        write_sidecar(writer.path, index_shard(writer.path))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    make_shards(folder := tmp_path_factory.mktemp("shards") / "set")
    return str(folder)


@pytest.fixture(scope="session")
def index(shards):
    return load(shards)


@pytest.fixture
def copied(shards, tmp_path):
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture
def folder(copied):
    """Shards with sidecars and `_info.json`, to be served."""
    write_info(sorted(copied.glob("*.tar")), split="train")
    return copied


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts, which no test waits for: its clock has only them."""
    waited = []
    monkeypatch.setattr(sources, "sleep", waited.append)
    monkeypatch.setattr(sources, "clock", lambda: sum(waited))
    return waited


class InterleavedPool:
    """What loader processes do, in one process: each worker's shares, in turn."""

    def __init__(self, work, *, num_workers):
        self.work, self.num_workers, self.close = work, num_workers, lambda: None

    def __iter__(self):
        count = max(1, self.num_workers)
        for parts in zip_longest(*(self.work(worker, count) for worker in range(count))):
            yield from (part for part in parts if part is not None)


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(loader, "WorkerPool", InterleavedPool)


def open_stream(index, settings=MARKED, **keys):
    order = Order(index.lengths, lanes=BATCH, window=WINDOW, seed=SEED)
    return loader.TrainingStream(index, order, settings, batch_size=BATCH, **keys)


def global_batches(index, *, world=1, **keys):
    """Step -> identities in slot order, the ranks' parts put together."""
    steps = {}
    for rank in range(world):
        for batch in open_stream(index, rank=rank, world=world, **keys):
            (group,) = batch.groups
            steps.setdefault(batch.step, []).extend(identities(group.images.numpy()))
    return steps


def sample_at(order, g):
    """(epoch, shard, index in the shard) of sample number g of the run."""
    row, lane = divmod(g, order.lanes)
    window = order.window_at(lane, row)
    return window.place(int(window.order[row - window.first_row]))


def expected(start=0, stop=STEPS):
    """The oracle: sample by sample from the order's arithmetic."""
    order = Order(LENGTHS, lanes=BATCH, window=WINDOW, seed=SEED)
    of_step = {k: range(k * BATCH, (k + 1) * BATCH) for k in range(start, stop)}
    return {k: [sample_at(order, g)[1:] for g in numbers] for k, numbers in of_step.items()}
