from __future__ import annotations

import pytest
import torch

from vae_dist.models.latent import LatentMoments


def test_scaled_draws_have_mean_0_and_variance_1() -> None:
    """Against moments of actual draws z ~ q(z|x), far from 0."""
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([300.0, -2.0]).view(1, 2, 1, 1)
    mean = offset + 0.5 * torch.randn(40, 2, 8, 8, generator=generator)
    log_variance = torch.randn(40, 2, 8, 8, generator=generator) - 1
    moments = LatentMoments(2)
    for rows in torch.arange(40).split(7):
        moments.add(mean[rows], log_variance[rows])
    found = moments.statistics()
    noise = torch.randn(200, 40, 2, 8, 8, generator=generator)
    z = (mean + (0.5 * log_variance).exp() * noise).double()
    assert found.mean == pytest.approx(z.mean((0, 1, 3, 4)).tolist(), abs=0.01)
    assert found.std == pytest.approx(z.transpose(0, 2).flatten(1).std(1).tolist(), rel=0.01)
    scaled = (z - found.shift_factor) * found.scaling_factor
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scaled.std()) == pytest.approx(1, rel=1e-3)
    assert found.num_images == 40


def test_images_of_several_sizes_and_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, h, w, generator=generator) for h, w in ((2, 3), (5, 1), (4, 4))]
    whole, parts = LatentMoments(3), LatentMoments(3)
    for image in images:
        whole.add(image, None)
        part = LatentMoments(3)
        part.add(image, None)
        parts.add_sums(part.sums.tolist())
    assert whole.statistics() == parts.statistics()
    values = torch.cat([image.flatten(2) for image in images], 2)[0].double()
    assert whole.statistics().std == pytest.approx(values.std(1, correction=0).tolist())
    assert whole.statistics().scaling_factor == pytest.approx(float(values.std(correction=0)) ** -1)


def test_latents_that_do_not_vary_are_not_scaled() -> None:
    moments = LatentMoments(4)
    moments.add(torch.full((3, 4), 2.0), None)
    found = moments.statistics()
    assert (found.scaling_factor, found.shift_factor, found.std) == (1.0, 2.0, [0.0] * 4)
