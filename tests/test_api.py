"""The Python API: what `import vae_dist` gives, on models that a run and diffusers left."""

import io
import json

import pytest
import torch
from PIL import Image

import vae_dist
from tests.support.tiny_run import random_pixels
from tests.support.training import arguments, weights
from vae_dist import evaluate
from vae_dist.config.errors import ConfigError


def stored(*shape):
    return torch.from_numpy(random_pixels(*shape))


@pytest.fixture(scope="module")
def plain(plain_run):
    return vae_dist.load(plain_run, device="cpu")


def test_the_example_of_the_documentation(plain):
    images = plain.sample(5, seed=0)
    assert (images.shape, images.dtype) == ((5, 1, 28, 28), torch.float32)
    mean, std = plain.encode(images)
    assert mean.shape == std.shape == (5, *plain.latent_shape())
    with torch.no_grad():  # grey levels are black below one half and white above
        expected, log_variance = plain.model.encode(torch.where(images < 0.5, -1.0, 1.0))
        means = torch.sigmoid(plain.model.decode(expected, (28, 28)))
    torch.testing.assert_close((mean, std), (expected, (log_variance / 2).exp()))
    torch.testing.assert_close((plain.decode(mean), plain.reconstruct(images)), (means, means))
    assert plain.neg_elbo(images).shape == (5,)
    assert repr(plain) == "TrainedVAE(tiny, step 20, images 1x28x28, latents 3, cpu)"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vae_dist.lode


def test_sample_i_depends_on_seed_and_i_alone(plain_run, spatial_run):
    for run in (plain_run, spatial_run):
        vae = vae_dist.load(run, device="cpu")
        images = vae.sample(7, seed=1)
        assert 0 <= images.min() < images.max() <= 1
        assert len({tuple(image.flatten().tolist()) for image in images}) == 7
        vae.batch_size = 3
        torch.testing.assert_close(vae.sample(4, seed=1), images[:4], rtol=0, atol=1e-5)
        assert (vae.sample(7, seed=2) - images).abs().max() > 0.01
        cold = vae.sample(3, seed=0, temperature=0.0)
        torch.testing.assert_close(cold[0], cold[2])


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


def test_images_in_every_form(spatial_run):
    vae, pixels = vae_dist.load(spatial_run, device="cpu"), stored(2, 3, 8, 6)
    with torch.no_grad():  # of the very image, as diffusers encodes it
        expected, _ = vae.model.encode(pixels / 127.5 - 1)
    for images in (
        pixels / 255,
        pixels.double().numpy() / 255,
        pixels.numpy(),
        list(pixels),
        [pillow(image) for image in pixels],
        (pixels.int() * 257).to(torch.uint16),
    ):
        torch.testing.assert_close(vae.encode(images)[0], expected)
    for single in (pillow(pixels[0]), pixels[0]):
        torch.testing.assert_close(vae.encode(single)[0], expected[:1])
    assert vae.decode(expected.numpy()).shape == pixels.shape
    odd, _ = vae.encode(pixels[..., :7, :5])
    assert odd.shape[1:] == vae.latent_shape((7, 5)) == (3, 4, 3)
    assert vae.decode(odd, size=(7, 5)).shape == vae.sample(2, size=(7, 5)).shape


def test_labels(conditional_run):
    vae, images = vae_dist.load(conditional_run, device="cpu"), stored(2, 1, 12, 10)
    one, two, ones, none = (
        vae.encode(images, labels=labels)[0] for labels in (1, [1, 2], [1, 1], None)
    )
    torch.testing.assert_close(one, ones)
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1], two[1])
    torch.testing.assert_close(none, vae.encode(images, labels=-1)[0])
    of = torch.stack([vae.sample(12, label=label) for label in range(3)])
    is_drawn = (of == vae.sample(12)).flatten(2).all(2)  # (3, 12)
    assert (is_drawn.sum(0) == 1).all() and is_drawn.any(1).all()
    for wrong, fragment in ((3, "classes 0 to 2, and -1 for none"), ([0, 1, 2], "for 2 images")):
        with pytest.raises(ValueError, match=fragment):
            vae.encode(images, labels=wrong)


ONES, SHAPES = torch.ones(1, 1, 28, 28), r"give \(N, 1, H, W\)"


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda vae: vae.encode(torch.ones(1, 3, 28, 28)), SHAPES),
        (lambda vae: vae.encode(ONES[0, 0]), SHAPES),
        (lambda vae: vae.encode(ONES[:0]), SHAPES),
        (lambda vae: vae.encode(ONES[..., :8]), "28x28 that it was built for"),
        (lambda vae: vae.encode(-0.5 * ONES), r"\(images \+ 1\) / 2"),
        (lambda vae: vae.encode(255 * ONES), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(torch.nan * ONES), r"must be in \[0, 1\]"),
        (lambda vae: vae.encode(ONES.int()), "give uint8, uint16, or floats"),
        (lambda vae: vae.encode([]), "give at least one"),
        (lambda vae: vae.encode([ONES, ONES[..., :8]]), "all of one size"),
        (lambda vae: vae.encode(ONES, labels=0), "trained without labels"),
        (lambda vae: vae.decode(torch.ones(2, 4)), r"give \(N, 3\)"),
        (lambda vae: vae.sample(0), "num_images=0"),
        (lambda vae: vae.sample(1, size=8), "28x28 that it was built for"),
    ],
)
def test_wrong_arguments_are_named(plain, call, fragment):
    with pytest.raises(ValueError, match=fragment):
        call(plain)


def test_a_run_a_checkpoint_and_other_weights(plain_run):
    folder = plain_run / "checkpoints" / "step_00000010"
    for path, options, step, name in (
        (plain_run, {}, 20, "ema"),
        (folder, {}, 10, "ema"),
        (str(plain_run), {"checkpoint": 10, "weights": "model"}, 10, "model"),
    ):
        vae = vae_dist.load(path, device="cpu", **options)
        assert (vae.step, vae.model.training) == (step, False)
        expected = dict(weights(plain_run, step, name))
        torch.testing.assert_close(dict(vae.model.state_dict()), expected, rtol=0, atol=0)
    for path, checkpoint, fragment in (
        (folder, "best", "is a checkpoint; leave it out"),
        (plain_run.parent, "latest", "no run folder"),
        (plain_run, 15, "checkpoint=15 .*latest, 10, 20"),
    ):
        with pytest.raises(ConfigError, match=fragment):
            vae_dist.load(path, checkpoint=checkpoint)


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
