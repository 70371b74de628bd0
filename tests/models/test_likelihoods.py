"""Likelihoods: closed forms, sums to one, gradients by finite differences, what is stored."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import Levels, build_likelihood
from vae_dist.models.likelihoods.gaussian import log_ndtr, log_probability_of_bin

VARIANCES = ("fixed", "shared", "per_channel", "per_pixel")
GAUSSIANS = [{"kind": "discretized_gaussian", "variance": v} for v in VARIANCES]
MIXTURE = {"kind": "discretized_logistic_mixture", "mixtures": 3}
DISCRETE = [*GAUSSIANS, MIXTURE]
DENSITIES = [{"kind": kind, "variance": v} for kind in ("gaussian", "laplace") for v in VARIANCES]
BINARY, SOFT = {"kind": "bernoulli"}, {"kind": "bernoulli", "binarization": "soft"}


def of_each(*cases):
    return pytest.mark.parametrize("knobs", cases, ids=str)


EVERY = of_each(*DISCRETE, *DENSITIES, BINARY, SOFT)


def likelihood(knobs, *, bits=8, channels=3, **data):
    return build_likelihood(
        LikelihoodConfig(**knobs), DataConfig(bits=bits, channels=channels, **data)
    )


def case(knobs, *, size=2):
    """A likelihood, outputs of a decoder and an image."""
    channels = 1 if knobs["kind"] == "bernoulli" else 3
    model = likelihood(knobs, channels=channels)
    stored = torch.randint(256, (1, channels, size, size), dtype=torch.uint8)
    images = model.prepare(stored, torch.rand(stored.shape))
    return model, torch.randn(1, model.num_params, size, size), images


def every_level(bits):
    """Centers of all levels, (2^bits, 1, 1, 1)."""
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64).float().view(-1, 1, 1, 1)


# closed forms


@of_each(*DENSITIES, BINARY, SOFT)
def test_what_torch_distributions_say(knobs):
    model, params, images = case({**knobs, "sigma": 0.2, "min_sigma": 0.05}, size=5)
    mean, images64 = params[:, :3].double(), images.double()
    if knobs["kind"] == "bernoulli":
        expected = Bernoulli(logits=mean, validate_args=False).log_prob((images64 + 1) / 2)
        torch.testing.assert_close(model.mean(params), 2 * torch.sigmoid(params) - 1)
    else:
        log_variance = params[:, 3:].double()
        for raw in model.parameters():  # that it learns itself
            raw.data = torch.tensor([-0.1, 0.0, 0.05])[: len(raw)]
            log_variance = 10 * raw.double().view(-1, 1, 1)
        deviation = (0.05**2 + 0.25 * log_variance.exp()).sqrt()
        if knobs["variance"] == "fixed":
            deviation = torch.tensor(0.2, dtype=torch.float64)
        oracle = Normal(mean, deviation)
        if knobs["kind"] == "laplace":
            oracle = Laplace(mean, deviation / math.sqrt(2))
        expected = oracle.log_prob(images64)
        torch.testing.assert_close(model.mean(params), mean.float().clamp(-1, 1))
    found = model.log_prob(params, images)
    assert found.shape == (1,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-3)


def test_the_mixture_is_that_of_its_definition():
    """Salimans et al. 2017, equations 1 to 3, written out in float64."""
    model = likelihood({**MIXTURE, "min_sigma": 1e-9})
    params = torch.randn(1, model.num_params, 2, 2, dtype=torch.float64)
    stored = torch.randint(256, (1, 3, 2, 2), dtype=torch.uint8)
    stored[0, 0, 0, 0], stored[0, 2, 1] = 0, 255  # whose bins are open to infinity
    x = Levels(8).centers(stored).double()[0]
    weights, rest = torch.softmax(params[0, :3], 0), params[0, 3:].unflatten(0, (3, 9))
    total = torch.zeros(2, 2, dtype=torch.float64)
    for k, offset in enumerate((-2 / 3, 0.0, 2 / 3)):
        means, scales = rest[k, :3] + offset, 0.25 * rest[k, 3:6].exp()
        alpha, beta, gamma = rest[k, 6:].tanh()
        centers = [means[0], means[1] + alpha * x[0], means[2] + beta * x[0] + gamma * x[1]]
        here = x - torch.stack(centers)
        upper, lower = (torch.sigmoid((here + s / 255) / scales) for s in (1, -1))
        upper, lower = upper.where(x < 1, 1.0), lower.where(x > -1, 0.0)
        total += weights[k] * (upper - lower).prod(0)
    found = model.log_prob(params, x[None]).item()
    assert found == pytest.approx(total.log().sum().item(), rel=1e-6)


@of_each(*DISCRETE)
@pytest.mark.parametrize("bits", [5, 8, 16])
def test_probabilities_of_levels_sum_to_one(knobs, bits):
    floor = {} if knobs.get("variance") == "fixed" else {"min_sigma": 1e-3}
    model, images = likelihood({**knobs, **floor}, bits=bits, channels=1), every_level(bits)
    for scale in (0.3, 3.0):
        params = scale * torch.randn(1, model.num_params, 1, 1)
        if params.shape[1] > 1:  # some scales far below a level, some far above the range
            params[:, params.shape[1] // 2 :] *= 4.0
        log_p = model.log_prob(params.expand(len(images), -1, -1, -1), images)
        # edges of 65,536 bins around centers that float32 rounds
        tolerance = 2e-5 if bits == 16 else 3e-6
        assert log_p.double().exp().sum().item() == pytest.approx(1.0, abs=tolerance)


# every likelihood


@EVERY
def test_gradients_against_finite_differences(knobs):
    """By the decoder's outputs and by what the likelihood itself learns, edges included; and finite
    where outputs are extreme."""
    model, params, images = case(knobs)
    for scale in (30.0, 1e3):
        extreme = (scale * params).requires_grad_()
        log_p = model.log_prob(extreme, images)
        log_p.sum().backward()
        assert torch.isfinite(log_p).all() and torch.isfinite(extreme.grad).all()
    if knobs["kind"] != "bernoulli":
        stored = torch.tensor([0, 1, 90, 128, 200, 254, 255, 3, 0, 255, 77, 10], dtype=torch.uint8)
        images = Levels(8).centers(stored.view(1, 3, 2, 2))
    inputs = params.double().requires_grad_(), *model.double().parameters()
    assert torch.autograd.gradcheck(lambda p, *_: model.log_prob(p, images.double()), inputs)


@EVERY
def test_only_observed_values_count(knobs):
    model, params, _ = case(knobs, size=4)
    images = model.sample(params, torch.default_generator)
    mask = (torch.rand(1, 1, 4, 4) < 0.5).to(torch.uint8)
    broken = torch.where(mask > 0, images, math.nan)
    found = model.log_prob(params.requires_grad_(), broken, mask)
    expected = (model.log_prob_of_values(params, images) * mask).flatten(1).sum(1)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert torch.isfinite(params.grad).all() and not params.grad[:, :, mask[0, 0] == 0].any()


@of_each(*DISCRETE)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_of_levels_follow_the_probabilities(knobs, channels):
    model = likelihood(knobs, bits=5, channels=channels)
    params = 0.3 * torch.randn(1, model.num_params, 1, 1).expand(-1, -1, 300, 300)
    draws = model.sample(params, torch.default_generator)
    levels = ((draws + 1) * 15.5).round()
    torch.testing.assert_close(draws, levels / 15.5 - 1)
    assert levels.min() >= 0 and levels.max() <= 31
    mean = model.mean(params)[0, :, 0, 0]
    torch.testing.assert_close(draws.mean((0, 2, 3)), mean, rtol=0, atol=0.012)
    # of all q, p itself has the largest mean of log q under draws of p
    assert model.log_prob(params, draws) > model.log_prob(params + 0.1, draws)
    if channels == 1:
        shares = levels.flatten().long().bincount(minlength=32) / levels.numel()
        expected = model.log_prob(params[:, :, :1, :1].expand(32, -1, -1, -1), every_level(5)).exp()
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.006)


def test_draws_of_the_others_follow_their_distributions():
    def draws(knobs, value):
        model, params = likelihood(knobs, channels=1), torch.full((1, 1, 300, 300), value)
        return model.sample(params, torch.default_generator).flatten()

    oracles = {"gaussian": Normal(0.25, 0.1), "laplace": Laplace(0.25, 0.1 / math.sqrt(2))}
    for kind, oracle in oracles.items():
        found = draws({"kind": kind, "variance": "fixed", "sigma": 0.1}, 0.25).sort()[0]
        expected = torch.linspace(0, 1, len(found))
        torch.testing.assert_close(oracle.cdf(found), expected, rtol=0, atol=0.01)
    found = draws(BINARY, math.log(3.0))
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01) and (found.abs() == 1).all()


# what is stored


def test_bits_per_dim_of_what_is_known():
    """Equal probabilities have as many bits as the data; so has a density of 1/2 on [-1, 1)."""
    for bits in (5, 8, 16):
        levels, density = likelihood(GAUSSIANS[0], bits=bits), likelihood({}, bits=bits)
        assert levels.bits_per_dim(7 * bits * math.log(2), 7) == pytest.approx(bits)
        assert density.bits_per_dim(7 * math.log(2), 7) == pytest.approx(bits)
        # of centers, the range has one level less
        centers = likelihood({}, bits=bits, dequantize=False).bits_per_dim(0.0, 7)
        assert centers == pytest.approx(math.log2((2**bits - 1) / 2))
    assert likelihood(BINARY).bits_per_dim(0.0, 0) is None  # all pixels are missing
    for none in (likelihood({}, bits=32), likelihood(SOFT)):
        assert not none.has_levels and none.bits_per_dim(3.0, 4) is None


@pytest.mark.parametrize(
    ("bits", "dtype", "values", "centers"),
    [
        (5, torch.uint8, [0, 7, 8, 130, 248, 255], [n / 15.5 - 1 for n in (0, 0, 1, 16, 31, 31)]),
        (8, torch.uint8, [0, 255], [-1, 1]),
        (16, torch.uint16, [0, 1, 65535], [-1, 2 / 65535 - 1, 1]),
        (32, torch.float32, [-1.0, 0.3, 1.0], [-1, 0.3, 1]),
    ],
)
def test_stored_values_are_centers_or_dequantised(bits, dtype, values, centers):
    stored = torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)
    found = likelihood({}, bits=bits, dequantize=False).prepare(stored, None)
    torch.testing.assert_close(found.flatten(), torch.tensor(centers, dtype=torch.float32))
    for kind in ("gaussian", "laplace"):
        model = likelihood({"kind": kind}, bits=bits)
        low, high = (model.prepare(stored, torch.full(stored.shape, u)) for u in (0.0, 1.0))
        assert low.min() == -1 and high.max() == 1
        width = 2 ** (1 - bits) if bits < 32 else 0  # of a level
        torch.testing.assert_close(high - low, torch.full_like(low, width), rtol=0, atol=1e-7)
        # networks that compare pictures see none of it
        torch.testing.assert_close(model.without_noise(stored, low), found)


def test_binarisation_is_a_draw_one_draw_a_threshold_or_soft():
    levels = torch.tensor([0, 51, 127, 128, 204, 255], dtype=torch.uint8).view(6, 1, 1, 1)
    dynamic, static, threshold, soft = (
        likelihood({**BINARY, "binarization": kind}, channels=1)
        for kind in ("dynamic", "static", "threshold", "soft")
    )
    uniform = torch.rand(6, 1, 200, 200)
    for model in (dynamic, static):
        drawn = model.prepare(levels.expand(uniform.shape), uniform)
        share = (drawn > 0).float().mean((1, 2, 3))
        assert share.tolist() == pytest.approx([0, 0.2, 0.498, 0.502, 0.8, 1], abs=0.015)
        assert share[0] == 0 and share[5] == 1
    # the static draw is that of the image, in any batch
    images = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(static.prepare(images[2:3], None), static.prepare(images, None)[2:3])
    first, second = (
        static.prepare(torch.tensor([128, 127]).expand(1, 64, 64, 2).permute(3, 0, 1, 2), None) > 0
    )
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert threshold.prepare(levels, None).flatten().tolist() == [-1, -1, -1, 1, 1, 1]
    torch.testing.assert_close(soft.prepare(levels, None), levels / 127.5 - 1)


# the normal distribution function


@pytest.mark.parametrize("half_width", [1e-5, 1e-3, 0.05, 0.2, 0.25, 0.31, 0.33, 1.0, 4.0, 60.0])
def test_bins_are_differences_of_the_distribution_function(half_width):
    """In float64, of the tail where log Phi has its digits."""
    centers = torch.tensor([0.0, 0.3, 0.99, 1.0, 1.2, 2.0, 5.0, 12.0, 40.0, 300.0, 2e4])
    widths = torch.full_like(centers, half_width)
    high, low = (torch.special.log_ndtr(w - centers.double()) for w in (widths, -widths))
    found = log_probability_of_bin(centers, widths).double()
    expected = high + torch.log(-torch.expm1(low - high))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=3e-6)
    assert torch.equal(log_probability_of_bin(-centers, widths).double(), found)
    if 1e-3 < half_width < 10:
        center64 = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
        width64 = torch.full_like(center64, half_width).requires_grad_()
        assert torch.autograd.gradcheck(log_probability_of_bin, (center64, width64))


def test_log_ndtr_is_that_of_torch_with_a_right_gradient_in_the_tail():
    t = torch.linspace(-30, 10, 4001, dtype=torch.float64)
    torch.testing.assert_close(log_ndtr(t), torch.special.log_ndtr(t), rtol=1e-12, atol=1e-15)
    far = torch.tensor([-1e2, -1e3, -1e4, -1e5], requires_grad=True)
    log_ndtr(far).sum().backward()
    torch.testing.assert_close(far.grad, -far.detach(), rtol=2e-4, atol=0)  # hazard: -t + O(1/t)
