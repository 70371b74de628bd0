"""The Python API: what `import vae_dist` gives, on models that a run and diffusers left."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.tiny_run import random_pixels
from tests.support.training import arguments
from vae_dist import evaluate, export
from vae_dist.config.errors import ConfigError


def stored(*shape):
    return torch.from_numpy(random_pixels(*shape))


@pytest.fixture(scope="module")
def plain(plain_run):
    return vae_dist.load(plain_run, device="cpu")


@pytest.fixture(scope="module")
def spatial(spatial_run):
    return vae_dist.load(spatial_run, device="cpu")


@pytest.fixture(scope="module")
def conditional(conditional_run):
    return vae_dist.load(conditional_run, device="cpu")


def test_the_example_of_the_documentation(plain):
    images = plain.sample(5, seed=0)
    assert (images.shape, images.dtype) == ((5, 1, 28, 28), torch.float32)
    mean, std = plain.encode(images)
    assert mean.shape == std.shape == (5, *plain.latent_shape()) and (std > 0).all()
    again = plain.decode(mean)
    for pictures in (images, again):
        assert pictures.shape == (5, 1, 28, 28) and 0 <= pictures.min() < pictures.max() <= 1
    torch.testing.assert_close(plain.reconstruct(images), again)
    assert plain.neg_elbo(images).shape == (5,)
    assert repr(plain) == "TrainedVAE(tiny, step 20, images 1x28x28, latents 3, cpu)"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vae_dist.lode


def test_neg_elbo_is_what_evaluate_means_whatever_the_batch(spatial_run, tmp_path):
    out = tmp_path / "results.json"
    assert evaluate.main([f"run={spatial_run}", f"out={out}", "device=cpu", "threads=1"]) == 0
    expected = json.loads(out.read_text())["figures"]["neg_elbo_nats"]
    vae = vae_dist.load(spatial_run, device="cpu")
    vae.batch_size = 2
    nats = vae.neg_elbo(stored(3, 20, 16, 3).permute(0, 3, 1, 2))
    assert float(nats.mean()) == pytest.approx(expected, rel=1e-6)


def pillow(pixels):
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
def test_images_in_every_form(spatial, form):
    pixels = stored(2, 3, 8, 6)
    mean, _ = spatial.encode(form(pixels))
    with torch.no_grad():  # of the very image, as diffusers encodes it
        torch.testing.assert_close(mean, spatial.model.encode(pixels / 127.5 - 1)[0])
    for single in (pillow(pixels[0]), pixels[0]):
        torch.testing.assert_close(spatial.encode(single)[0], mean[:1])


def test_a_spatial_latent_takes_other_sizes(spatial):
    assert spatial.sample(1, size=(13, 16)).shape == (1, 3, 13, 16)
    images = stored(1, 3, 9, 7)
    assert spatial.reconstruct(images).shape == (1, 3, 9, 7)
    mean, _ = spatial.encode(images)
    assert mean.shape == (1, *spatial.latent_shape((9, 7))) == (1, 3, 5, 4)
    assert spatial.decode(mean.numpy()).shape == (1, 3, 10, 8)
    assert spatial.decode(mean, size=(9, 7)).shape == (1, 3, 9, 7)


def test_labels(conditional):
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


def full(value, *shape):
    return torch.full(shape or (1, 1, 28, 28), value)


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda vae: vae.encode(full(0.0, 1, 3, 28, 28)), r"give \(N, 1, H, W\)"),
        (lambda vae: vae.encode(full(0.0, 28, 28)), r"give \(N, 1, H, W\)"),
        (lambda vae: vae.encode(full(0.0, 0, 1, 28, 28)), r"give \(N, 1, H, W\)"),
        (lambda vae: vae.encode(full(0.0, 1, 1, 8, 8)), "28x28 that it was built for"),
        (lambda vae: vae.encode(full(-0.5)), r"\(images \+ 1\) / 2"),
        (lambda vae: vae.encode(full(255.0)), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(full(torch.nan)), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(full(0)), "give uint8, uint16, or floats"),
        (lambda vae: vae.encode([]), "give at least one"),
        (lambda vae: vae.encode([np.zeros((1, 28, 28)), np.zeros((1, 8, 8))]), "all of one size"),
        (lambda vae: vae.encode(full(0.0), labels=0), "trained without labels"),
        (lambda vae: vae.decode(full(0.0, 2, 4)), r"give \(N, 3\)"),
        (lambda vae: vae.sample(0), "num_images=0"),
        (lambda vae: vae.sample(1, size=8), "28x28 that it was built for"),
    ],
)
def test_wrong_arguments_are_named(plain, call, fragment):
    with pytest.raises(ValueError, match=fragment):
        call(plain)


def test_a_run_a_checkpoint_and_other_weights(plain_run, plain):
    early = vae_dist.load(folder := plain_run / "checkpoints" / "step_00000010", device="cpu")
    assert (early.step, plain.step, plain.model.training) == (10, 20, False)
    first = {}
    for step in (10, 20):
        for weights in ("ema", "model"):
            vae = vae_dist.load(str(plain_run), checkpoint=step, weights=weights, device="cpu")
            first[step, weights] = vae.model.encoder.conv_in.weight
    assert torch.equal(plain.model.encoder.conv_in.weight, first[20, "ema"])
    assert torch.equal(early.model.encoder.conv_in.weight, first[10, "ema"])
    assert len({tensor.sum().item() for tensor in first.values()}) == 4
    for path, checkpoint, fragment in (
        (folder, "best", "is a checkpoint; leave it out"),
        (plain_run.parent, "latest", "no run folder"),
        (plain_run, 15, "checkpoint=15 .*latest, 10, 20"),
    ):
        with pytest.raises(ConfigError, match=fragment):
            vae_dist.load(path, checkpoint=checkpoint)


def test_a_folder_of_diffusers(spatial_run, spatial, tmp_path):
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
        ({"block_out_channels": "wide"}, "our towers have"),
        ({"block_out_channels": [8, 2**24]}, "do not fit"),
    ):
        (out / "config.json").write_text(json.dumps(written | forged))
        with pytest.raises(ConfigError, match=fragment):
            vae_dist.load(out)


def test_training_in_this_process_twice(tmp_path, digits, monkeypatch):
    """The second call finds the run finished; global state is as it was. As in a notebook, stderr
    is no file."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    config = vae_dist.config(*arguments(tmp_path / "run", digits, "training.steps=3"))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert vae_dist.train(config) == tmp_path / "run"
    assert vae_dist.load(vae_dist.train(config)).step == 3
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"did you mean .*optimizer\.lr"):
        vae_dist.config("config=debug", "optimzer.lr=1")
