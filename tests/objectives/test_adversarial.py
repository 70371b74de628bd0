"""Hinge loss, R1 against autograd, the ramp and the adaptive weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vae_dist.config.schema import AdversarialConfig
from vae_dist.objectives.adversarial import adaptive_weight, hinge_loss, r1_penalty, ramp_at


def test_hinge_loss_of_each_pair() -> None:
    on_real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
    on_fake = torch.tensor([[-3.0, 0.0], [0.5, -0.5]]).view(2, 1, 1, 2)
    expected = torch.tensor([0.5 * 0.25 + 0.5 * 0.5, 0.5 * 1.0 + 0.5 * 1.0])
    torch.testing.assert_close(hinge_loss(on_real, on_fake), expected)


def float64_discriminator() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 3)]
    return nn.Sequential(*layers).double()


def test_r1_is_the_squared_jacobian_of_the_summed_logits_over_their_number() -> None:
    network = float64_discriminator()
    images = torch.randn(2, 1, 8, 9, dtype=torch.float64, requires_grad=True)
    logits = network(images)
    found = r1_penalty(logits, images)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: network(x[None]).flatten(), images[i].detach()
        )
        expected = 0.5 * jacobian.sum(0).square().sum() / logits[0].numel()
        torch.testing.assert_close(found[i], expected)
        assert expected > 0


def test_the_gradient_of_r1_is_that_of_finite_differences() -> None:
    network = float64_discriminator()
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64)

    def penalty() -> torch.Tensor:
        real = images.clone().requires_grad_()
        return r1_penalty(network(real), real).sum()

    weight = network[0].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    place, step = (1, 0, 2, 1), 1e-6
    with torch.no_grad():
        weight[place] += step
    above = penalty().detach()
    with torch.no_grad():
        weight[place] -= 2 * step
    below = penalty().detach()
    assert float(gradient[place]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4)
    assert gradient[place] != 0


def test_the_ramp_begins_after_the_discriminators_warm_up() -> None:
    config = AdversarialConfig(start_step=10, warmup_steps=5, ramp_steps=4)
    ramp = [ramp_at(config, step) for step in range(14, 21)]
    assert ramp == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    at_once = AdversarialConfig(start_step=0, warmup_steps=0, ramp_steps=0)
    assert ramp_at(at_once, 0) == 1.0


def test_the_adaptive_weight_is_a_clamped_ratio_of_norms() -> None:
    main, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(main, other, largest=100.0)) == pytest.approx(2.5)
    assert float(adaptive_weight(main, other, largest=2.0)) == 2.0
    assert float(adaptive_weight(main, 0 * other, largest=7.0)) == 7.0
    assert float(adaptive_weight(0 * main, other, largest=7.0)) == 0.0
    assert math.isnan(float(adaptive_weight(main * math.nan, other, largest=7.0)))
