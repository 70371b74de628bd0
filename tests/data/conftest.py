"""Small shards whose images say who they are: pixels (shard, index // 256, index % 256)."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.data import loader, sources
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.indexing import index_shard, write_info, write_sidecar
from vae_dist.data.order import MixedOrder, Order
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import ShardWriter, write_shards

LENGTHS = (0, 1, 7, 30, 2, 45, 19, 5, 1, 12)
BATCH, WINDOW, SEED = 8, 4, 5
STEPS = 3 * sum(LENGTHS) // BATCH + 1  # three epochs and a little
MARKED = ImageSettings(channels=1, size=(1, 3), resize=False, max_pixels=100)

Step = list[tuple[int, int]]


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def marked_png(shard: int, index: int) -> bytes:
    return png(np.array([[shard, index // 256, index % 256]], np.uint8))


def identities(images: np.ndarray) -> list[tuple[int, int]]:
    """(shard, index) of each of the images (b, 1, 1, 3)."""
    return [(int(s), 256 * int(high) + int(low)) for s, high, low in images.reshape(-1, 3)]


def load(spec: object, *, create: bool = False) -> ShardIndex:
    spec = str(spec) if isinstance(spec, Path) else spec
    return load_index(spec, key="data.train", create=create)


def written(
    folder: Path, samples: Iterable[Mapping[str, str | bytes]], num_shards: int = 1
) -> ShardIndex:
    """The samples, which get keys in their order, as shards in that folder."""
    keyed = ({"__key__": f"{i:04d}", **sample} for i, sample in enumerate(samples))
    write_shards(keyed, folder, num_shards=num_shards)
    return load(folder)


def make_shards(folder: Path, lengths: Sequence[int] = LENGTHS) -> None:
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
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    make_shards(folder := tmp_path_factory.mktemp("shards") / "set")
    return str(folder)


@pytest.fixture(scope="session")
def index(shards: str) -> ShardIndex:
    return load(shards)


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

    def __init__(self, work: Any, *, num_workers: int) -> None:
        self.work, self.num_workers, self.close = work, num_workers, lambda: None

    def __iter__(self) -> Iterator[Any]:
        count = max(1, self.num_workers)
        turns = [self.work(worker, count) for worker in range(count)]
        while turns:
            for turn in list(turns):
                try:
                    yield next(turn)
                except StopIteration:
                    turns.remove(turn)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WorkerPool", InterleavedPool)


def open_stream(index: ShardIndex, settings: ImageSettings = MARKED, **keys: Any) -> Any:
    order = Order(index.lengths, lanes=BATCH, window=WINDOW, seed=SEED)
    return loader.TrainingStream(index, order, settings, batch_size=BATCH, **keys)


def global_batches(index: ShardIndex, *, world: int = 1, **keys: Any) -> dict[int, Step]:
    """Step -> identities in slot order, the ranks' parts put together."""
    steps: dict[int, Step] = {}
    for rank in range(world):
        for batch in open_stream(index, rank=rank, world=world, **keys):
            (group,) = batch.groups
            steps.setdefault(batch.step, []).extend(identities(group.images.numpy()))
    return steps


def sample_at(order: Order | MixedOrder, g: int) -> tuple[int, int, int]:
    """(epoch, shard, index in the shard) of sample number g of the run."""
    row, lane = divmod(g, order.lanes)
    window = order.window_at(lane, row)
    return window.place(int(window.order[row - window.first_row]))


def expected(start: int = 0, stop: int = STEPS) -> dict[int, Step]:
    """The oracle: sample by sample from the order's arithmetic."""
    order = Order(LENGTHS, lanes=BATCH, window=WINDOW, seed=SEED)
    of_step = {k: range(k * BATCH, (k + 1) * BATCH) for k in range(start, stop)}
    return {k: [sample_at(order, g)[1:] for g in numbers] for k, numbers in of_step.items()}
