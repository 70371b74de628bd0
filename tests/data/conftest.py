"""Small shards whose images say who they are: pixels (shard, index // 256, index % 256)."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.data import evaluation, loader, sources
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.indexing import write_info
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import Work
from vae_dist.data.writer import write_shards

LENGTHS = (0, 1, 7, 30, 2, 45, 19, 5, 1, 12)
BATCH, WINDOW, SEED = 8, 4, 5
STEPS = 3 * sum(LENGTHS) // BATCH + 1  # three epochs and a little
MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)

Step = list[tuple[int, int]]


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def marked_png(shard: int, index: int) -> bytes:
    return png(np.array([[shard, index // 256, index % 256]], np.uint8))


def identities(images: np.ndarray) -> list[tuple[int, int]]:
    """(shard, index) of each of the images (b, 1, 1, 3)."""
    return [(int(s), 256 * int(high) + int(low)) for s, high, low in images.reshape(-1, 3)]


def make_shards(folder: Path, lengths: Sequence[int] = LENGTHS) -> None:
    """One tar for each length, with sidecars, in a folder of their own."""
    folder.mkdir()
    for shard, length in enumerate(lengths):
        samples = (
            {"__key__": f"{i:04d}", "png": marked_png(shard, i), "cls": str(shard).encode()}
            for i in range(length)
        )
        (written,) = write_shards(samples, folder / "part", num_shards=1)
        for suffix in ("", ".idx"):
            Path(f"{written}{suffix}").rename(folder / f"set-{shard:02d}.tar{suffix}")
        shutil.rmtree(folder / "part")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards") / "set"
    make_shards(folder)
    return str(folder)


@pytest.fixture(scope="session")
def index(shards: str) -> ShardIndex:
    return load_index(shards, key="data.train", create=False)


@pytest.fixture
def copied(shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture
def folder(copied: Path) -> Path:
    """Shards with sidecars and `_info.json`, to be served."""
    write_info(sorted(copied.glob("*.tar")), split="train")
    return copied


def damage(path: str, index: int, *, header: bool) -> None:
    offset = int(np.fromfile(path + ".idx", "<u8")[index])
    with open(path, "r+b") as file:
        # the second member is the PNG: cls header and data take two blocks, its header the third
        file.seek(offset if header else offset + 3 * 512)
        file.write(b"\xff" * 64)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which no test waits for: its clock has only them."""
    waited: list[float] = []
    monkeypatch.setattr(sources, "sleep", waited.append)
    monkeypatch.setattr(sources, "clock", lambda: sum(waited))
    return waited


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
    for module in (loader, evaluation):
        monkeypatch.setattr(module, "WorkerPool", InterleavedPool)


def open_stream(index: ShardIndex, settings: ImageSettings = MARKED, **keys: Any) -> TrainingStream:
    order = Order(index.lengths, lanes=BATCH, window=WINDOW, seed=SEED)
    return TrainingStream(index, order, settings, batch_size=BATCH, **keys)


def global_batches(index: ShardIndex, *, world: int = 1, **keys: Any) -> dict[int, Step]:
    """Step -> identities in slot order, the ranks' parts put together."""
    steps: dict[int, Step] = {}
    for rank in range(world):
        for batch in open_stream(index, rank=rank, world=world, **keys):
            (group,) = batch.groups
            share = BATCH // world
            assert group.slots == tuple(range(rank * share, (rank + 1) * share))
            steps.setdefault(batch.step, []).extend(identities(group.images.numpy()))
    return steps


def expected(start: int = 0, stop: int = STEPS) -> dict[int, Step]:
    """The oracle: sample by sample from the order's arithmetic."""
    order = Order(LENGTHS, lanes=BATCH, window=WINDOW, seed=SEED)
    return {
        k: [order.sample_at(g)[1:] for g in range(k * BATCH, (k + 1) * BATCH)]
        for k in range(start, stop)
    }
