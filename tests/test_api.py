"""The Python API: what `import vae_dist` gives, on models that a run and diffusers left."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.tiny_run import random_pixels
from vae_dist import TrainedVAE, evaluate, export
from vae_dist.config.errors import ConfigError

Call = Callable[[TrainedVAE], object]


def stored(*shape: int) -> torch.Tensor:
    return torch.from_numpy(random_pixels(*shape))


@pytest.fixture(scope="module")
def plain(plain_run: Path) -> TrainedVAE:
    return vae_dist.load(plain_run, device="cpu")


@pytest.fixture(scope="module")
def spatial(spatial_run: Path) -> TrainedVAE:
    return vae_dist.load(spatial_run, device="cpu")


@pytest.fixture(scope="module")
def conditional(conditional_run: Path) -> TrainedVAE:
    return vae_dist.load(conditional_run, device="cpu")


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, vae_dist\n"
        "assert vae_dist.config('config=debug').training.steps > 0\n"
        "assert vae_dist.__version__ and callable(vae_dist.train)\n"
        "assert 'torch' not in sys.modules\n"
        "import vae_dist.config.schema\n"
        "assert callable(vae_dist.config) and vae_dist.config.schema\n"
        "assert set(vae_dist.__all__) <= set(dir(vae_dist))\n"
        "assert vae_dist.load.__doc__ and vae_dist.write_shards.__doc__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vae_dist.lode


def test_the_example_of_the_documentation(plain: TrainedVAE) -> None:
    images = plain.sample(5, seed=0)
    assert (images.shape, images.dtype) == ((5, 1, 28, 28), torch.float32)
    assert 0 <= images.min() < images.max() <= 1
    mean, std = plain.encode(images)
    assert mean.shape == std.shape == (5, *plain.latent_shape()) and (std > 0).all()
    again = plain.decode(mean)
    assert again.shape == images.shape and 0 <= again.min() < again.max() <= 1
    torch.testing.assert_close(plain.reconstruct(images), again)
    assert plain.neg_elbo(images).shape == (5,)
    assert repr(plain) == "TrainedVAE(tiny, step 20, images 1x28x28, latents 3, cpu)"


def test_neg_elbo_is_what_evaluate_means_whatever_the_batch(
    spatial_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    assert evaluate.main([f"run={spatial_run}", f"out={out}", "device=cpu", "threads=1"]) == 0
    expected = json.loads(out.read_text())["figures"]["neg_elbo_nats"]
    vae = vae_dist.load(spatial_run, device="cpu")
    images = stored(3, 20, 16, 3).permute(0, 3, 1, 2)
    assert float(vae.neg_elbo(images).mean()) == pytest.approx(expected, rel=1e-6)
    whole = vae.sample(3, seed=3), *vae.encode(images), vae.neg_elbo(images)
    vae.batch_size = 2
    parts = vae.sample(3, seed=3), *vae.encode(images), vae.neg_elbo(images)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "form",
    [
        lambda pixels: pixels / 255,
        lambda pixels: pixels.double().numpy() / 255,
        lambda pixels: pixels.numpy(),
        lambda pixels: list(pixels),
        lambda pixels: [pillow(image) for image in pixels],
        lambda pixels: (pixels.int() * 257).to(torch.uint16),
    ],
)
def test_images_in_every_form(spatial: TrainedVAE, form: Callable[[torch.Tensor], Any]) -> None:
    pixels = stored(2, 3, 8, 6)
    mean, _ = spatial.encode(form(pixels))
    with torch.no_grad():  # of the very image, as diffusers encodes it
        torch.testing.assert_close(mean, spatial.model.encode(pixels / 127.5 - 1)[0])
    for single in (pillow(pixels[0]), pixels[0]):
        torch.testing.assert_close(spatial.encode(single)[0], mean[:1])


def test_a_spatial_latent_takes_other_sizes(spatial: TrainedVAE) -> None:
    assert spatial.sample(1, size=(13, 16)).shape == (1, 3, 13, 16)
    assert spatial.sample(1, size=8).shape == (1, 3, 8, 8)
    images = stored(1, 3, 9, 7)
    assert spatial.reconstruct(images).shape == (1, 3, 9, 7)
    mean, _ = spatial.encode(images)
    assert mean.shape == (1, *spatial.latent_shape((9, 7))) == (1, 3, 5, 4)
    assert spatial.decode(mean.numpy()).shape == (1, 3, 10, 8)
    assert spatial.decode(mean, size=(9, 7)).shape == (1, 3, 9, 7)


def test_labels(conditional: TrainedVAE) -> None:
    images = stored(2, 1, 12, 10)
    one, two, ones, none = (
        conditional.encode(images, labels=labels)[0] for labels in (1, [1, 2], [1, 1], None)
    )
    torch.testing.assert_close(one, ones)
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1], two[1])
    torch.testing.assert_close(none, conditional.encode(images, labels=-1)[0])
    drawn, first = conditional.sample(3, seed=1), conditional.sample(3, seed=1, label=0)
    assert not torch.allclose(drawn, first)
    for wrong, fragment in ((3, "classes 0 to 2, and -1 for none"), ([0, 1, 2], "for 2 images")):
        with pytest.raises(ValueError, match=fragment):
            conditional.encode(images, labels=wrong)


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda vae: vae.encode(torch.zeros(1, 3, 28, 28)), "3 channels, and this model takes 1"),
        (lambda vae: vae.encode(torch.zeros(28, 28)), r"give \(N, C, H, W\) or \(C, H, W\)"),
        (lambda vae: vae.encode(torch.zeros(0, 1, 28, 28)), r"give \(N, C, H, W\)"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 8, 8)), "28x28 that it was built for"),
        (lambda vae: vae.encode(torch.full((1, 1, 28, 28), -0.5)), r"\(images \+ 1\) / 2"),
        (lambda vae: vae.encode(torch.full((1, 1, 28, 28), 255.0)), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(torch.full((1, 1, 28, 28), torch.nan)), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 28, 28).long()), "give uint8, uint16, or floats"),
        (lambda vae: vae.encode([]), "needs at least one"),
        (lambda vae: vae.encode([np.zeros((1, 28, 28)), np.zeros((1, 8, 8))]), "all of one size"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 28, 28), labels=0), "trained without labels"),
        (lambda vae: vae.decode(torch.zeros(2, 4)), r"give \(N, 3\)"),
        (lambda vae: vae.decode(torch.zeros(0, 3)), r"give \(N, 3\)"),
        (lambda vae: vae.sample(0), "num_images=0"),
        (lambda vae: vae.sample(1, size=8), "28x28 that it was built for"),
    ],
)
def test_wrong_arguments_are_named(plain: TrainedVAE, call: Call, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        call(plain)


def test_a_run_a_checkpoint_and_other_weights(plain_run: Path, plain: TrainedVAE) -> None:
    checkpoints = plain_run / "checkpoints"
    early = vae_dist.load(checkpoints / "step_00000010", device="cpu")
    assert (early.step, vae_dist.load(str(plain_run), checkpoint=10).step) == (10, 10)
    raw = vae_dist.load(plain_run, weights="model", device="cpu")
    for other in (early, raw):
        assert not torch.allclose(other.sample(1), plain.sample(1))
    with pytest.raises(ConfigError, match="is a checkpoint already"):
        vae_dist.load(checkpoints / "step_00000010", checkpoint="best")
    with pytest.raises(ConfigError, match="no run folder"):
        vae_dist.load(plain_run.parent)


def test_a_folder_of_diffusers(spatial_run: Path, spatial: TrainedVAE, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert export.main([f"run={spatial_run}", f"out={out}"]) == 0
    vae = vae_dist.load(out, device="cpu")
    images = stored(2, 3, 20, 16)
    torch.testing.assert_close(vae.encode(images), spatial.encode(images))
    torch.testing.assert_close(vae.reconstruct(images), spatial.reconstruct(images))
    with pytest.raises(ValueError, match="no likelihood"):
        vae.neg_elbo(images)
    written = json.loads((out / "config.json").read_text())
    for forged, fragment in (
        ({"_class_name": "UNet2DModel"}, "only AutoencoderKL"),
        ({"layers_per_block": 10**9}, "describes no model"),
        ({"block_out_channels": "wide"}, "describes no model"),
        ({"block_out_channels": [8, 2**24]}, "differ"),
    ):
        (out / "config.json").write_text(json.dumps(written | forged))
        with pytest.raises(ConfigError, match=fragment):
            vae_dist.load(out)


def test_training_in_this_process_twice(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call finds the run finished; global state is as it was. As in a notebook, stderr
    is no file."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    config = vae_dist.config(
        "config=debug",
        f"run={tmp_path / 'run'}",
        f"data.train={digits}/train",
        f"data.validation={digits}/validation",
        "data.bundled=none",
        "data.workers=0",
        "training.steps=2",
        "evaluation.every=0",
        "wandb.mode=disabled",
        "runtime.threads=1",
        "optimizer.warmup_steps=1",
    )
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert vae_dist.train(config) == tmp_path / "run"
    assert vae_dist.load(vae_dist.train(config)).step == 2
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"did you mean .*optimizer\.lr"):
        vae_dist.config("config=debug", "optimzer.lr=1")
