"""Features of a vision model in the shards: what is read of them, and how they go with an image."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from tests.data.conftest import png
from vae_dist.config.errors import ConfigError
from vae_dist.data.features import MEMBER, Features
from vae_dist.data.index import load_index
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import with_features
from vae_dist.data.tar import DamagedSampleError, ShardError
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards

NUM, SIZE, SHAPE = 24, (8, 8), (2, 1, 3)
SETTINGS = ImageSettings(3, SIZE, True, 2**16)


def picture(number):
    """Its left half has its number, its right half is 255."""
    image = np.full((*SIZE, 3), number, np.uint8)
    image[:, SIZE[1] // 2 :] = 255
    return image


def features(number):
    return np.arange(6, dtype=np.float16).reshape(SHAPE) + 10 * number


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "set"
    samples = (
        {
            "__key__": f"{number}",
            "png": png(picture(number)),
            MEMBER: Features(features(number), "model", "8x8").to_bytes(),
        }
        for number in range(NUM)
    )
    write_shards(samples, folder, num_shards=2)
    return load_index(str(folder), key="data.train", create=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("keys", [{}, {"flip": True}, {"resize": False, "any_size": True}])
def test_they_go_where_their_image_goes(keys, cache_bytes, workers, index):
    """Mirrored where it is mirrored, from any step on."""
    settings = with_features(index, replace(SETTINGS, **keys), vision="model", key="data.train")
    order, seen = Order(index.lengths, lanes=4, window=2, seed=3), {False: 0, True: 0}
    for start in (0, 7):
        for batch in TrainingStream(
            index,
            order,
            settings,
            batch_size=4,
            start_step=start,
            stop_step=20,
            workers=workers,
            cache_bytes=cache_bytes,
        ):
            for group in batch.groups:
                assert group.part(0, 1).features is not None
                for image, found in zip(group.images, group.features, strict=True):
                    is_mirrored = bool(image[0, 0, 0] == 255)
                    expected = features(int(image.min()))
                    expected = expected[..., ::-1] if is_mirrored else expected
                    assert np.array_equal(found.numpy(), expected)
                    seen[is_mirrored] += 1
    assert sum(seen.values()) == 4 * (20 + 13) and bool(seen[True]) == ("flip" in keys)


def test_shards_without_have_none(index, tmp_path):
    write_shards([{"__key__": "0", "png": png(picture(0))}], tmp_path / "set", num_shards=1)
    plain = load_index(str(tmp_path / "set"), key="data.train", create=False)
    assert with_features(plain, SETTINGS, vision="model", key="data.train") == SETTINGS
    settings = with_features(index, SETTINGS, vision="model", key="data.train")
    assert settings.without_augmentation() == SETTINGS
    with pytest.raises(ShardError, match=r"mix no shards with .* and without"):
        reader = SampleReader(plain, settings, seed=0)
        reader.load(reader.read(reader.in_order(0, 1))[0], 0, 0, epoch=0)


@pytest.mark.parametrize(
    ("settings", "vision", "message"),
    [
        (SETTINGS, "other", r"of \('model', '8x8', ''\), this run wants \('other'"),
        (replace(SETTINGS, size=(6, 4)), "model", "wants .*6x4.*; make them with"),
        (replace(SETTINGS, image_key="png"), "model", "wants .*'png'"),
        (replace(SETTINGS, crop="random"), "model", "data.crop=random shows other parts"),
        (replace(SETTINGS, buckets=(SIZE, (4, 16))), "model", "aspect buckets shows other parts"),
    ],
)
def test_features_of_what_is_not_shown_are_refused(settings, vision, message, index):
    with pytest.raises(ConfigError, match=message):
        found = with_features(index, settings, vision=vision, key="data.train")
        reader = SampleReader(index, found, seed=0)
        reader.load(reader.read(reader.in_order(0, 1))[0], 0, 0, epoch=0)


GOOD = {"metadata": {"model": "model", "image_size": "8x8"}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        (2**17).to_bytes(8, "little") + b" " * 2**17,
        safetensors.numpy.save({"features": features(0)}),
        safetensors.numpy.save({"other": features(0)}, **GOOD),
        safetensors.numpy.save({"features": features(0).astype(np.float64)}, **GOOD),
        safetensors.numpy.save({"features": features(0)[0]}, **GOOD),
        safetensors.numpy.save({"features": features(0)[:, :0]}, **GOOD),
        safetensors.numpy.save({"features": features(0) + np.float16(np.inf)}, **GOOD),
        Features(features(0), "model", "8x8").to_bytes()[:-1],
    ],
)
def test_what_is_no_features_is_damage(data):
    with pytest.raises(DamagedSampleError, match=f"no features in .{MEMBER}"):
        Features.from_bytes(data)


def test_another_shape_is_damage(index):
    settings = with_features(index, SETTINGS, vision="model", key="data.train")
    reader = SampleReader(index, replace(settings, features=(2, 1, 4)), seed=0)
    with pytest.raises(DamagedSampleError, match=r"features of shape \(2, 1, 3\)"):
        reader.load(reader.read(reader.in_order(0, 1))[0], 0, 0, epoch=0)
