"""What a model makes on a CUDA device is what it makes on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.devices import DEVICES
from tests.support.evaluated import tiny_model
from vae_dist.config.commands import ImputeCommand
from vae_dist.inference import tiles
from vae_dist.inference.impute import impute
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.latent import kl_to_standard_normal
from vae_dist.models.vae import VAE
from vae_dist.training.compile import use_tensor_float_32

SIZE = (6, 5)


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 1, *SIZE), generator=generator, dtype=torch.uint8)


def pictures_of(model: VAE) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    stored, vae = images(), BatchedVAE(model)
    mean, log_variance = vae.encode(stored)
    unit = int(kl_to_standard_normal(mean, log_variance).mean(0).argmax())
    values = torch.linspace(-3, 3, 4)
    mask = (torch.arange(SIZE[1]) < 3).to(torch.uint8).expand(4, 1, *SIZE).contiguous()
    half = torch.full(stored.shape, 0.5, device=device)
    prepared = model.likelihood.prepare(stored.to(device), half)
    found = {
        "samples": BatchedVAE(model, 2).sample(5, SIZE, seed=1),
        "reconstructions": vae.reconstruct(stored),
        "interpolations": vae.interpolate(mean[:2], mean[2:], SIZE, num_points=3),
        "traversals": vae.traverse(mean[0], SIZE, units=[unit], values=values),
    }
    for method in ("single", "importance", "gibbs"):
        how = ImputeCommand(method=method, samples=8, draws=2, seed=1, batch_size=3)
        found[f"{method} mean"] = impute(model, prepared, mask, how).mean
    return {name: 127.5 * tensor for name, tensor in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "laplace")])
def test_pictures_are_those_of_the_cpu(device: str, latent: str, kind: str) -> None:
    model = tiny_model(latent=latent, kind=kind).eval()
    expected = pictures_of(model)
    use_tensor_float_32(torch.device(device), "no")  # as load_model does
    for name, tensor in pictures_of(model.to(device)).items():
        assert tensor.device.type == "cpu", name
        if name == "gibbs mean" and device != "cpu":
            continue  # draws of its chains are made on the device
        assert float((tensor - expected[name]).abs().max()) <= 1.0, name


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_are_those_of_the_cpu(device: str) -> None:
    model = tiny_model(latent="spatial", kind="gaussian").eval()
    use_tensor_float_32(torch.device(device), "no")
    generator = torch.Generator().manual_seed(0)
    pixels = 2 * torch.rand((1, 1, 40, 36), generator=generator) - 1
    with torch.inference_mode():
        mean, _ = tiles.encode(model, pixels, tile=16)
        params = tiles.decode(model, mean, (40, 36), tile=16)
        model.to(device)
        found, _ = tiles.encode(model, pixels.to(device), tile=16)
        found_params = tiles.decode(model, found, (40, 36), tile=16)
    torch.testing.assert_close(found.cpu(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_params.cpu(), params, rtol=1e-4, atol=1e-4)
