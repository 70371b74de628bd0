"""Native images that differ in size or are too small: found before training, else by the reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.data import settings as sizes_module
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import (
    NativeSet,
    check_native_sizes,
    check_readable,
    image_settings,
    sampled_sizes,
)
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import ImageSettings, Need
from vae_dist.data.writer import write_shards

NEEDS = (Need("perceptual.kind=structure", shorter=11), Need("model.norm_groups=8", longer=13))


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def shards(folder: Path, *sizes: tuple[int, int], num_shards: int = 2) -> ShardIndex:
    """An image of each size, in turn; (0, 0) is no image."""
    samples = (
        {"__key__": f"{number:04d}", "png": png(*size) if any(size) else b"no PNG"}
        for number, size in enumerate(sizes)
    )
    write_shards(samples, folder, num_shards=num_shards)
    return load_index(str(folder), key="data.train", create=False)


def native(index: ShardIndex, **options: Any) -> ImageSettings:
    return image_settings(index, channels=3, resolution="native", max_pixels=10**6, **options)


def check(
    train: ShardIndex, validation: ShardIndex, *, limit: float = 0.01, **options: Any
) -> None:
    settings = native(train, **options)
    sets = [("data.train", train, settings), ("data.validation", validation, settings)]
    check_native_sizes([NativeSet(*one) for one in sets], max_skipped_fraction=limit)


def test_two_images_that_differ_are_named_with_the_ways_out(tmp_path: Path) -> None:
    same = shards(tmp_path / "same", *[(12, 16)] * 6)
    other = shards(tmp_path / "other", *[(12, 16)] * 3, (0, 0), (16, 12), (12, 16))
    check(same, same)
    for train, validation, key in ((other, same, "data.train"), (same, other, "data.validation")):
        with pytest.raises(ConfigError) as refused:
            check(train, validation)
        said = str(refused.value)
        assert said.startswith(f"data.resolution=native, {key}: {other.paths[0]} sample 2 is 16 x")
        assert f"but {train.paths[0]} sample 0 is 12 x 16; " in said
        for way in ("data.resolution=12", "aspect buckets", "data.slots=training.batch_size"):
            assert way in said


def test_images_of_any_size_may_differ_and_resized_ones_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = shards(tmp_path / "mixed", (12, 16), (16, 12), (40, 20))
    check(mixed, mixed, any_size=True, needs=NEEDS)
    monkeypatch.setattr(sizes_module, "sampled_sizes", None)
    check(mixed, mixed, any_size=True)
    resized = image_settings(mixed, channels=3, resolution=8, max_pixels=10**6)
    check_native_sizes([NativeSet("data.train", mixed, resized)], max_skipped_fraction=0)


def test_too_many_small_images_are_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, (8, 16), (12, 16), (30, 10), (12, 12))
    with pytest.raises(ConfigError) as refused:
        check(index, index, any_size=True, needs=NEEDS, limit=0.5)
    said = str(refused.value)
    assert "data.train: 3 of 4 images that were looked at are too small" in said
    assert (
        f"{index.paths[0]} sample 0: 8 x 16 pixels, and perceptual.kind=structure needs 11" in said
    )
    assert "data.max_skipped_fraction=0.5" in said and "data.resolution=N" in said
    check(index, index, any_size=True, needs=NEEDS, limit=0.75)


def test_a_small_image_is_lost_and_named_and_is_no_example_of_the_others(tmp_path: Path) -> None:
    index = shards(tmp_path, (8, 16), (12, 12), (12, 16), num_shards=1)
    settings = native(index, any_size=True, needs=NEEDS)
    assert settings.size == (12, 16)
    reader = SampleReader(index, settings, seed=0)
    for number, problem in (
        (0, "too small: 8 x 16 pixels, and perceptual.kind=structure needs 11 on the shorter side"),
        (1, "too small: 12 x 12 pixels, and model.norm_groups=8 needs 13 on the longer side"),
    ):
        with pytest.raises(DamagedSampleError) as lost:
            reader.load(reader.read(0, number, number + 1)[0], 0, number, epoch=0)
        assert str(lost.value) == problem
    assert reader.load(reader.read(0, 2, 3)[0], 0, 2, epoch=0).image.shape == (3, 12, 16)
    with pytest.raises(ConfigError, match=r"first images can be used; .*sample 0: 8 x 16 pixels"):
        native(index, any_size=True, needs=(Need("x", shorter=99),))


def test_what_is_looked_at_lies_evenly_and_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shards(tmp_path, *[(4, 4 + number) for number in range(21)], num_shards=3)
    settings = native(index)

    def widths() -> list[int]:
        return [size[1] - 4 for _, size in sampled_sizes(index, settings)]

    assert sorted(widths()) == list(range(21))
    in_order = widths()
    with monkeypatch.context() as patch:  # a shard that can only be read front to back
        patch.setattr(sizes_module, "is_pipe", lambda path: path == index.paths[1])
        assert widths() == in_order[:7] + in_order[14:]
    monkeypatch.setattr(sizes_module, "NUM_LOOKED_AT", 5)
    assert widths() == in_order[::5]
    monkeypatch.setattr(sizes_module, "MAX_BYTES", 3 * index.mean_sample_bytes)
    assert widths() == in_order[::10]
    monkeypatch.setattr(sizes_module, "MAX_BYTES", 0)
    assert widths() == [in_order[0], in_order[-1]]


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, *[(0, 0)] * 3, num_shards=1)
    settings = image_settings(index, channels=3, resolution=8, max_pixels=10**6)
    message = r"data\.validation: none of the first 3 samples can be read; .* sample 0: no readable"
    with pytest.raises(ConfigError, match=message):
        check_readable(index, settings, key="data.validation")
