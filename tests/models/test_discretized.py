"""Likelihoods of levels: they sum to 1, are that of torch.distributions, and draw what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import (
    DiscretizedLogisticMixture,
    Levels,
    Likelihood,
    bits_per_dim,
    build_likelihood,
)
from vae_dist.randomness import torch_generator

GAUSSIANS = [
    {"kind": "discretized_gaussian", "variance": variance}
    for variance in ("fixed", "shared", "per_channel", "per_pixel")
]
MIXTURE = {"kind": "discretized_logistic_mixture", "mixtures": 3}
ALL = [*GAUSSIANS, MIXTURE]
IDS = [f"{knobs['kind']}-{knobs.get('variance', 'K=3')}" for knobs in ALL]


def likelihood(knobs: dict[str, object], *, bits: int = 8, channels: int = 1) -> Likelihood:
    return build_likelihood(LikelihoodConfig(**knobs), DataConfig(bits=bits, channels=channels))


def params_of(model: Likelihood, channels: int, *, scale: float = 1.0, size: int = 1) -> Tensor:
    shape = (1, model.num_params(channels), size, size)
    return scale * torch.randn(shape, generator=torch_generator(1, "test"))


def every_level(bits: int) -> Tensor:
    """Centers of all levels, (2^bits, 1, 1, 1)."""
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64).float().view(-1, 1, 1, 1)


def with_sharp_scales(model: Likelihood, params: Tensor, channels: int) -> Tensor:
    """Some of the learned scales far below a level, some far above the range."""
    params = params.clone()
    half = params.shape[1] // 2
    if params.shape[1] > channels:
        params[:, half:] *= 4.0
    return params


@pytest.mark.parametrize("knobs", ALL, ids=IDS)
@pytest.mark.parametrize("bits", [5, 8, 16])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_probabilities_sum_to_one(knobs: dict[str, object], bits: int, scale: float) -> None:
    model = likelihood({**knobs, **_floor(knobs)}, bits=bits)
    params = with_sharp_scales(model, params_of(model, 1, scale=scale), 1)
    images = every_level(bits)
    log_p = model.log_prob(params.expand(len(images), -1, -1, -1), images)
    # edges of 65,536 bins around centers that float32 rounds
    assert log_p.double().exp().sum().item() == pytest.approx(1.0, abs=2e-5 if bits == 16 else 3e-6)
    assert torch.isfinite(log_p).all()


def _floor(knobs: dict[str, object]) -> dict[str, float]:
    return {} if knobs.get("variance") == "fixed" else {"min_sigma": 1e-3}


@pytest.mark.parametrize("channels", [2, 3])
def test_a_mixture_over_all_colours_sums_to_one(channels: int) -> None:
    model = DiscretizedLogisticMixture(
        LikelihoodConfig(mixtures=2), channels=channels, levels=Levels(bits=2)
    )
    params = params_of(model, channels)
    centers = torch.linspace(-1, 1, 4)
    colours = torch.tensor(list(itertools.product(centers.tolist(), repeat=channels)))
    images = colours.view(-1, channels, 1, 1)
    log_p = model.log_prob(params.expand(len(images), -1, -1, -1), images)
    assert log_p.double().exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_mixture_is_that_of_its_definition() -> None:
    """Salimans et al. 2017, equations 1 to 3, written out in float64."""
    model = likelihood({**MIXTURE, "min_sigma": 1e-9}, channels=3)
    params = params_of(model, 3, size=2).double()
    x = torch.randint(1, 255, (1, 3, 2, 2), generator=torch_generator(0, "test")).double()
    x = x / 127.5 - 1
    logits, rest = params[0, :3], params[0, 3:].unflatten(0, (3, 9))
    total = 0.0
    for row, column in itertools.product(range(2), range(2)):
        r, g, _ = x[0, :, row, column]
        p = torch.zeros((), dtype=torch.float64)
        for k, offset in enumerate((-2 / 3, 0.0, 2 / 3)):
            numbers = rest[k, :, row, column]
            means, scales = numbers[:3] + offset, 0.25 * numbers[3:6].exp()
            alpha, beta, gamma = numbers[6:].tanh()
            centers = torch.stack([means[0], means[1] + alpha * r, means[2] + beta * r + gamma * g])
            here = x[0, :, row, column] - centers
            upper, lower = (torch.sigmoid((here + s / 255) / scales) for s in (1, -1))
            p = p + torch.softmax(logits[:, row, column], 0)[k] * (upper - lower).prod()
        total += math.log(p)
    assert model.log_prob(params, x).item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("bits", [5, 8])
def test_the_gaussian_is_a_difference_of_cdfs(bits: int) -> None:
    model = likelihood(
        {"kind": "discretized_gaussian", "variance": "fixed", "sigma": 0.2}, bits=bits
    )
    params = torch.full((1, 1, 1, 1), 0.3)
    centers = every_level(bits)
    log_p = model.log_prob(params.expand(len(centers), -1, -1, -1), centers).double()
    edges = centers.double().flatten()[:-1] + 1 / (2**bits - 1)
    cdf = Normal(0.3, torch.tensor(0.2, dtype=torch.float64)).cdf(edges)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    expected = torch.cat([zero, cdf, one]).diff()
    big = expected > 1e-9
    torch.testing.assert_close(log_p[big], expected[big].log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [5, 8, 16])
def test_equal_probabilities_have_as_many_bits_as_the_data(bits: int) -> None:
    num_dims = 3 * 64 * 64
    for knobs in (*GAUSSIANS[:1], MIXTURE):
        model = likelihood(knobs, bits=bits)
        nats = model.discrete_nll_nats(num_dims * math.log(2**bits), num_dims)
        assert bits_per_dim(nats, num_dims=num_dims) == pytest.approx(bits, abs=1e-12)
    # a density of 1/2 on [-1, 1), of dequantised levels
    density = likelihood({"kind": "gaussian"}, bits=bits)
    nats = density.discrete_nll_nats(num_dims * math.log(2), num_dims)
    assert bits_per_dim(nats, num_dims=num_dims) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    "knobs", [*ALL, {"kind": "gaussian"}, {"kind": "gaussian", "variance": "per_pixel"}]
)
def test_gradients_against_finite_differences(knobs: dict[str, object]) -> None:
    """By the decoder's outputs and by what the likelihood itself learns, edges included."""
    model = likelihood(knobs, channels=3).double()
    params = params_of(model, 3, size=2).double().requires_grad_()
    levels = torch.tensor([0, 1, 90, 128, 200, 254, 255, 3, 0, 255, 77, 10], dtype=torch.uint8)
    images = Levels(8).centers(levels.view(1, 3, 2, 2)).double()
    learned = tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda p, *_: model.log_prob(p, images), (params, *learned))


