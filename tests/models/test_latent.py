"""The posterior against torch.distributions and its own bounds; moments over a data set."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae_dist.models import latent


@pytest.mark.parametrize("shape", [(5, 8), (5, 4, 3, 2)])
def test_kl_and_log_ratio_are_those_of_torch_distributions(shape):
    mean, log_variance = latent.diagonal_gaussian(
        2 * torch.randn(shape[0], 2 * shape[1], *shape[2:])
    )
    q, p = Normal(mean.double(), torch.exp(0.5 * log_variance.double())), Normal(0.0, 1.0)
    expected = kl_divergence(q, p).reshape(*shape[:2], -1).sum(2)  # of each unit
    kl = latent.kl_to_standard_normal(mean, log_variance)
    assert kl.shape == shape[:2] and kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    noise = torch.randn(shape[0], 3, *shape[1:])
    draws = latent.sample_posterior(mean, log_variance, noise)
    z = draws[:, 1].double()
    torch.testing.assert_close(z, q.loc + q.scale * noise[:, 1], rtol=1e-5, atol=1e-5)
    ratio = (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1)
    found = latent.log_ratio_to_prior(draws, mean, log_variance)[:, 1].double()
    torch.testing.assert_close(found, ratio, rtol=1e-4, atol=1e-4)


def test_kl_keeps_its_digits_close_to_the_prior():
    mean, log_variance = torch.zeros(1, 2), torch.tensor([[1e-3, 0.0]])
    expected = torch.tensor([[0.5 * (1e-6 / 2 + 1e-9 / 6), 0.0]])  # exp(t) - 1 - t = t^2/2 + ...
    found = latent.kl_to_standard_normal(mean, log_variance)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_log_variance_is_bounded_smoothly_and_finite():
    raw = torch.linspace(-200, 200, 40_001, dtype=torch.float32, requires_grad=True)
    _, bounded = latent.diagonal_gaussian(torch.stack([raw, raw]).T)
    inside = (raw >= -20) & (raw <= 10)
    torch.testing.assert_close(bounded[inside, 0], raw[inside], rtol=0, atol=1e-4)
    assert bounded.min() >= latent.MIN_LOG_VARIANCE and bounded.max() <= latent.MAX_LOG_VARIANCE
    (slope,) = torch.autograd.grad(bounded.sum(), raw)
    assert slope.min() >= 0 and slope.max() <= 1
    # no corner: the slope moves by at most a quarter of the spacing
    assert slope.diff().abs().max() <= 0.25 * 0.01 + 1e-5
    for extreme in (-1e30, -200.0, 200.0, 1e30):
        moments = torch.tensor([[0.5, extreme]], requires_grad=True)
        mean, log_variance = latent.diagonal_gaussian(moments)
        z = latent.sample_posterior(mean, log_variance, torch.ones(1, 1))
        loss = latent.kl_to_standard_normal(mean, log_variance).sum() + z.square().sum()
        (gradient,) = torch.autograd.grad(loss, moments)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_scaled_draws_have_mean_0_and_variance_1():
    """Against moments of actual draws z ~ q(z|x) of images of several sizes, far from 0."""
    offset, draws = torch.tensor([300.0, -2.0]).view(1, 2, 1, 1), []
    moments, constant = latent.LatentMoments(2), latent.LatentMoments(4)
    for size in ((8, 8), (12, 4), (5, 1)):
        mean, log_variance = offset + 0.5 * torch.randn(13, 2, *size), torch.randn(13, 2, *size) - 1
        moments.add(mean, log_variance)
        z = mean + (0.5 * log_variance).exp() * torch.randn(200, 13, 2, *size)
        draws.append(z.transpose(0, 2).flatten(1).double())
    found, z = moments.statistics(), torch.cat(draws, 1)  # (2, draws)
    of_channels = found["per_channel"]
    assert of_channels["mean"] == pytest.approx(z.mean(1).tolist(), abs=0.01)
    assert of_channels["std"] == pytest.approx(z.std(1).tolist(), rel=0.01)
    scaled = (z - found["shift_factor"]) * found["scaling_factor"]
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scaled.std()) == pytest.approx(1, rel=1e-3)
    assert found["num_images"] == 39
    constant.add(torch.full((3, 4), 2.0), None)
    known = {"scaling_factor": 1.0, "shift_factor": 2.0, "num_images": 3}
    assert constant.statistics() == known | {"per_channel": {"mean": [2.0] * 4, "std": [0.0] * 4}}
