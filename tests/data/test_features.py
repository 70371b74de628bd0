"""Features of a vision model in the shards: what is read of them, and how they go with an image."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from tests.data.conftest import written
from tests.support.picture_sources import encoded
from vae_dist.config.errors import ConfigError
from vae_dist.data.features import MEMBER, Features
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import with_features
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings

SIZE = (8, 8)
PLAIN = ImageSettings(3, SIZE, True, 2**16)


def features(number):
    return np.arange(6, dtype=np.float16).reshape(2, 1, 3) + 10 * number


def picture(number):
    """Its left half has its number, its right half is 255."""
    image = np.full((*SIZE, 3), number, np.uint8)
    image[:, SIZE[1] // 2 :] = 255
    return {"png": encoded(image)}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    stored = [Features(features(number), "model", "8x8").to_bytes() for number in range(24)]
    samples = [{**picture(number), MEMBER: data} for number, data in enumerate(stored)]
    return written(tmp_path_factory.mktemp("features") / "set", samples, num_shards=2)


def with_those_of(index, settings, vision="model"):
    return with_features(index, settings, vision=vision)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("keys", [{}, {"flip": True}, {"resize": False, "any_size": True}])
def test_they_go_where_their_image_goes(keys, cache_bytes, workers, index):
    """Mirrored where it is mirrored."""
    settings = with_those_of(index, replace(PLAIN, **keys))
    order, mirrored = Order(index.lengths, lanes=4, window=2, seed=3), []
    more = {"start_step": 7, "stop_step": 27, "workers": workers, "cache_bytes": cache_bytes}
    for batch in TrainingStream(index, order, settings, batch_size=4, **more):
        for group in batch.groups:
            assert group.part(0, 1).features is not None
            for image, found in zip(group.images, group.features, strict=True):
                mirrored.append(bool(image[0, 0, 0] == 255))
                expected = features(int(image.min()))
                assert np.array_equal(found, expected[..., ::-1] if mirrored[-1] else expected)
    assert len(mirrored) == 4 * 20 and any(mirrored) == ("flip" in keys)


def load_first(index, settings):
    reader = SampleReader(index, settings, seed=0)
    return reader.load(reader.read(reader.in_order(0, 1))[0], 0, 0, epoch=0)


def test_features_that_do_not_fit_are_refused(index, tmp_path):
    for keys, vision, message in (
        ({}, "other", r"of \('model', '8x8', ''\), this run wants \('other'"),
        ({"size": (6, 4)}, "model", "wants .*6x4.*; make them with"),
        ({"image_key": "png"}, "model", "wants .*'png'"),
        ({"crop": "random"}, "model", "data.crop=random shows other parts"),
        ({"buckets": (SIZE, (4, 16))}, "model", "aspect buckets shows other parts"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_first(index, with_those_of(index, replace(PLAIN, **keys), vision))
    plain, settings = written(tmp_path / "set", [picture(0)]), with_those_of(index, PLAIN)
    assert with_those_of(plain, PLAIN) == settings.without_augmentation() == PLAIN
    with pytest.raises(ShardError, match=r"mix no shards with .* and without"):
        load_first(plain, settings)
    with pytest.raises(DamagedSampleError, match=r"features of shape \(2, 1, 3\)"):
        load_first(index, replace(settings, features=(2, 1, 4)))


def test_what_is_no_features_is_damage():
    values, whole = features(0), Features(features(0), "model", "8x8").to_bytes()
    facts = {"model": "model", "image_size": "8x8"}
    for data in (
        b"\xff" * 64,
        whole[:-1],
        safetensors.numpy.save({"features": values}),
        safetensors.numpy.save({"other": values}, facts),
        safetensors.numpy.save({"features": values.astype(np.float64)}, facts),
        safetensors.numpy.save({"features": values[0]}, facts),
        safetensors.numpy.save({"features": values[:, :0]}, facts),
        safetensors.numpy.save({"features": values + np.float16(np.inf)}, facts),
    ):
        with pytest.raises(DamagedSampleError, match=f"no features in .{MEMBER}"):
            Features.from_bytes(data)