@pytest.mark.parametrize("knobs", ALL, ids=IDS)
def test_extreme_outputs_leave_values_and_gradients_finite(knobs: dict[str, object]) -> None:
    model = likelihood(knobs, channels=3)
    images = model.prepare(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1), None)
    for scale in (30.0, 1e3):
        params = params_of(model, 3, scale=scale).requires_grad_()
        log_p = model.log_prob(params, images)
        log_p.sum().backward()
        assert torch.isfinite(log_p).all() and torch.isfinite(params.grad).all()


@pytest.mark.parametrize("knobs", ALL, ids=IDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_follow_the_probabilities(knobs: dict[str, object], channels: int) -> None:
    """Relative entropy of many draws: -mean log p of draws is the entropy of p, channel by channel
    for the Gaussian; and the mean of draws is `mean`."""
    model = likelihood(knobs, bits=5, channels=channels)
    params = params_of(model, channels, scale=0.3).expand(-1, -1, 300, 300)
    draws = model.sample(params, torch_generator(0, "draws"))
    levels = ((draws + 1) * 15.5).round()
    torch.testing.assert_close(draws, levels / 15.5 - 1)
    assert levels.min() >= 0 and levels.max() <= 31
    torch.testing.assert_close(
        draws.mean((0, 2, 3)), model.mean(params)[0, :, 0, 0], rtol=0, atol=0.012
    )
    # the share of each first-channel level against its probability
    first = levels[:, 0].flatten().long().bincount(minlength=32) / 90_000
    expected = _first_channel(model, params[:, :, :1, :1], channels)
    torch.testing.assert_close(first, expected, rtol=0, atol=0.006)
    # and the whole colour, by the mean of log p under draws of p: log p <= mean log of any other q
    own = model.log_prob(params, draws) / 90_000
    moved = model.log_prob(params + 0.1, draws) / 90_000
    assert own > moved


def _first_channel(model: Likelihood, params: Tensor, channels: int) -> Tensor:
    """Probabilities of the 32 levels of the first channel."""
    centers = every_level(5)
    if isinstance(model, DiscretizedLogisticMixture):
        alone = likelihood({**MIXTURE}, bits=5, channels=1)
        count = model.num_components
        per = params[:, count:].unflatten(1, (count, -1))
        kept = per[:, :, [0, channels]].flatten(1, 2)  # the first mean, the first log-scale
        few = torch.cat([params[:, :count], kept], 1)
        return alone.log_prob(few.expand(32, -1, -1, -1), centers).exp()
    values = centers.expand(-1, channels, -1, -1)
    with torch.no_grad():
        return model.log_prob_of_values(params, values)[:, 0].flatten().exp()


@pytest.mark.parametrize("knobs", ALL, ids=IDS)
def test_autocast_changes_nothing(knobs: dict[str, object]) -> None:
    model = likelihood(knobs, channels=3)
    params = params_of(model, 3, size=4).to(torch.bfloat16)
    levels = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8, generator=torch_generator(0, "t"))
    images = model.prepare(levels, None)
    exact = model.log_prob(params.float(), images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.log_prob(params, images), exact)
        assert model.mean(params).dtype == torch.float32


