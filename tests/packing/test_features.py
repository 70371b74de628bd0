"""What `encode features=` writes, through its entry point."""

import json

import numpy as np
import pytest
import torch

from tests.support.latent_data import SIZES, samples_of, write_photos
from tests.support.picture_sources import encoded, png
from vae_dist import encode
from vae_dist.data.features import MEMBER, Features
from vae_dist.data.index import load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.transforms import ImageSettings
from vae_dist.data.writer import write_shards
from vae_dist.objectives.alignment import load_features

COUNT, DAMAGED = 23, (4, 11)
SMALL = ("shard_mb=0.02", "batch_size=3", "max_skipped_fraction=0.2", "device=cpu", "threads=1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_photos(folder, COUNT, damaged=DAMAGED)
    return folder


def keys(vision, photos, out, *more):
    return [f"features={vision}", f"data={photos}", f"out={out}", *SMALL, *more]


@pytest.mark.parametrize("resolution", ["native", "[14,21]"])
def test_the_samples_with_features_of_what_training_shows(resolution, vision, photos, tmp_path):
    source = write_photos(tmp_path / "again", COUNT)
    assert encode.main(keys(vision, photos, tmp_path / "out", f"resolution={resolution}")) == 0
    summary = json.loads((tmp_path / "out" / "encode.json").read_text())
    assert (summary["samples"], summary["width"]) == (COUNT - 2, 16) and summary["shards"] > 3
    numbers = [number for number in range(COUNT) if number not in DAMAGED]
    model = load_features(str(vision), torch.device("cpu"))
    index = load_index(str(photos), key="data", create=False)
    size = None if resolution == "native" else (14, 21)
    settings = ImageSettings(3, size or SIZES[0], size is not None, 2**16, any_size=size is None)
    reader = SampleReader(index, settings, seed=0)
    for number, found in zip(numbers, samples_of(tmp_path / "out"), strict=True):
        expected = source[number]
        assert all(found[name] == expected[name] for name in expected)
        assert set(found) - {"__url__", "__local_path__"} == {*expected, MEMBER}
        of_image = Features.from_bytes(found[MEMBER])
        height, width = size or SIZES[number % 3]
        assert of_image[1:] == (str(vision), f"{height}x{width}", "")
        (run,) = reader.in_order(number, number + 1)
        image = reader.load(reader.read([run])[0], run.shard, run.start, epoch=0).image
        values = model(torch.from_numpy(image.copy())[None] / 127.5 - 1)[0]
        np.testing.assert_allclose(of_image.values, values, rtol=2e-3, atol=2e-3)


def test_of_several_images_and_transparent_ones(vision, tmp_path, capsys):
    clear = encoded(np.full((28, 28, 4), (9, 9, 9, 0), np.uint8))
    sample = {"__key__": "0", "a.png": clear, "b.png": b""}
    write_shards([sample], tmp_path / "set", num_shards=1)
    for more in ((), ("image_key=a.png",), ("image_key=a.png", "background=white")):
        arguments = keys(vision, tmp_path / "set", tmp_path / "out", *more)
        assert encode.main(arguments) == 2 * (len(more) < 2)
    err = capsys.readouterr().err
    assert "choose with data.image_key=a.png" in err and "transparent" in err
    (found,) = samples_of(tmp_path / "out")
    assert Features.from_bytes(found[MEMBER])[1:] == (str(vision), "28x28", "a.png")


def test_features_are_not_added_twice(vision, tmp_path, capsys):
    sample = {"__key__": "0", "png": png(), MEMBER.title(): b""}  # as readers take it
    write_shards([sample], tmp_path / "set", num_shards=1)
    assert encode.main(keys(vision, tmp_path / "set", tmp_path / "out")) == 2
    assert f"it has a .{MEMBER} already" in capsys.readouterr().err


def test_refusals(vision, photos, tmp_path, capsys):
    for more, message in {
        f"features={tmp_path}": f"{tmp_path}: no vision model can be loaded from there",
        "features=": "run= is missing; give the run's folder, or features=MODEL",
        "tile=64": "tile=64 has no effect with features=",
        "dtype=fp32": "dtype=fp32 has no effect with run=",
    }.items():
        assert encode.main(keys(vision, photos, tmp_path / "out", more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
