"""The batches of a run are the same whatever reads them: kept or decoded images, worlds, workers,
rooms of a ring, places to resume at; for data of all kinds, damaged samples among them."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SkippedSample
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.workers import LoaderDied, deaths_explained
from vae_dist.data.writer import write_shards

BATCH, SIZE = 4, (8, 6)
KINDS = ("jpg", "large jpg", "grey jpg", "png", "no image", "cut jpg", "bad label")
Step = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]  # images, labels, masks


def sample_of(kind: str, number: int) -> dict[str, str | bytes]:
    random = np.random.default_rng(number)
    height, width = (3 * SIZE[0], 4 * SIZE[1]) if kind == "large jpg" else SIZE
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    file = io.BytesIO()
    image.convert("L" if kind == "grey jpg" else "RGB").save(
        file, "PNG" if kind == "png" else "JPEG", quality=90
    )
    data = {"no image": b"none", "cut jpg": file.getvalue()[:-40]}.get(kind, file.getvalue())
    label = "four" if kind == "bad label" else str(number)
    suffix = "png" if kind == "png" else "jpg"
    return {"__key__": f"{number:04d}", suffix: data, "cls": label.encode()}


def steps_of(
    index: ShardIndex,
    images: ImageSettings,
    order: Order,
    *,
    start: int,
    stop: int,
    world: int = 1,
    **kwargs: Any,
) -> tuple[list[Step], Counter[SkippedSample]]:
    """The global batches, and what they say of damage."""
    skipped: Counter[SkippedSample] = Counter()
    found: list[list[Any]] = []
    for rank in range(world):
        stream = TrainingStream(
            index,
            order,
            images,
            batch_size=BATCH,
            start_step=start,
            stop_step=stop,
            rank=rank,
            world=world,
            **kwargs,
        )
        mine = []
        for batch in stream:
            (group,) = batch.groups
            masks = None if group.masks is None else group.masks.clone()
            mine.append((group.images.clone(), group.labels.clone(), masks))
            skipped.update(batch.skipped)
        stream.close()
        found.append(mine)
    joined = [
        (
            torch.cat([part[0] for part in parts]),
            torch.cat([part[1] for part in parts]),
            None if parts[0][2] is None else torch.cat([part[2] for part in parts]),
        )
        for parts in zip(*found, strict=True)
    ]
    return joined, skipped


def assert_equal(found: list[Step], want: list[Step]) -> None:
    assert len(found) == len(want)
    for mine, theirs in zip(found, want, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)


def check(kinds: list[str], drawn: dict[str, Any], *, world: int, workers: int) -> None:
    start, window, seed = (drawn[k] for k in ("start", "window", "seed"))
    with tempfile.TemporaryDirectory() as folder:
        samples = [sample_of(kind, number) for number, kind in enumerate(kinds)]
        write_shards(samples, Path(folder) / "set", num_shards=2)
        index = load_index(str(Path(folder) / "set"), key="data.train", create=False)
        images = ImageSettings(3, SIZE, True, 2**16, flip=drawn["flip"], mask=drawn["mask"])
        order = Order(index.lengths, lanes=BATCH, window=window, seed=seed)
        stop = 3 * len(kinds) // BATCH + 2
        want, skipped = steps_of(index, images, order, start=start, stop=stop)
        found, damaged = steps_of(
            index,
            images,
            order,
            start=start,
            stop=stop,
            world=world,
            workers=workers,
            cache_bytes=drawn["cache_bytes"],
        )
        assert_equal(found, want)
        assert damaged == skipped
        if start == 0:
            # without classes a label that cannot be read is none
            lost = sum(kind in ("no image", "cut jpg") for kind in kinds)
            shown = stop * BATCH // len(kinds)  # whole epochs
            assert shown * lost <= skipped.total() <= (shown + 1) * lost


KIND = st.sampled_from(KINDS)
DATA = st.lists(KIND, min_size=BATCH, max_size=14).filter(
    lambda kinds: any("jpg" in kind and "cut" not in kind for kind in kinds)
)
DRAWN = st.fixed_dictionaries(
    {
        "start": st.integers(0, 3),
        "window": st.integers(1, 5),
        "seed": st.integers(0, 99),
        "cache_bytes": st.sampled_from([0, 2**20]),
        "flip": st.booleans(),
        "mask": st.sampled_from(["none", "random", "half", "member"]),
    }
)


@given(kinds=DATA, drawn=DRAWN, world=st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_kept_or_decoded_on_any_world(kinds: list[str], drawn: dict[str, Any], world: int) -> None:
    check(kinds, drawn, world=world, workers=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@given(kinds=DATA, drawn=DRAWN, world=st.sampled_from([1, 2]), workers=st.sampled_from([1, 2, 3]))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_through_loader_processes(
    kinds: list[str], drawn: dict[str, Any], world: int, workers: int
) -> None:
    check(kinds, drawn, world=world, workers=workers)


# loader processes


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    samples = [sample_of("png", number) for number in range(12)]
    write_shards(samples, tmp_path / "set", num_shards=2)
    return load_index(str(tmp_path / "set"), key="data.train", create=False)


def endless(index: ShardIndex) -> TrainingStream:
    order = Order(index.lengths, lanes=BATCH, window=2, seed=3)
    images = ImageSettings(3, SIZE, True, 2**16)
    return TrainingStream(
        index, order, images, batch_size=BATCH, workers=2, start_step=0, stop_step=10**6
    )


def children() -> Iterator[int]:
    for process in multiprocessing.active_children():
        if process.is_alive() and process.pid is not None:
            yield process.pid


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_killed_loader_process_is_an_error_and_ends_the_others(index: ShardIndex) -> None:
    batches = iter(endless(index))
    next(batches)
    before = list(children())
    os.kill(before[-1], signal.SIGKILL)
    with (
        pytest.raises(LoaderDied, match=r"a loader process died .*: ask for more memory"),
        deaths_explained("ask for more memory"),
    ):
        for _ in batches:
            pass
    del batches
    assert not set(children()) & set(before)
