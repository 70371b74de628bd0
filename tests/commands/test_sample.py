"""`sample` and `reconstruct` through their entry points: pictures, labels, sizes, refusals."""

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_run import random_pixels, tiny_config, write_run
from vae_dist import reconstruct, sample


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def written(verb, run, out, *keys):
    assert verb.main([f"run={run}", f"out={out}", "device=cpu", *keys]) == 0
    return pixels(out) if out.is_file() else [pixels(path) for path in sorted(out.iterdir())]


def test_grids(plain_run, conditional_run, tmp_path):
    grid = written(sample, plain_run, tmp_path / "deep" / "samples.png", "num_images=9")
    assert grid.shape == (3 * 86 + 2, 3 * 86 + 2)
    keys = ("prior=gmm:2", "num_images=4", "compare=true")
    both = written(sample, plain_run, tmp_path / "both.png", *keys)
    assert both.shape == (2 * 86 + 2, 2 * (2 * 86 + 2) + 10)
    rows = written(sample, conditional_run, tmp_path / "rows.png", "label=all", "num_images=13")
    height, width = 12 * (96 // 12), 10 * (96 // 12)
    assert rows.shape == (3 * (height + 2) + 2, 5 * (width + 2) + 2)  # a row for each class


def test_single_images_hold_every_channel_and_level(spatial_run, tmp_path, capsys):
    found = written(sample, spatial_run, tmp_path / "out", "num_images=3", "resolution=[25,32]")
    assert [image.shape for image in found] == [(25, 32, 3)] * 3
    config = tiny_config(latent="spatial", kind="gaussian", channels=7)
    config.data.bits = 16
    write_run(tmp_path / "run", config, (32, 32))
    keys = [f"run={tmp_path / 'run'}", "num_images=2", "device=cpu"]
    assert sample.main([*keys, f"out={tmp_path / 'single'}"]) == 0
    files = sorted((tmp_path / "single").iterdir())
    assert [path.name for path in files] == ["000000.npy", "000001.npy"]
    images = [np.load(path) for path in files]
    assert [(one.shape, one.dtype) for one in images] == [((7, 32, 32), np.uint16)] * 2
    assert sample.main([*keys, f"out={tmp_path / 'grid.png'}"]) == 0
    assert "pictures show channels 1 to 3 of 7 and 8 of 16 bits" in capsys.readouterr().out


def test_labels(conditional_run, tmp_path, capsys):
    """Image i has the same latent for every class; `all` is a row of each; `auto` draws them."""

    def drawn(label, *keys):
        out = tmp_path / f"{label}{keys}"
        return np.stack(written(sample, conditional_run, out, f"label={label}", *keys))

    of = {label: drawn(label, "num_images=12") for label in ("0", "1", "2", "none")}
    for label in ("1", "none"):
        assert (of["0"] != of[label]).any((1, 2)).all()
    every = drawn("all", "num_images=6")  # two of each
    assert np.abs(every - np.concatenate([of[c][:2] for c in "012"])).max() <= 1
    capsys.readouterr()
    auto = drawn("auto", "num_images=12")
    assert "12 samples, label=auto, step 20" in capsys.readouterr().out
    is_drawn = np.stack([(of[label] == auto).all((1, 2)) for label in "012"])
    assert (is_drawn.sum(0) == 1).all() and is_drawn.any(1).all()
    fewer = drawn("auto", "num_images=5", "batch_size=2")
    assert np.abs(fewer - auto[:5]).max() <= 1


def test_reconstruct(plain_run, spatial_run, tmp_path):
    """Inputs above, in tiles where these are smaller than the image."""
    picture = written(reconstruct, plain_run, tmp_path / "r.png", "num_images=3")
    assert (picture[3:87:3, 3:87:3] == random_pixels(8, 28, 28)[0]).all()
    assert picture.shape == (2 + 84 + 2 + 84 + 2, 2 * 86 + 2)  # the third one is unreadable
    whole, tiled, fitting = (
        written(reconstruct, spatial_run, tmp_path / f"{tile}.png", f"tile={tile}", "num_images=2")
        for tile in (0, 16, 20)
    )
    assert tiled.shape == whole.shape and (fitting == whole).all()
    assert np.abs(tiled - whole).max() > 0  # a tile has norms of its own


@pytest.mark.parametrize(
    ("verb", "run", "key", "reason"),
    [
        (sample, "nowhere", "seed=1", "no run folder"),
        (sample, "plain_run", "resolution=32", "resolution=32: images of 32x32 pixels"),
        (sample, "plain_run", "out=/proc/a.png", "cannot be written"),
        (sample, "plain_run", "out=a.jpg", "a name that ends in .png"),
        (sample, "plain_run", "out=a prior=gmm:2 compare=true", "out=a must end in .png"),
        (sample, "plain_run", "label=2", "label=2 has no effect"),
        (sample, "conditional_run", "label=3", "this model knows the classes 0 to 2"),
        (sample, "spatial_run", "prior=gmm:2", "spatial one; train with model.latent=vector"),
        (reconstruct, "spatial_run", "tile=4", "give at least tile=16"),
        (reconstruct, "plain_run", "tile=512", "a vector latent holds the whole image"),
    ],
)
def test_refusals(request, tmp_path, capsys, verb, run, key, reason):
    folder = tmp_path if run == "nowhere" else request.getfixturevalue(run)
    assert verb.main([f"run={folder}", "device=cpu", *key.split()]) == 2
    assert reason in capsys.readouterr().err
