from __future__ import annotations

import pytest
import torch

from tests.support.tiny_run import tiny_config
from vae_dist.inference.sampling import (
    decode_means,
    interpolate,
    posteriors,
    reconstruct,
    sample_prior,
    traverse,
)
from vae_dist.models.build import build_vae
from vae_dist.models.latent import prior_latents
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request: pytest.FixtureRequest) -> VAE:
    model = build_vae(tiny_config(latent=request.param), (8, 6)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch_generator(number, ""))
            )
    return model


def test_samples_are_images(model: VAE) -> None:
    images = sample_prior(model, 5, (8, 6), seed=0)
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (5, 1, 8, 6))
    assert -1 <= images.min() < images.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in images}) == 5


def test_sample_i_depends_on_seed_and_i_alone(model: VAE) -> None:
    images = sample_prior(model, 7, (8, 6), seed=1, batch_size=7)
    for num_images, batch_size in ((7, 1), (7, 3), (4, 4)):
        again = sample_prior(model, num_images, (8, 6), seed=1, batch_size=batch_size)
        torch.testing.assert_close(again, images[:num_images], rtol=0, atol=1e-5)
    other = sample_prior(model, 7, (8, 6), seed=2)
    assert (other - images).abs().max() > 0.01


def test_latents_are_standard_normal_times_temperature(model: VAE) -> None:
    shape = model.latent_shape(8, 6)
    z = prior_latents(shape, 500, seed=0)
    assert z.mean().abs() < 0.1
    assert z.std() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(prior_latents(shape, 500, seed=0, temperature=0.5), 0.5 * z)
    assert torch.equal(prior_latents(shape, 2, seed=0, first=3), z[3:5])


def test_temperature_zero_leaves_one_image(model: VAE) -> None:
    images = sample_prior(model, 3, (8, 6), seed=0, temperature=0.0, batch_size=3)
    assert torch.equal(images[0], images[2])


def test_reconstruction_i_depends_on_image_i_alone(model: VAE) -> None:
    images = torch.randint(0, 256, (5, 1, 8, 6), dtype=torch.uint8)
    outputs = reconstruct(model, images, batch_size=5)
    assert (outputs.dtype, outputs.shape) == (torch.float32, images.shape)
    again = reconstruct(model, images, batch_size=2)
    torch.testing.assert_close(again, outputs, rtol=0, atol=1e-5)


def test_reconstruction_is_the_mean_at_the_posterior_mean(model: VAE) -> None:
    """Grey levels are black below one half and white above."""
    images = torch.randint(0, 256, (3, 1, 8, 6)).to(torch.uint8)
    with torch.no_grad():
        mean, _ = model.encode(torch.where(images > 127, 1.0, -1.0))
        expected = 2 * torch.sigmoid(model.decode(mean, (8, 6))) - 1
    torch.testing.assert_close(reconstruct(model, images), expected)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "discretized_gaussian"])
def test_a_posterior_is_that_of_the_very_image(kind: str) -> None:
    """Without the noise of dequantisation that training adds; as diffusers encodes it."""
    model = build_vae(tiny_config(latent="spatial", kind=kind), (8, 6)).eval()
    images = torch.randint(0, 256, (3, 1, 8, 6)).to(torch.uint8)
    with torch.no_grad():
        expected = model.encode(images / 127.5 - 1)
    torch.testing.assert_close(posteriors(model, images), expected)


def test_a_spatial_latent_makes_other_sizes() -> None:
    model = build_vae(tiny_config(latent="spatial"), (8, 6)).eval()
    assert sample_prior(model, 1, (13, 16), seed=0).shape == (1, 1, 13, 16)


def test_paths_between_latents(model: VAE) -> None:
    shape = model.latent_shape(8, 6)
    a, b = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    paths = interpolate(model, a, b, (8, 6), num_points=3).unflatten(0, (2, 3))
    for pair in range(2):
        latents = torch.stack([a[pair], (a[pair] + b[pair]) / 2, b[pair]])
        torch.testing.assert_close(paths[pair], decode_means(model, latents, (8, 6)))
    assert not torch.equal(paths[0, 0], paths[0, 2])


def test_a_traversal_sets_a_dimension_or_raises_a_channel(model: VAE) -> None:
    z = torch.randn(model.latent_shape(8, 6), generator=torch.Generator().manual_seed(1))
    rows = traverse(model, z, (8, 6), units=[2, 0], values=torch.tensor([-3.0, 0.5]))
    expected = []
    for unit, value in ((2, -3.0), (2, 0.5), (0, -3.0), (0, 0.5)):
        moved = z.clone()
        moved[unit] = value if z.ndim == 1 else moved[unit] + value
        expected.append(moved)
    torch.testing.assert_close(rows, decode_means(model, torch.stack(expected), (8, 6)))
