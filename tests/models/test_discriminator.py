"""PatchGAN: its weights, what a logit sees, and that the logits of an image are its own."""

import pytest
import torch

from vae_dist.config.schema import AdversarialConfig
from vae_dist.models.discriminator import build_discriminator, smallest_side


def test_the_default_one_has_the_weights_of_the_published_network():
    """64, 128, 256, 512 and 1 channels of 4x4 kernels, a scale and a shift for each norm."""
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    norms = 2 * (128 + 256 + 512)
    with torch.device("meta"):
        found = build_discriminator(AdversarialConfig(), image_channels=3, seed=0)
        assert sum(p.numel() for p in found.parameters()) == kernels + norms + 64 + 1
        assert found(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_its_own_image(layers, pixels):
    config, side = AdversarialConfig(channels=4, layers=layers), smallest_side(layers)
    model = build_discriminator(config, image_channels=3, seed=3)
    assert model(torch.zeros(1, 3, side, side)).numel() >= 1
    images = torch.randn(4, 3, 32, 40)
    alone = torch.cat([model(image[None]) for image in images])  # no batch statistics
    torch.testing.assert_close(alone, model(images), rtol=1e-4, atol=1e-6)
    for i in range(len(model.norms)):  # a norm's mean is of the whole map
        model.norms[i] = torch.nn.Identity()
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = model(images)[0, 0]
    (gradient,) = torch.autograd.grad(logits[len(logits) // 2, len(logits) // 2], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == pixels
