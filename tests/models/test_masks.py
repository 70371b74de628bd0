"""Incomplete images: what the encoder sees of them and what the likelihood counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.test_conditions import SIZE, model
from tests.models.test_vae import away_from_zero, inputs


def half(batch: int, *, top: bool = True) -> Tensor:
    mask = torch.zeros(batch, 1, *SIZE, dtype=torch.uint8)
    mask[:, :, : SIZE[0] // 2] = 1
    return mask if top else 1 - mask


@pytest.mark.parametrize("mask", ["none", "half"])
@pytest.mark.parametrize("fill", [0.7, float("nan")])
def test_missing_pixels_are_not_looked_at(mask: str, fill: float) -> None:
    vae = model(mask=mask)
    away_from_zero(vae)
    images, noise = inputs(vae, 2, 3, SIZE)
    observed = half(2)
    broken = torch.where(observed > 0, images, fill)
    output, other = vae(images, noise, mask=observed), vae(broken, noise, mask=observed)
    for one, two in zip(output, other, strict=True):
        assert torch.equal(one, two)
    filled = torch.where(observed > 0, images, 0.0)
    whole = vae.encode(filled)[0]
    if mask == "none":  # an ordinary model sees mid-grey pixels
        torch.testing.assert_close(whole, output.mean)
    else:  # this one is told that they are not there
        assert not torch.allclose(whole, output.mean)


def test_the_likelihood_counts_observed_pixels_only() -> None:
    vae = model(mask="half")
    away_from_zero(vae)
    images, noise = inputs(vae, 2, 3, SIZE)
    output = vae(images, noise, mask=half(2))
    parts = [
        vae.likelihood.log_prob(output.params, images, half(2, top=top)) for top in (True, False)
    ]
    torch.testing.assert_close(output.log_likelihood, parts[0])
    torch.testing.assert_close(parts[0] + parts[1], vae.likelihood.log_prob(output.params, images))


def test_a_model_that_sees_masks_takes_no_mask_for_a_complete_image() -> None:
    vae = model(mask="half")
    away_from_zero(vae)
    images, noise = inputs(vae, 2, 3, SIZE)
    everything = torch.ones(2, 1, *SIZE, dtype=torch.uint8)
    torch.testing.assert_close(vae(images, noise).mean, vae(images, noise, mask=everything).mean)
    assert vae.encoder.conv_in.in_channels == 4
