"""Size, crop and mirror; masks, of samples or drawn, that follow their image; labels.

That batches with masks do not depend on the layout is shown in `test_batches`.
"""

import json
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate, max_pool2d

from tests.data.conftest import written
from tests.support.picture_sources import encoded, npy
from vae_dist.config.schema import DataConfig
from vae_dist.data.decode import decode_sample
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import DRAWN, ImageSettings, draw_mask, fit, label_of, resized_mask

PHOTO = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)


def fitted(image, size, **keys):
    return fit(image, ImageSettings(len(image), size, True, 10**6, **keys), size, None)


@pytest.mark.parametrize("size", [(20, 20), (40, 20), (13, 31), (50, 50), (40, 60)])
def test_center_crop_of_the_covering_size_is_that_of_pillow(size):
    """Of bytes, which are clipped between rows and columns, and of wider levels."""
    scale = max(size[0] / 40, size[1] / 60)
    height, width = round(40 * scale), round(60 * scale)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2

    def by_pillow(planes):
        images = (Image.fromarray(plane) for plane in planes)
        resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        return np.array(resized)[:, top : top + size[0], left : left + size[1]]

    for channels in (1, 3):
        got = fitted(PHOTO[:channels], size)
        assert got.shape == (channels, *size) and got.dtype == np.uint8
        assert np.abs(got.astype(int) - by_pillow(PHOTO[:channels])).max() <= 2
    floats = (PHOTO / 127.5 - 1).astype(np.float32)
    want = by_pillow(floats).clip(-1, 1)
    np.testing.assert_allclose(fitted(floats, size, bits=32), want, atol=1e-4)
    deep = fitted(PHOTO.astype(np.uint16) * 257, size, bits=16)
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 32767.5 - 1, want, atol=1e-4)
    with pytest.raises(DamagedSampleError, match="before the crop"):
        fitted(np.zeros((1, 1, 400_000), np.uint8), size)


