"""`BatchedVAE`: what each image depends on, and what it is the mean of, on every device."""

import pytest
import torch

from tests.support.devices import CUDA
from tests.support.evaluated import SIZE, tiny_model
from vae_dist.config.commands import ImputeCommand
from vae_dist.inference import tiles
from vae_dist.inference.impute import impute
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import kl_to_standard_normal, prior_latents
from vae_dist.randomness import torch_generator
from vae_dist.training.compile import use_tensor_float_32


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request):
    return tiny_model(latent=request.param).eval()


def pixels(count):
    return torch.randint(0, 256, (count, 1, *SIZE), generator=torch_generator(0, "x")).byte()


def test_sample_i_depends_on_seed_and_i_alone(model):
    images = BatchedVAE(model, 7).sample(7, SIZE, seed=1)
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (7, 1, *SIZE))
    assert -1 <= images.min() < images.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in images}) == 7
    for num_images, batch_size in ((7, 1), (4, 3)):
        again = BatchedVAE(model, batch_size).sample(num_images, SIZE, seed=1)
        torch.testing.assert_close(again, images[:num_images], rtol=0, atol=1e-5)
    assert (BatchedVAE(model).sample(7, SIZE, seed=2) - images).abs().max() > 0.01
    cold = BatchedVAE(model).sample(3, SIZE, seed=0, temperature=0.0)
    torch.testing.assert_close(cold[0], cold[2])
    shape = model.latent_shape(*SIZE)
    z = prior_latents(shape, 500, seed=0)
    assert z.mean().abs() < 0.1 and z.std() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(prior_latents(shape, 500, seed=0, temperature=0.5), 0.5 * z)


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian", "laplace", "discretized_gaussian"])
def test_a_posterior_and_its_reconstruction_are_of_the_very_image(kind):
    """Without the noise of training, as diffusers encodes it; black and white are cut at half."""
    model, images = tiny_model(latent="spatial", kind=kind).eval(), pixels(5)
    shown = torch.where(images > 127, 1.0, -1.0) if kind == "bernoulli" else images / 127.5 - 1
    vae = BatchedVAE(model, 2)
    with torch.no_grad():
        expected = model.encode(shown)
        means = model.likelihood.mean(model.decode(expected[0], SIZE))
    torch.testing.assert_close(vae.encode(images), expected)
    torch.testing.assert_close(vae.reconstruct(images), means)


def test_paths_between_latents_and_traversals(model):
    shape, vae = model.latent_shape(*SIZE), BatchedVAE(model)
    a, b = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    paths = vae.interpolate(a, b, SIZE, num_points=3).unflatten(0, (2, 3))
    for pair in range(2):
        latents = torch.stack([a[pair], (a[pair] + b[pair]) / 2, b[pair]])
        torch.testing.assert_close(paths[pair], vae.decode(latents, SIZE))
    assert not torch.equal(paths[0, 0], paths[0, 2])
    # a traversal sets a dimension of a vector, or raises a channel
    rows = vae.traverse(a[0], SIZE, units=[2, 0], values=torch.tensor([-3.0, 0.5]))
    expected = []
    for unit, value in ((2, -3.0), (2, 0.5), (0, -3.0), (0, 0.5)):
        moved = a[0].clone()
        moved[unit] = value if moved.ndim == 1 else moved[unit] + value
        expected.append(moved)
    torch.testing.assert_close(rows, vae.decode(torch.stack(expected), SIZE))


def pictures_of(model):
    stored, vae, device = pixels(4), BatchedVAE(model), next(model.parameters()).device
    mean, log_variance = vae.encode(stored)
    unit = int(kl_to_standard_normal(mean, log_variance).mean(0).argmax())
    mask = (torch.arange(SIZE[1]) < 3).to(torch.uint8).expand(4, 1, *SIZE).contiguous()
    half = torch.full(stored.shape, 0.5, device=device)
    prepared = model.likelihood.prepare(stored.to(device), half)
    found = {
        "samples": BatchedVAE(model, 2).sample(5, SIZE, seed=1),
        "reconstructions": vae.reconstruct(stored),
        "interpolations": vae.interpolate(mean[:2], mean[2:], SIZE, num_points=3),
        "traversals": vae.traverse(mean[0], SIZE, units=[unit], values=torch.linspace(-3, 3, 4)),
    }
    for method in ("single", "importance", "gibbs"):
        how = ImputeCommand(method=method, samples=8, draws=2, seed=1, batch_size=3)
        found[f"{method} mean"] = impute(model, prepared, mask, how).mean
    return {name: 127.5 * tensor for name, tensor in found.items()}


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "laplace")])
def test_pictures_and_tiles_are_those_of_the_cpu(device, latent, kind):
    model = tiny_model(latent=latent, kind=kind).eval()
    image = 2 * torch.rand((1, 1, 40, 36), generator=torch.Generator().manual_seed(0)) - 1

    def tiled():
        if latent == "vector":
            return []
        with torch.inference_mode():
            mean, _ = tiles.encode(model, image.to(next(model.parameters()).device), tile=16)
            return [mean.cpu(), tiles.decode(model, mean, (40, 36), tile=16).cpu()]

    expected, expected_tiles = pictures_of(model), tiled()
    use_tensor_float_32(torch.device(device), "no")  # as load_model does
    model.to(device)
    torch.testing.assert_close(tiled(), expected_tiles, rtol=1e-4, atol=1e-4)
    for name, tensor in pictures_of(model).items():
        assert tensor.device.type == "cpu", name
        if name != "gibbs mean":  # draws of its chains are of the device
            assert float((tensor - expected[name]).abs().max()) <= 1.0, name
