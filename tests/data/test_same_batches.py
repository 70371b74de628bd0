"""The batches of a run are the same whatever reads them: cached or decoded images, worlds, workers,
places to resume at; for data of all kinds, damaged samples among them."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
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
from vae_dist.data.writer import write_shards

BATCH, SIZE = 4, (8, 6)
KINDS = ("jpg", "large jpg", "grey jpg", "png", "masked", "no image", "cut jpg", "bad label")
LOST = ("no image", "cut jpg")  # without classes a label that cannot be read is none


def make_index(folder: Path, kinds: list[str]) -> ShardIndex:
    samples = [sample_of(kind, number) for number, kind in enumerate(kinds)]
    write_shards(samples, folder / "set", num_shards=2)
    return load_index(str(folder / "set"), key="data.train", create=False)


def sample_of(kind: str, number: int) -> dict[str, str | bytes]:
    random = np.random.default_rng(number)
    height, width = (3 * SIZE[0], 4 * SIZE[1]) if kind == "large jpg" else SIZE
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    file, suffix = io.BytesIO(), "png" if kind in ("png", "masked") else "jpg"
    image = image.convert("L" if kind == "grey jpg" else "RGB")
    image.save(file, "PNG" if suffix == "png" else "JPEG", quality=90)
    data = {"no image": b"none", "cut jpg": file.getvalue()[:-40]}.get(kind, file.getvalue())
    label = "four" if kind == "bad label" else str(number)
    found = {"__key__": f"{number:04d}", suffix: data, "cls": label.encode()}
    if kind == "masked":
        mask = random.integers(0, 2, (height, width), np.uint8) * 255
        Image.fromarray(mask).save(file := io.BytesIO(), "PNG")
        found["mask.png"] = file.getvalue()
    return found


def shown(
    index: ShardIndex, images: ImageSettings, order: Order, *, world: int = 1, **kwargs: Any
) -> tuple[list[list[torch.Tensor]], Counter[SkippedSample]]:
    """Images, labels and masks of the global batches, and what they say of damage."""
    skipped: Counter[SkippedSample] = Counter()
    ranks = []
    for rank in range(world):
        keys = {"batch_size": BATCH, "rank": rank, "world": world, **kwargs}
        stream, mine = TrainingStream(index, order, images, **keys), []
        for batch in stream:
            (group,) = batch.groups
            of_batch = (group.images, group.labels, group.masks)
            mine.append([tensor.clone() for tensor in of_batch if tensor is not None])
            skipped.update(batch.skipped)
        stream.close()
        ranks.append(mine)
    steps = zip(*ranks, strict=True)
    return [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in steps], skipped


def check(kinds: list[str], drawn: dict[str, Any], *, world: int, workers: int) -> None:
    start, stop = drawn["start"], 3 * len(kinds) // BATCH + 2
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(Path(folder), kinds)
        images = ImageSettings(3, SIZE, True, 2**16, flip=drawn["flip"], mask=drawn["mask"])
        order = Order(index.lengths, lanes=BATCH, window=drawn["window"], seed=drawn["seed"])
        steps = {"start_step": start, "stop_step": stop}
        want, skipped = shown(index, images, order, **steps)
        layout = {"world": world, "workers": workers, "cache_bytes": drawn["cache_bytes"]}
        found, damaged = shown(index, images, order, **steps, **layout)
    assert len(found) == len(want) and damaged == skipped
    for mine, theirs in zip(found, want, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    if start == 0:
        refused = LOST if drawn["mask"] == "member" else (*LOST, "masked")
        lost, epochs = sum(kind in refused for kind in kinds), stop * BATCH // len(kinds)
        assert epochs * lost <= skipped.total() <= (epochs + 1) * lost


DATA = st.lists(st.sampled_from(KINDS), min_size=BATCH, max_size=14).filter(
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
def test_cached_or_decoded_on_any_world(
    kinds: list[str], drawn: dict[str, Any], world: int
) -> None:
    check(kinds, drawn, world=world, workers=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@given(kinds=DATA, drawn=DRAWN, world=st.sampled_from([1, 2]), workers=st.sampled_from([1, 2, 3]))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_through_loader_processes(
    kinds: list[str], drawn: dict[str, Any], world: int, workers: int
) -> None:
    check(kinds, drawn, world=world, workers=workers)