@pytest.mark.parametrize("bits", [8, 16])
def test_crops_and_mirrors_are_drawn_for_each_epoch_and_sample(tmp_path, bits):
    row = np.arange(256, dtype=f"u{bits // 8}")[None]
    index = written(tmp_path / "set", [{"npy": npy(row)}] * 8, num_shards=2)
    images = ImageSettings(1, (1, 253), True, 10**6, crop="random", flip=True, bits=bits)

    def drawn(images):
        """First column and whether it is mirrored, of each sample in each of 25 epochs."""
        reader, found = SampleReader(index, images, seed=0), np.zeros((8, 25, 2), int)
        samples = enumerate(reader.read(reader.in_order(0, 8)))
        for (n, data), epoch in product(samples, range(25)):
            (got,) = reader.load(data, n // 4, n % 4, epoch=epoch).image[0]
            left, is_mirrored = int(got.min()), got[0] > got[1]
            assert (got == row[0, left : left + 253][:: -1 if is_mirrored else 1]).all()
            found[n, epoch] = left, is_mirrored
        return found

    found = drawn(images)
    assert set(map(tuple, found.reshape(-1, 2).tolist())) == set(product(range(4), range(2)))
    assert 70 < found[:, :, 1].sum() < 130
    assert len({of_sample.tobytes() for of_sample in found}) == 8
    assert len({found[:, epoch].tobytes() for epoch in range(25)}) == 25
    assert (drawn(images) == found).all()
    assert (drawn(images.without_augmentation()) == [1, 0]).all()


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawn_mask_belongs_to_seed_epoch_and_sample(kind):
    def drawn(fraction=0.5, sample=0, epoch=0):
        return draw_mask(kind, (28, 20), fraction, seed=3, epoch=epoch, sample=sample)

    mask = drawn()
    assert mask.dtype == np.uint8 and mask.shape == (1, 28, 20)
    assert (mask == drawn()).all() and {0, 1} == set(np.unique(mask))
    assert len({drawn(sample=s, epoch=e).tobytes() for s in range(4) for e in range(4)}) >= 4
    for fraction in (0.05, 0.3, 0.5, 0.9, 1.0) if kind != "half" else (0.5,):
        missing = [1 - drawn(fraction, sample).mean() for sample in range(200)]
        assert np.mean(missing) == pytest.approx(fraction, abs=0.015)
        if kind != "random":
            assert max(abs(m - fraction) for m in missing) < 0.06
    seen = [1 - drawn(0.2, sample) for sample in range(400)]
    assert np.mean(np.sum(seen, 0, float) > 0) > 0.99, "missing parts lie anywhere"
    assert kind != "half" or len({mask.tobytes() for mask in seen}) == 4


@settings(max_examples=60, deadline=None)
@given(
    have=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    # torch 2.13 gives all rows of an image of one column the values of the first
    want=st.tuples(st.integers(1, 24), st.integers(2, 24)),
    seed=st.integers(0, 1000),
)
def test_what_counts_after_resizing_holds_nothing_of_missing_pixels(have, want, seed):
    generator = np.random.default_rng(seed)
    mask = np.ones((1, *have), np.uint8)
    for _ in range(generator.integers(1, 4)):
        mask[0, generator.integers(have[0]), generator.integers(have[1])] = 0
    image = torch.from_numpy(generator.random((1, 1, *have)))
    other = torch.where(torch.from_numpy(mask)[None] > 0, image, 1000.0)
    one, two = (
        interpolate(x, want, mode="bicubic", antialias=True)[0].numpy() for x in (image, other)
    )
    target, differs = resized_mask(mask, want), np.abs(one - two) > 1e-9
    assert target.shape == (1, *want) and not (differs & (target > 0)).any()
    # the filter has zeros, beside pixels that it reaches
    near = max_pool2d(torch.from_numpy(differs).double(), 5, stride=1, padding=2).numpy() > 0
    assert near[target == 0].all(), "no pixel is lost without need"


SIZE = (12, 16)


def pictures(channels):
    """Images (H, W, C) and what is observed of them: missing pixels are white, others darker."""
    generator = np.random.default_rng(0)
    for _ in range(12):
        observed = np.ones(SIZE, bool)
        top, left = generator.integers(6), generator.integers(8)
        observed[top : top + 6, left : left + 7] = False
        pixels = generator.integers(0, 200, (*SIZE, channels), dtype=np.uint8)
        yield np.where(observed[..., None], pixels, 255).astype(np.uint8), observed


def sample(kind, pixels, observed):
    if kind == "alpha":
        return {"png": encoded(np.dstack([pixels, np.where(observed, 255, 90).astype(np.uint8)]))}
    if kind == "nan":
        planes = np.where(observed, pixels.transpose(2, 0, 1) / 127.5 - 1, np.nan)
        return {"npy": npy(planes.astype(np.float32))}
    return {"png": encoded(pixels.squeeze()), "mask.png": encoded(observed.astype(np.uint8) * 255)}


@pytest.mark.parametrize("resolution", ["native", [9, 9]])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["member", "alpha", "nan"])
def test_a_sample_says_what_is_missing_and_its_mask_follows(tmp_path, kind, channels, resolution):
    """Through crop, mirror and resizing: a pixel that counts holds nothing of a missing one."""
    index = written(tmp_path / "s", (sample(kind, *picture) for picture in pictures(channels)))
    keys = {"channels": channels, "bits": 32 if kind == "nan" else 8, "mask": kind, "flip": True}
    keys |= {"crop": "random"} if resolution != "native" else {}
    data = DataConfig(resolution=resolution, max_pixels=10**6, **keys)
    reader, seen = SampleReader(index, image_settings(index, data), seed=0), 0
    stored = reader.read(reader.in_order(0, 12))
    for number, (pixels, observed) in enumerate(pictures(channels)):
        planes = reader.load(stored[number], 0, number, epoch=0).image
        image, mask = planes[:-1], planes[-1] == 1
        assert planes.dtype == reader.settings.dtype and np.isfinite(planes).all()
        if resolution == "native":
            image, mask = (x[..., ::-1] if (mask != observed).any() else x for x in (image, mask))
            want = (pixels / 127.5 - 1 if kind == "nan" else pixels).astype(planes.dtype)
            assert (mask == observed).all() and (image == want.transpose(2, 0, 1))[:, mask].all()
        elif kind != "nan":  # a cubic filter overshoots by less than a quarter of the range
            assert (image[:, mask] < 250).all()
        seen += mask.sum()
        for image_format in ("PNG", "JPEG") if kind != "nan" else ():
            whole = {"png": encoded(pixels.squeeze(), image_format)}
            assert decode_sample(whole, reader.settings)[-1].all(), "all is seen"
    assert seen > 200


RECORD = {"class": 3, "attributes": {"Smiling": -1, "Male": True, "Bald": None, "Age": 1.5}}
FIELDS = {"json": json.dumps(RECORD).encode(), "cls": b"9"}


def test_labels():
    for sample, key, num_classes, want in (
        ({"cls": b" 12\n"}, "cls", 13, 12),
        ({"cls": b"-1"}, "cls", 13, -1),
        ({}, "cls", 13, -1),
        ({"cls": b"9"}, "class", 0, -1),
        (FIELDS, "class", 4, 3),
        (FIELDS, "class.deeper", 2, -1),
        (FIELDS, "attributes.Smiling", 2, 0),  # the marks -1 and 1 of an attribute list
        (FIELDS, "attributes.Male", 2, 1),
        (FIELDS, "attributes.Bald", 2, -1),
        (FIELDS, "attributes.Hat", 2, -1),
        (FIELDS, "attributes.Age", 2, r"field attributes\.Age is no integer of 64 bits: '1.5'"),
        ({"cls": b"cat"}, "cls", 10, r"\.cls is no integer: b'cat'"),
        ({"cls": b"99999999999999999999999"}, "cls", 10, "64 bits"),
        ({"json": b"{"}, "class", 10, r"\.json is no JSON"),
        ({"json": b"[" * 100_000}, "class", 10, r"\.json is no JSON"),
    ):
        is_refused = isinstance(want, str)
        with pytest.raises(DamagedSampleError, match=want) if is_refused else nullcontext():
            assert label_of(sample, key=key, num_classes=num_classes) == want
