"""`sample` and `reconstruct` through their entry points; what they and `evaluate` refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.tiny_run import random_pixels, tiny_config, write_run
from vae_dist import evaluate, impute, reconstruct, sample


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
    assert rows.shape == (3 * 98 + 2, 5 * 82 + 2)  # a row for each class, enlarged eight times


def test_single_images_hold_every_channel_and_level(tmp_path, capsys):
    config = tiny_config(latent="spatial", kind="gaussian", channels=7)
    config.data.bits = 16
    write_run(run := tmp_path / "run", config, (32, 32))
    for out in ("images", "grid.png"):
        keys = ("num_images=2", "resolution=[25,32]", f"out={tmp_path / out}")
        assert sample.main([f"run={run}", "device=cpu", *keys]) == 0
    assert "pictures show channels 1 to 3 of 7 and 8 of 16 bits" in capsys.readouterr().out
    for number, image in enumerate(vae_dist.load(run, device="cpu").sample(2, size=(25, 32))):
        found = np.load(tmp_path / "images" / f"{number:06d}.npy")
        assert found.dtype == np.uint16 and np.abs(found - 65535 * image.numpy()).max() <= 1


def test_labels(conditional_run, tmp_path, capsys):
    """`all` is a row of each, `auto` draws them."""
    vae = vae_dist.load(conditional_run, device="cpu")
    expected = {
        "1": vae.sample(4, label=1),
        "none": vae.sample(4, label=-1),
        "all": torch.cat([vae.sample(2, label=label) for label in range(3)]),
        "auto": vae.sample(4),
    }
    for label, images in expected.items():
        keys = (f"label={label}", f"num_images={len(images)}", "batch_size=3")
        found = np.stack(written(sample, conditional_run, tmp_path / label, *keys))
        assert np.abs(found - 255 * images[:, 0].numpy()).max() <= 1
    assert "4 samples, label=auto, step 20" in capsys.readouterr().out


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
        (sample, "plain_run", "out=/proc", "out=/proc is not empty"),
        (sample, "plain_run", "out=a.jpg", "a name that ends in .png"),
        (sample, "plain_run", "out=a prior=gmm:2 compare=true", "out=a must end in .png"),
        (sample, "plain_run", "label=2", "label=2 has no effect"),
        (sample, "conditional_run", "label=3", "this model knows the classes 0 to 2"),
        (sample, "spatial_run", "prior=gmm:2", "spatial one; train with model.latent=vector"),
        (reconstruct, "spatial_run", "tile=4", "give at least tile=16"),
        (reconstruct, "plain_run", "tile=512", "a vector latent holds the whole image"),
        (evaluate, "plain_run", "max_skipped_fraction=0.1", "1 of 8 images to evaluate on cannot"),
        (evaluate, "plain_run", "prior=gmm:50", "7 training images could be read, fewer than"),
        (evaluate, "plain_run", "out=/proc/no/r.json", "out=/proc/no/r.json: cannot be written"),
        (evaluate, "conditional_run", "metrics=psnr,viv", "psnr compare whole images, and data.m"),
        (impute, "spatial_run", "samples=40 out=no", "trained on complete images"),
    ],
)
def test_refusals(request, tmp_path, capsys, verb, run, key, reason):
    folder = tmp_path if run == "nowhere" else request.getfixturevalue(run)
    assert verb.main([f"run={folder}", "device=cpu", *key.split()]) == 2
    assert reason in capsys.readouterr().err
