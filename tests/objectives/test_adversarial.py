"""Hinge loss, R1 against autograd, the adaptive weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vae_dist.objectives.adversarial import adaptive_weight, hinge_loss, r1_penalty


def test_hinge_loss_of_each_pair():
    on_real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
    on_fake = torch.tensor([[-3.0, 0.0], [0.5, -0.5]]).view(2, 1, 1, 2)
    expected = torch.tensor([0.5 * 0.25 + 0.5 * 0.5, 0.5 * 1.0 + 0.5 * 1.0])
    torch.testing.assert_close(hinge_loss(on_real, on_fake), expected)


def test_r1_is_the_squared_jacobian_of_the_summed_logits_over_their_number():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 3)]
    network = nn.Sequential(*layers).double()
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

    def penalty(weight):
        """The gradient of R1 by the weights is that of finite differences."""
        real = images.detach().requires_grad_()
        weights = {"0.weight": weight}
        return r1_penalty(torch.func.functional_call(network, weights, (real,)), real).sum()

    weight = network[0].weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(penalty, (weight,), fast_mode=True)


def test_the_adaptive_weight_is_a_clamped_ratio_of_norms():
    main, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(main, other, largest=100.0)) == pytest.approx(2.5)
    assert float(adaptive_weight(main, other, largest=2.0)) == 2.0
    assert float(adaptive_weight(main, 0 * other, largest=7.0)) == 7.0
    assert float(adaptive_weight(0 * main, other, largest=7.0)) == 0.0
    assert math.isnan(float(adaptive_weight(main * math.nan, other, largest=7.0)))