@pytest.mark.parametrize("knobs", [*ALL, {"kind": "gaussian"}, {"kind": "bernoulli"}])
def test_only_observed_values_count(knobs: dict[str, object]) -> None:
    channels = 1 if knobs["kind"] == "bernoulli" else 3
    model = likelihood(knobs, channels=channels)
    params = params_of(model, channels, size=4).requires_grad_()
    images = model.sample(params.detach(), torch_generator(0, "draws"))
    mask = (torch.rand(1, 1, 4, 4, generator=torch_generator(0, "mask")) < 0.5).to(torch.uint8)
    holes = torch.where(mask > 0, images, math.nan)
    found = model.log_prob(params, holes, mask)
    expected = (model.log_prob_of_values(params, images) * mask).flatten(1).sum(1)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    missing = params.grad[:, :, mask[0, 0] == 0]
    assert torch.isfinite(params.grad).all() and not missing.any()
    torch.testing.assert_close(
        model.log_prob(params, images, torch.ones(1, 1, 1, 1)), model.log_prob(params, images)
    )


def test_a_mixture_refuses_a_mask_of_single_channels() -> None:
    model = likelihood(MIXTURE, channels=3)
    with pytest.raises(ValueError, match=r"pass a mask \(B, 1, H, W\), not \(1, 3, 2, 2\)"):
        model.log_prob(params_of(model, 3, size=2), torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("knobs", [{**MIXTURE, "min_sigma": 0.01}, GAUSSIANS[3]])
def test_values_at_the_floor_are_counted(knobs: dict[str, object]) -> None:
    model = likelihood(knobs, channels=3)
    params = torch.zeros(1, model.num_params(3), 2, 2)
    assert model.at_floor_fraction(params).item() == 0
    params[:, params.shape[1] // 3 :, 0] = -50.0  # all log-scales of one of two rows, and more
    fraction = model.at_floor_fraction(params).item()
    assert 0.3 < fraction <= 0.5
