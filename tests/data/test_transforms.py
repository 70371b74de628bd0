"""Size, crop and mirror; masks, of samples or drawn, that follow their image; labels.

That batches with masks do not depend on the layout is shown in `test_batches`.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from tests.data.conftest import png, written
from tests.support.picture_sources import encoded, npy
from vae_dist.config.schema import DataConfig
from vae_dist.data.decode import decode_sample
from vae_dist.data.loader import TrainingStream
from vae_dist.data.order import Order
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import image_settings
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import DRAWN, ImageSettings, draw_mask, fit, label_of, resized_mask
from vae_dist.randomness import numpy_generator

PHOTO = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)


def run(image, settings, sample=0, epoch=0):
    generator = numpy_generator(1, "augment", epoch, sample)
    return fit(image, settings, settings.size, generator)


@pytest.mark.parametrize("size", [(20, 20), (40, 20), (13, 31), (50, 50), (40, 60)])
def test_center_crop_of_the_covering_size_is_that_of_pillow(size):
    """Of bytes, which are clipped between rows and columns, and of wider levels."""
    scale = max(size[0] / 40, size[1] / 60)
    height, width = round(40 * scale), round(60 * scale)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2

    def resized(plane):
        return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))

    crop = np.s_[:, top : top + size[0], left : left + size[1]]
    want = np.stack([resized(plane) for plane in PHOTO])[crop]
    for channels in (1, 3):
        got = run(PHOTO[:channels], ImageSettings(channels, size, True, 10**6))
        assert got.shape == (channels, *size) and got.dtype == np.uint8
        assert np.abs(got.astype(int) - want[:channels]).max() <= 2
    floats = (PHOTO / 127.5 - 1).astype(np.float32)
    want = np.stack([resized(plane) for plane in floats])[crop].clip(-1, 1)
    got = run(floats, ImageSettings(3, size, True, 10**6, bits=32))
    np.testing.assert_allclose(got, want, atol=1e-4)
    deep = run(PHOTO.astype(np.uint16) * 257, ImageSettings(3, size, True, 10**6, bits=16))
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 32767.5 - 1, want, atol=1e-4)


def test_crops_and_mirrors_are_drawn_for_each_epoch_and_sample():
    settings = ImageSettings(3, (40, 57), True, 10**6, crop="random")
    places = {
        next(x for x in range(4) if (run(PHOTO, settings, s) == PHOTO[:, :, x : x + 57]).all())
        for s in range(40)
    }
    assert places == {0, 1, 2, 3}
    assert (run(PHOTO, settings, 5) == run(PHOTO, settings, 5)).all()
    assert len({run(PHOTO, settings, 5, epoch=e).tobytes() for e in range(20)}) > 1
    settings = ImageSettings(3, (30, 30), True, 10**6, crop="random", flip=True)
    images = {run(PHOTO, settings.without_augmentation(), s).tobytes() for s in range(10)}
    assert images == {run(PHOTO, ImageSettings(3, (30, 30), True, 10**6)).tobytes()}
    assert run(PHOTO, ImageSettings(3, (40, 60), False, 10**6, crop="random")) is PHOTO
    with pytest.raises(DamagedSampleError, match="before the crop"):
        run(np.zeros((1, 1, 400_000), np.uint8), ImageSettings(1, (64, 64), True, 2**20))


@pytest.mark.parametrize("bits", [8, 16])
def test_half_of_the_images_are_mirrored(tmp_path, bits):
    row = np.arange(256, dtype=f"u{bits // 8}")[None]
    index = written(tmp_path / "set", [{"npy": npy(row)}] * 2)
    keys = {"flip": True, "bits": bits}
    reader = SampleReader(index, ImageSettings(1, (1, 256), False, 10**6, **keys), seed=0)
    data, flipped = reader.read(reader.in_order(1, 2))[0], 0
    for epoch in range(100):
        (got,) = reader.load(data, 0, 1, epoch=epoch).image
        is_flipped = bool((got == row[:, ::-1]).all())
        assert is_flipped or (got == row).all()
        flipped += is_flipped
    assert 30 < flipped < 70


def test_what_is_drawn_belongs_to_the_number_among_all_samples(tmp_path):
    image = png(np.arange(256, dtype=np.uint8)[None])
    index = written(tmp_path / "set", [{"png": image}] * 8, num_shards=2)
    reader = SampleReader(index, ImageSettings(1, (1, 4), True, 10**6, crop="random"), seed=0)
    samples = enumerate(reader.read(reader.in_order(0, 8)))
    found = [reader.load(data, n // 4, n % 4, epoch=0).image for n, data in samples]
    assert len({crop.tobytes() for crop in found}) == 8


def drawn(kind, *, fraction=0.5, sample=0, epoch=0):
    return draw_mask(kind, (28, 20), fraction, seed=3, epoch=epoch, sample=sample)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawn_mask_belongs_to_seed_epoch_and_sample(kind):
    mask = drawn(kind)
    assert mask.dtype == np.uint8 and mask.shape == (1, 28, 20)
    assert (mask == drawn(kind)).all() and {0, 1} == set(np.unique(mask))
    others = [drawn(kind, sample=s, epoch=e) for s in range(4) for e in range(4)]
    assert len({mask.tobytes() for mask in others}) >= 4
    for fraction in (0.05, 0.3, 0.5, 0.9, 1.0) if kind != "half" else (0.5,):
        missing = [1 - drawn(kind, fraction=fraction, sample=s).mean() for s in range(200)]
        assert np.mean(missing) == pytest.approx(fraction, abs=0.015)
        if kind != "random":
            assert max(abs(m - fraction) for m in missing) < 0.06
    seen = [1 - drawn(kind, fraction=0.2, sample=s) for s in range(400)]
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
    target = resized_mask(mask, want)
    assert target.shape == (1, *want)
    assert np.allclose(one[target > 0], two[target > 0], rtol=0, atol=1e-9)


def test_no_pixel_is_lost_without_need():
    mask = np.ones((1, 40, 40), np.uint8)
    assert resized_mask(mask, (13, 9)).all()
    mask[0, :8, :8] = 0
    target = resized_mask(mask, (20, 20))
    assert not target[0, :4, :4].any() and target[0, 6:, :].all() and target[0, :, 6:].all()


GREY = png(np.zeros((4, 4), np.uint8))
NUM_IMAGES, SIZE = 12, (12, 16)


def pictures():
    """Grey images and masks; a missing pixel is white, an observed one is darker."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_IMAGES):
        observed = np.ones(SIZE, bool)
        top, left = generator.integers(6), generator.integers(8)
        observed[top : top + 6, left : left + 8] = False
        pixels = generator.integers(0, 200, SIZE, dtype=np.uint8)
        yield np.where(observed, pixels, 255).astype(np.uint8), observed


