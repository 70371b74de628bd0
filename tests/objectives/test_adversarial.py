"""Hinge loss, the adaptive weight."""

import math

import pytest
import torch

from vae_dist.objectives.adversarial import adaptive_weight, hinge_loss


def test_hinge_loss_of_each_pair():
    on_real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
    on_fake = torch.tensor([[-3.0, 0.0], [0.5, -0.5]]).view(2, 1, 1, 2)
    expected = torch.tensor([0.5 * 0.25 + 0.5 * 0.5, 0.5 * 1.0 + 0.5 * 1.0])
    torch.testing.assert_close(hinge_loss(on_real, on_fake), expected)


def test_the_adaptive_weight_is_a_clamped_ratio_of_norms():
    main, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(main, other, largest=100.0)) == pytest.approx(2.5)
    assert float(adaptive_weight(main, other, largest=2.0)) == 2.0
    assert float(adaptive_weight(main, 0 * other, largest=7.0)) == 7.0
    assert float(adaptive_weight(0 * main, other, largest=7.0)) == 0.0
    assert math.isnan(float(adaptive_weight(main * math.nan, other, largest=7.0)))
