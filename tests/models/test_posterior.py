"""The diagonal Gaussian against torch.distributions and against its own bounds."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae_dist.models.latent import (
    MAX_LOG_VARIANCE,
    MIN_LOG_VARIANCE,
    diagonal_gaussian,
    kl_to_standard_normal,
    sample_posterior,
)


def random_posterior(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=generator)
    return diagonal_gaussian(2 * moments)


@pytest.mark.parametrize("shape", [(5, 8), (5, 4, 3, 2)])
def test_kl_is_that_of_torch_distributions(shape: tuple[int, ...]) -> None:
    mean, log_variance = random_posterior(*shape)
    q = Normal(mean.double(), torch.exp(0.5 * log_variance.double()))
    p = Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))
    expected = kl_divergence(q, p).reshape(*shape[:2], -1).sum(2)  # of each unit
    kl = kl_to_standard_normal(mean, log_variance)
    assert kl.shape == shape[:2] and kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_keeps_its_digits_close_to_the_prior() -> None:
    mean, log_variance = torch.zeros(1, 1), torch.full((1, 1), 1e-3)
    # exp(t) - 1 - t = t^2/2 + t^3/6 + ...
    expected = torch.tensor([[0.5 * (1e-6 / 2 + 1e-9 / 6)]])
    torch.testing.assert_close(
        kl_to_standard_normal(mean, log_variance), expected, rtol=2e-3, atol=0
    )
    assert kl_to_standard_normal(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [[0.0] * 3]


def test_draws_have_the_moments_of_q() -> None:
    mean, log_variance = torch.tensor([[1.5, -2.0]]), torch.tensor([[-1.0, 2.0]])
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(1))
    z = sample_posterior(mean, log_variance, noise)
    torch.testing.assert_close(z.mean(0, keepdim=True), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(z.var(0).log().unsqueeze(0), log_variance, rtol=0, atol=0.02)


def test_log_variance_is_bounded_smoothly() -> None:
    raw = torch.linspace(-200, 200, 40_001, dtype=torch.float32, requires_grad=True)
    _, bounded = diagonal_gaussian(torch.stack([raw, raw]).T)
    bounded = bounded.squeeze(1)
    inside = (raw >= -20) & (raw <= 10)
    torch.testing.assert_close(bounded[inside], raw[inside], rtol=0, atol=1e-4)
    assert bounded.min() >= MIN_LOG_VARIANCE and bounded.max() <= MAX_LOG_VARIANCE
    (slope,) = torch.autograd.grad(bounded.sum(), raw)
    assert slope.min() >= 0 and slope.max() <= 1
    # No corner: the slope moves by at most a quarter of the spacing.
    assert slope.diff().abs().max() <= 0.25 * 0.01 + 1e-5


@pytest.mark.parametrize("raw", [-1e30, -200.0, 200.0, 1e30])
def test_extreme_outputs_give_finite_kl_and_gradients(raw: float) -> None:
    moments = torch.tensor([[0.5, raw]], requires_grad=True)
    mean, log_variance = diagonal_gaussian(moments)
    z = sample_posterior(mean, log_variance, torch.ones(1, 1))
    loss = kl_to_standard_normal(mean, log_variance).sum() + z.square().sum()
    (gradient,) = torch.autograd.grad(loss, moments)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_bfloat16_moments_become_float32() -> None:
    mean, log_variance = diagonal_gaussian(torch.randn(2, 8, dtype=torch.bfloat16))
    assert mean.dtype == log_variance.dtype == torch.float32 and mean.shape == (2, 4)
