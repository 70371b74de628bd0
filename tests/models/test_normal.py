"""Phi in log space against float64 quadrature and torch, deep into the tails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vae_dist.models.likelihoods.gaussian import clipped_mean, log_ndtr, log_probability_of_bin

CENTERS = torch.tensor([0.0, 0.3, 0.99, 1.0, 1.2, 2.0, 5.0, 12.0, 40.0, 300.0, 2e4])
HALF_WIDTHS = torch.tensor([1e-5, 1e-3, 0.05, 0.25, 0.31, 0.33, 1.0, 4.0, 60.0])


def by_quadrature(center: Tensor, half_width: Tensor) -> Tensor:
    """log of the integral of the normal density over a bin: the logsumexp of 20,001 midpoints of
    the part where the density is not negligible."""
    near = (center.abs() - half_width).clamp(min=0.0)
    low = center - half_width
    reach = torch.minimum(
        2 * half_width, (low.abs() + 12.0) if near == 0 else 140.0 / near.clamp(min=10)
    )
    step = reach / 20_001
    t = low + step * (torch.arange(20_001, dtype=torch.float64) + 0.5)
    return torch.logsumexp(-0.5 * t.square(), 0) + torch.log(step / (2 * torch.pi) ** 0.5)


@pytest.mark.parametrize("half_width", HALF_WIDTHS.tolist())
def test_bins_against_quadrature(half_width: float) -> None:
    for center in CENTERS:
        width = torch.tensor(half_width)
        found = log_probability_of_bin(center, width).double()
        expected = by_quadrature(center.double(), width.double())
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=3e-6)
        assert log_probability_of_bin(-center, width) == found


def test_log_ndtr_is_that_of_torch() -> None:
    t = torch.linspace(-30, 10, 4001, dtype=torch.float64)
    torch.testing.assert_close(log_ndtr(t), torch.special.log_ndtr(t), rtol=1e-12, atol=1e-15)
    single = log_ndtr(t.float()).double()
    torch.testing.assert_close(
        single, torch.special.log_ndtr(t.float().double()), rtol=1e-6, atol=1e-7
    )


def test_gradients_are_finite_and_right_in_the_tail() -> None:
    t = torch.tensor([-1e2, -1e3, -1e4, -1e5], requires_grad=True)
    log_ndtr(t).sum().backward()
    assert t.grad is not None
    torch.testing.assert_close(t.grad, -t.detach(), rtol=2e-4, atol=0)  # the hazard is -t + O(1/t)
    center = torch.tensor([0.0, 1e2, 1e3, 1e5, 1e-3], requires_grad=True)
    width = torch.tensor([1e3, 2.0, 2e-4, 5e4, 1e-6], requires_grad=True)
    log_probability_of_bin(center, width).sum().backward()
    assert center.grad is not None and width.grad is not None
    assert torch.isfinite(center.grad).all() and torch.isfinite(width.grad).all()


@pytest.mark.parametrize("half_width", [0.01, 0.29, 0.5, 3.0])
def test_gradients_against_finite_differences(half_width: float) -> None:
    center = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    width = torch.full_like(center, half_width).requires_grad_()
    assert torch.autograd.gradcheck(log_probability_of_bin, (center, width))
    assert torch.autograd.gradcheck(log_ndtr, (center,))


def test_clipped_mean_against_quadrature() -> None:
    mean = torch.tensor([-3.0, -1.0, 0.2, 0.99, 1.7], dtype=torch.float64).unsqueeze(1)
    sigma = torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64)
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    draws = mean.unsqueeze(2) + sigma.unsqueeze(1) * torch.special.ndtri(quantiles)
    expected = draws.clamp(-1, 1).mean(2)
    torch.testing.assert_close(clipped_mean(mean, sigma), expected, rtol=0, atol=1e-5)
    assert clipped_mean(torch.tensor(0.5), torch.tensor(1e-4)).item() == pytest.approx(0.5)