def sample(kind, pixels, observed):
    if kind == "alpha":
        alpha = np.where(observed, 255, 90).astype(np.uint8)
        return {"png": png(np.dstack([pixels, alpha]))}
    if kind == "nan":
        return {"npy": npy(np.where(observed, pixels / 127.5 - 1, np.nan).astype(np.float32))}
    return {"png": png(pixels), "mask.png": png(np.where(observed, 255, 0).astype(np.uint8))}


@pytest.mark.parametrize("kind", ["member", "alpha", "nan"])
def test_a_sample_says_what_is_missing(kind):
    keys = {"bits": 32 if kind == "nan" else 8, "mask": kind}
    for pixels, observed in pictures():
        images = ImageSettings(1, SIZE, False, 1000, **keys)
        planes = decode_sample(sample(kind, pixels, observed), images)
        assert planes.shape == (2, *SIZE) and planes.dtype == (
            np.float32 if kind == "nan" else "u1"
        )
        assert ((planes[1] == 1) == observed).all() and np.isfinite(planes).all()
        expected = (pixels / 127.5 - 1).astype(np.float32) if kind == "nan" else pixels
        assert (planes[0] == expected)[observed].all()
    if kind == "nan":
        return
    coloured = np.dstack([pixels, pixels // 2, pixels // 3])
    images = ImageSettings(3, SIZE, False, 1000, **keys)
    planes = decode_sample(sample(kind, coloured, observed), images)
    assert ((planes[3] == 1) == observed).all()
    assert (planes[:3] == coloured.transpose(2, 0, 1))[:, observed].all()
    for files in ({"png": png(coloured)}, {"jpg": encoded(coloured, "JPEG")}):
        assert decode_sample(files, images)[3].all(), "where nothing says so, all is seen"


def test_masks_that_are_damage():
    for files, mask, reason in (
        ({"png": GREY, "mask.png": png(np.zeros((4, 5), np.uint8))}, "member", "4 x 5 .* 4 x 4"),
        ({"png": GREY, "mask.png": b"no png"}, "member", "readable PNG"),
        ({"png": GREY, "mask.png": b""}, "none", "set data.mask=member"),
        ({"png": GREY}, "nan", "a .png holds no NaN"),
        ({"npy": npy(np.full((4, 4), np.inf, np.float32))}, "nan", "lie in"),
        ({"npy": npy(np.full((4, 4), np.nan, np.float32))}, "none", "lie in"),
    ):
        bits = 32 if "npy" in files else 8
        with pytest.raises(DamagedSampleError, match=reason):
            decode_sample(files, ImageSettings(1, SIZE, False, 1000, bits=bits, mask=mask))


@pytest.mark.parametrize("resolution", ["native", [9, 9]])
def test_masks_follow_their_images_through_crop_mirror_and_resizing(tmp_path, resolution):
    """A pixel that counts holds nothing of a missing one, which is white."""
    index = written(tmp_path / "s", (sample("member", *picture) for picture in pictures()))
    keys = {"crop": "random"} if resolution != "native" else {}
    keys |= {"mask": "member", "flip": True, "resolution": resolution}
    settings = image_settings(index, DataConfig(channels=1, max_pixels=10**6, **keys))
    order, seen = Order(index.lengths, lanes=4, window=2, seed=1), 0
    for batch in TrainingStream(index, order, settings, batch_size=4, start_step=0, stop_step=6):
        (group,) = batch.groups
        assert group.masks is not None and group.masks.shape == (4, 1, *group.images.shape[2:])
        observed = group.masks > 0
        if resolution == "native":
            assert ((group.images == 255) == ~observed).all()
        # a cubic filter overshoots by less than a quarter of the range
        assert (group.images[observed] < 250).all()
        seen += int(observed.sum())
    assert seen > 300


RECORD = {
    "class": 3,
    "attributes": {"Smiling": -1, "Male": True, "Bald": None},
}
FIELDS = {"json": json.dumps(RECORD).encode(), "cls": b"9"}


def test_labels():
    for sample, key, num_classes, label in (
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
    ):
        assert label_of(sample, key=key, num_classes=num_classes) == label


def test_what_is_no_label():
    for sample, key, reason in (
        ({"cls": b"cat"}, "cls", ".cls is no integer: b'cat'"),
        ({"cls": b"99999999999999999999999"}, "cls", "64 bits"),
        ({"json": b"{"}, "class", ".json is no JSON"),
        ({"json": b"[" * 100_000}, "class", ".json is no JSON"),
        ({"json": b'{"class": 1.5}'}, "class", "field class is no integer of 64 bits: '1.5'"),
    ):
        with pytest.raises(DamagedSampleError, match=reason):
            label_of(sample, key=key, num_classes=10)
