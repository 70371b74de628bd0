"""`BatchedVAE`: what each image depends on, and what it is the mean of."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_run import tiny_config
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.build import build_vae
from vae_dist.models.latent import prior_latents
from vae_dist.models.vae import VAE
from vae_dist.randomness import torch_generator

SIZE = (8, 6)


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request: pytest.FixtureRequest) -> VAE:
    model = build_vae(tiny_config(latent=request.param), SIZE).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch_generator(number, ""))
            parameter.add_(0.3 * noise)
    return model


def pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, *SIZE), generator=torch_generator(0, "x")).byte()


def test_sample_i_depends_on_seed_and_i_alone(model: VAE) -> None:
    images = BatchedVAE(model, 7).sample(7, SIZE, seed=1)
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (7, 1, *SIZE))
    assert -1 <= images.min() < images.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in images}) == 7
    for num_images, batch_size in ((7, 1), (7, 3), (4, 4)):
        again = BatchedVAE(model, batch_size).sample(num_images, SIZE, seed=1)
        torch.testing.assert_close(again, images[:num_images], rtol=0, atol=1e-5)
    assert (BatchedVAE(model).sample(7, SIZE, seed=2) - images).abs().max() > 0.01
    cold = BatchedVAE(model).sample(3, SIZE, seed=0, temperature=0.0)
    assert torch.equal(cold[0], cold[2])


def test_latents_are_standard_normal_times_temperature(model: VAE) -> None:
    shape = model.latent_shape(*SIZE)
    z = prior_latents(shape, 500, seed=0)
    assert z.mean().abs() < 0.1
    assert z.std() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(prior_latents(shape, 500, seed=0, temperature=0.5), 0.5 * z)
    assert torch.equal(prior_latents(shape, 2, seed=0, first=3), z[3:5])


def test_a_reconstruction_is_the_mean_at_the_posterior_mean(model: VAE) -> None:
    """Grey levels are black below one half and white above; whatever the batch."""
    images = pixels(5)
    with torch.no_grad():
        mean, _ = model.encode(torch.where(images > 127, 1.0, -1.0))
        expected = 2 * torch.sigmoid(model.decode(mean, SIZE)) - 1
    for batch_size in (5, 2):
        found = BatchedVAE(model, batch_size).reconstruct(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "discretized_gaussian"])
def test_a_posterior_is_that_of_the_very_image(kind: str) -> None:
    """Without the noise of dequantisation that training adds; as diffusers encodes it."""
    model = build_vae(tiny_config(latent="spatial", kind=kind), SIZE).eval()
    with torch.no_grad():
        expected = model.encode(pixels(3) / 127.5 - 1)
    torch.testing.assert_close(BatchedVAE(model).encode(pixels(3)), expected)


def test_paths_between_latents(model: VAE) -> None:
    shape, vae = model.latent_shape(*SIZE), BatchedVAE(model)
    a, b = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    paths = vae.interpolate(a, b, SIZE, num_points=3).unflatten(0, (2, 3))
    for pair in range(2):
        latents = torch.stack([a[pair], (a[pair] + b[pair]) / 2, b[pair]])
        torch.testing.assert_close(paths[pair], vae.decode(latents, SIZE))
    assert not torch.equal(paths[0, 0], paths[0, 2])


def test_a_traversal_sets_a_dimension_or_raises_a_channel(model: VAE) -> None:
    z, vae = torch.randn(model.latent_shape(*SIZE)), BatchedVAE(model)
    rows = vae.traverse(z, SIZE, units=[2, 0], values=torch.tensor([-3.0, 0.5]))
    expected = []
    for unit, value in ((2, -3.0), (2, 0.5), (0, -3.0), (0, 0.5)):
        moved = z.clone()
        moved[unit] = value if z.ndim == 1 else moved[unit] + value
        expected.append(moved)
    torch.testing.assert_close(rows, vae.decode(torch.stack(expected), SIZE))
