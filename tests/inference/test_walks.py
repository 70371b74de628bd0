from __future__ import annotations

import pytest
import torch

from tests.support.tiny_run import tiny_config
from vae_dist.inference.sampling import decode_means
from vae_dist.inference.walks import interpolate, traverse
from vae_dist.models.build import build_vae
from vae_dist.models.vae import VAE


def model(latent: str) -> VAE:
    vae = build_vae(tiny_config(latent=latent), (8, 8)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(vae.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return vae


@pytest.mark.parametrize("latent", ["vector", "spatial"])
def test_ways_between_latents(latent: str) -> None:
    vae = model(latent)
    shape = vae.latent_shape(8, 8)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, *shape, generator=generator)
    ways = interpolate(vae, a, b, (8, 8), num_points=3).unflatten(0, (2, 3))
    for pair in range(2):
        latents = torch.stack([a[pair], (a[pair] + b[pair]) / 2, b[pair]])
        assert torch.equal(ways[pair], decode_means(vae, latents, (8, 8)))
    assert not torch.equal(ways[0, 0], ways[0, 2])


def test_a_traversal_moves_one_unit() -> None:
    vae, z = model("vector"), torch.tensor([0.5, -0.5, 1.0])
    rows = traverse(vae, z, (8, 8), units=[2, 0], values=torch.tensor([-3.0, 0.5]))
    expected = torch.tensor([[0.5, -0.5, -3], [0.5, -0.5, 0.5], [-3, -0.5, 1], [0.5, -0.5, 1]])
    assert torch.equal(rows, decode_means(vae, expected, (8, 8)))


def test_a_traversal_raises_a_channel() -> None:
    vae = model("spatial")
    z = torch.randn(vae.latent_shape(8, 8), generator=torch.Generator().manual_seed(1))
    rows = traverse(vae, z, (8, 8), units=[1], values=torch.tensor([0.0, 2.0]))
    raised = z.clone()
    raised[1] += 2.0
    assert torch.equal(rows, decode_means(vae, torch.stack([z, raised]), (8, 8)))
