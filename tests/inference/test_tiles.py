"""Tiles against the untiled model: exact where layers look near, else within the stated bound."""

import pytest
import torch
from torch import nn

from tests.models.test_vae import small, trained
from vae_dist.inference import tiles
from vae_dist.randomness import torch_generator

# 208 positions of a latent of stride 2; a quarter of the overlap, 13, is not used, and no layer
# of `model` looks further
TILE = 416
CLOSE = {"rtol": 0, "atol": 1e-5}


def smooth_images(size):
    coarse = torch.randn(1, 3, 6, 6, generator=torch_generator(0, "images"))
    return torch.tanh(nn.functional.interpolate(coarse, size=size, mode="bicubic"))


@pytest.fixture(scope="module")
def model():
    """Of random weights, and layers that look at few positions around."""
    model = trained(small("spatial", attention=False, channels=[8, 8]), (16, 16)).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    return model


@pytest.mark.parametrize("size", [(24, 900), (901, 23), (420, 424)])
@torch.no_grad()
def test_layers_that_look_near_give_the_untiled_result(model, size):
    """At sizes that the stride does not divide, with a mask, too; bit for bit in a single tile."""
    images, mask = smooth_images(size), None
    if size[0] % 2:
        mask = (torch.arange(size[1]) % 5 > 0).expand(1, 1, *size).to(torch.uint8)
    expected = model.encode(images, None, mask)
    found = tiles.encode(model, images, tile=TILE, mask=mask)
    torch.testing.assert_close(found, expected, **CLOSE)
    decoded = tiles.decode(model, expected[0], size, tile=TILE)
    torch.testing.assert_close(decoded, model.decode(expected[0], size), **CLOSE)
    assert found[0].std() > 0.01 and decoded.std() > 0.01

    assert torch.equal(tiles.encode(model, images, tile=902, mask=mask)[0], expected[0])
    whole = tiles.decode(model, expected[0], size, tile=902)
    assert torch.equal(whole, model.decode(expected[0], size))
