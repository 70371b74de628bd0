"""What the first samples say before training: native sizes, readability, labels."""

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import png, written
from tests.support.picture_sources import encoded
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import DataConfig
from vae_dist.data.reader import SampleReader
from vae_dist.data.settings import DataSet, check_data_sets, image_settings
from vae_dist.data.tar import DamagedSampleError
from vae_dist.data.transforms import Need

NEEDS = (Need("perceptual.kind=structure", shorter=11), Need("model.norm_groups=8", longer=13))
SMALL = {"any_size": True, "needs": NEEDS}


def shards(folder, *sizes, num_shards=2):
    """An image of each size, in turn, with labels 0, 1, 2; (0, 0) is no image."""
    images = [png(np.zeros((*size, 3), np.uint8)) if any(size) else b"no PNG" for size in sizes]
    samples = ({"png": image, "cls": str(n % 3).encode()} for n, image in enumerate(images))
    return written(folder, samples, num_shards)


def settings_of(index, keys=None, **options):
    return image_settings(index, DataConfig(max_pixels=10**6, **(keys or {})), **options)


def check(train, validation, limit=0.01, **options):
    settings = settings_of(train, **options)
    sets = [("data.train", train, settings), ("data.validation", validation, settings)]
    check_data_sets([DataSet(*one) for one in sets], max_skipped_fraction=limit)


def test_two_images_that_differ_are_named_with_the_ways_out(tmp_path):
    same = shards(tmp_path / "same", *[(12, 16)] * 6)
    other = shards(tmp_path / "other", *[(12, 16)] * 3, (0, 0), (16, 12), (12, 16))
    check(same, same)
    for train, validation, key in ((other, same, "data.train"), (same, other, "data.validation")):
        where = rf"^data\.resolution=native, {key}: {other.paths[0]} sample 2 is 16x12 pixels, but"
        ways = r".* 12x16; .*data\.resolution=12.*aspect buckets.*data\.slots=training\.batch_size"
        with pytest.raises(ConfigError, match=where + ways):
            check(train, validation)


def test_small_images_are_lost_and_too_many_of_them_refused(tmp_path):
    index = shards(tmp_path / "a", (8, 16), (12, 12), (30, 10), (12, 16), num_shards=1)
    low = "8x16 pixels, and perceptual.kind=structure needs 11 on the shorter side"
    parts = "data.train: 3 of 4 images", f"sample 0: {low}", "skipped_fraction=0.5", "resolution=N"
    with pytest.raises(ConfigError, match=".*".join(parts)):
        check(index, index, limit=0.5, **SMALL)
    check(index, index, limit=0.75, **SMALL)
    settings = settings_of(index, **SMALL)
    assert settings.size == (12, 16), "a small image is no example of the others"
    reader = SampleReader(index, settings, seed=0)
    narrow = "12x12 pixels, and model.norm_groups=8 needs 13 on the longer side"
    for number, problem in enumerate((low, narrow)):
        with pytest.raises(DamagedSampleError, match=f"^too small: {problem}$"):
            reader.load(reader.read(reader.in_order(number, number + 1))[0], 0, number, epoch=0)
    with pytest.raises(ConfigError, match=r"resolution=native: none of .*sample 0: too small: 8x"):
        settings_of(index, any_size=True, needs=(Need("x", shorter=99),))
    check(index, index, any_size=True)
    check(index, index, keys={"resolution": 8}, limit=0)


def test_what_cannot_be_read_or_has_no_labels_is_refused(tmp_path, capsys):
    broken, whole = shards(tmp_path / "a", (0, 0), (0, 0)), shards(tmp_path / "b", *[(8, 8)] * 4)
    with pytest.raises(ConfigError, match=r"data\.validation: none of 2 samples .*no readable"):
        check(whole, broken, keys={"resolution": 8})
    check(whole, whole, num_classes=3)
    with pytest.raises(ConfigError, match=r"\.tar sample \d+ \(key \d{4}\): its label 2"):
        check(whole, whole, num_classes=2)
    with pytest.raises(ConfigError, match=r"none of 4 images of data\.train has"):
        check(whole, whole, num_classes=3, keys={"label_key": "attributes.Smiling"})
    assert capsys.readouterr().err == ""
    first, *others = [Image.fromarray(np.full((8, 8, 3), n, np.uint8)) for n in (0, 90, 180)]
    animated = encoded(first, "WEBP", save_all=True, append_images=others)
    index = written(tmp_path / "c", [{"webp": animated}] * 3)
    check(index, index, keys={"resolution": 8})
    said, _ = capsys.readouterr().err.splitlines()  # once for each data set
    assert said.startswith("warning: data.train: ") and said.endswith("(and so for 2 more)")
    assert "sample 0: it is animated, its first frame is taken" in said
