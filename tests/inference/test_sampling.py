"""`BatchedVAE`: paths through latents, pictures on every device, and large images in tiles."""

import pytest
import torch
from torch import nn

from tests.models.test_vae import small, trained
from tests.support.devices import CUDA
from tests.support.evaluated import IMAGES, SIZE, tiny_model
from vae_dist.config.commands import ImputeCommand
from vae_dist.inference import tiles
from vae_dist.inference.impute import impute
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.randomness import draws, torch_generator
from vae_dist.training.compile import use_tensor_float_32


@pytest.fixture(scope="module", params=["vector", "spatial"])
def model(request):
    return tiny_model(latent=request.param).eval()


def test_a_sample_is_decoded_from_the_draw_of_its_number(model):
    noise = draws(torch.randn, 1, "prior", range(5), model.latent_shape(*SIZE))
    found = BatchedVAE(model).sample(3, SIZE, seed=1, first=2, temperature=0.5)
    torch.testing.assert_close(found, BatchedVAE(model).decode(noise[2:] / 2, SIZE))


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


def pictures_of(latent, kind, device):
    model, stored = tiny_model(latent=latent, kind=kind).eval().to(device), IMAGES[:4]
    vae = BatchedVAE(model)
    mean, _ = vae.encode(stored)
    mask = (torch.arange(SIZE[1]) < 3).to(torch.uint8).expand(4, 1, *SIZE).contiguous()
    shown = model.likelihood.noise_free(stored.to(device))
    found = {
        "samples": BatchedVAE(model, 2).sample(5, SIZE, seed=1),
        "reconstructions": vae.reconstruct(stored),
        "interpolations": vae.interpolate(mean[:2], mean[2:], SIZE, num_points=3),
        "traversals": vae.traverse(mean[0], SIZE, units=[0], values=torch.linspace(-3, 3, 4)),
    }
    if latent == "spatial":
        found["tiles"] = BatchedVAE(model, tile=16).reconstruct(stored.repeat(1, 1, 7, 7))
    for method in ("single", "importance", "gibbs"):
        how = ImputeCommand(method=method, samples=8, draws=2, seed=1, batch_size=3)
        found[method] = impute(model, shown, mask, how).mean
    return {name: 127.5 * tensor for name, tensor in found.items()}


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "laplace")])
def test_pictures_are_those_of_the_cpu(device, latent, kind):
    use_tensor_float_32(torch.device(device), "no")  # as load_model does
    expected, found = (pictures_of(latent, kind, place) for place in ("cpu", device))
    for name, tensor in found.items():
        assert tensor.device.type == "cpu", name
        if name != "gibbs":  # draws of its chains are of the device
            assert float((tensor - expected[name]).abs().max()) <= 1.0, name


# tiles

# 208 positions of a latent of stride 2; a quarter of the overlap, 13, is not used, and no layer
# of `near` looks further
TILE = 416


@pytest.fixture(scope="module")
def near():
    """Of random weights, and layers that look at few positions around."""
    model = trained(small("spatial", attention=False, channels=[8, 8]), (16, 16)).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    return model


@pytest.mark.parametrize("size", [(24, 900), (901, 23), (420, 424)])
@torch.no_grad()
def test_layers_that_look_near_give_the_untiled_result(near, size):
    """At sizes that the stride does not divide, with a mask, too; bit for bit in a single tile."""
    coarse, mask = torch.randn(1, 3, 6, 6, generator=torch_generator(0, "images")), None
    images = torch.tanh(nn.functional.interpolate(coarse, size=size, mode="bicubic"))
    if size[0] % 2:
        mask = (torch.arange(size[1]) % 5 > 0).expand(1, 1, *size).to(torch.uint8)
    moments = near.encode(images, None, mask)
    decoded = near.decode(moments[0], size)
    assert moments[0].std() > 0.01 and decoded.std() > 0.01
    for tile, error in ((TILE, 1e-5), (902, 0.0)):
        found = tiles.encode(near, images, tile=tile, mask=mask)
        torch.testing.assert_close(found, moments, rtol=0, atol=error)
        found = tiles.decode(near, moments[0], size, tile=tile)
        torch.testing.assert_close(found, decoded, rtol=0, atol=error)
