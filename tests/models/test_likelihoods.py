"""Likelihoods against torch.distributions, their limits, and the change to 8-bit levels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from vae_dist.config.schema import DataConfig, LikelihoodConfig
from vae_dist.models.likelihoods import Gaussian, Likelihood, bits_per_dim, build_likelihood
from vae_dist.models.likelihoods.bernoulli import uniform_of_content

BATCH, CHANNELS, HEIGHT, WIDTH = 4, 3, 5, 7


def likelihood(dequantize: bool = True, **knobs: object) -> Likelihood:
    return build_likelihood(LikelihoodConfig(**knobs), DataConfig(dequantize=dequantize))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """uint8 images and uniform noise of their shape."""
    shape = (BATCH, channels, HEIGHT, WIDTH)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())
    return images, torch.rand(shape, generator=generator(1))


def random_params(model: Likelihood, channels: int = CHANNELS) -> Tensor:
    shape = (BATCH, model.num_params(channels), HEIGHT, WIDTH)
    return torch.randn(shape, generator=generator(2))


def test_bernoulli_is_that_of_torch_distributions() -> None:
    model = likelihood(kind="bernoulli")
    images = model.prepare(*random_images(1))
    logits = random_params(model, 1)
    expected = TorchBernoulli(logits=logits.double()).log_prob((images.double() + 1) / 2)
    log_prob = model.log_prob(logits, images)
    assert log_prob.shape == (BATCH,) and log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.mean(logits), 2 * torch.sigmoid(logits) - 1)
    assert torch.isfinite(model.log_prob(1e4 * logits, images)).all()


@pytest.mark.parametrize("variance", ["fixed", "shared", "per_channel", "per_pixel"])
def test_gaussian_is_that_of_torch_distributions(variance: str) -> None:
    model = likelihood(kind="gaussian", variance=variance, sigma=0.2, min_sigma=0.05)
    images = model.prepare(*random_images())
    params = random_params(model)
    if variance == "fixed":
        sigma = torch.tensor(0.2, dtype=torch.float64)
    elif variance == "shared":
        with torch.no_grad():
            model.moments.raw_log_variance.fill_(-0.1)
        sigma = torch.tensor(0.05**2 + 0.25 * math.exp(-1.0), dtype=torch.float64).sqrt()
    elif variance == "per_channel":
        with torch.no_grad():
            model.moments.raw_log_variance.copy_(torch.tensor([-0.1, 0.0, 0.05]))
        raw = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
        sigma = (0.05**2 + 0.25 * raw.exp()).sqrt().view(3, 1, 1)
    else:
        sigma = (0.05**2 + 0.25 * params[:, CHANNELS:].double().exp()).sqrt()
    mean = params[:, :CHANNELS]
    expected = Normal(mean.double(), sigma).log_prob(images.double()).flatten(1).sum(1)
    log_prob = model.log_prob(params, images)
    assert log_prob.shape == (BATCH,) and log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(model.mean(params), mean.clamp(-1, 1))


@pytest.mark.parametrize(
    ("knobs", "num_params"),
    [
        ({"kind": "bernoulli"}, 3),
        ({"kind": "gaussian", "variance": "fixed"}, 3),
        ({"kind": "gaussian", "variance": "shared"}, 3),
        ({"kind": "gaussian", "variance": "per_channel"}, 3),
        ({"kind": "gaussian", "variance": "per_pixel"}, 6),
        ({"kind": "discretized_gaussian", "variance": "per_pixel"}, 6),
        ({"kind": "discretized_logistic_mixture", "mixtures": 10}, 100),  # as PixelCNN++
    ],
)
def test_number_of_decoder_channels(knobs: dict[str, str], num_params: int) -> None:
    assert likelihood(**knobs).num_params(3) == num_params


@pytest.mark.parametrize("variance", ["shared", "per_pixel"])
def test_the_floor_of_the_variance_is_smooth_and_counted(variance: str) -> None:
    model = likelihood(kind="gaussian", variance=variance, min_sigma=1 / 256)
    params = torch.zeros(BATCH, model.num_params(CHANNELS), HEIGHT, WIDTH)
    if variance == "shared":
        with torch.no_grad():
            model.moments.raw_log_variance.fill_(-100.0)
        expected = 1.0
    else:
        params[:, CHANNELS:, :, 0] = -1000.0
        expected = 1 / WIDTH
    params.requires_grad_()
    log_variance = model.moments(params)[1]
    assert log_variance.min().item() == pytest.approx(2 * math.log(1 / 256), abs=1e-5)
    fraction = model.at_floor_fraction(params)
    assert fraction.shape == (BATCH,)
    torch.testing.assert_close(fraction, torch.full((BATCH,), expected))
    loss = model.log_prob(params, torch.ones(BATCH, CHANNELS, HEIGHT, WIDTH)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(params.grad).all()


def test_fixed_variance_and_bernoulli_have_no_floor() -> None:
    for model in (likelihood(kind="bernoulli"), likelihood(kind="gaussian", variance="fixed")):
        assert model.at_floor_fraction(random_params(model)) is None


def test_binarisation_keeps_the_grey_levels_as_probabilities() -> None:
    model = likelihood(kind="bernoulli")
    levels = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    images = levels.expand(4, 1, 200, 200)
    binary = model.prepare(images, torch.rand(images.shape, generator=generator()))
    assert set(binary.unique().tolist()) == {-1.0, 1.0}
    share = (binary > 0).double().mean((1, 2, 3))
    assert share[0] == 0 and share[3] == 1
    assert share[1].item() == pytest.approx(0.2, abs=0.01)
    assert share[2].item() == pytest.approx(0.8, abs=0.01)


def test_dequantised_levels_tile_the_range() -> None:
    model = likelihood(kind="gaussian")
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    low = model.prepare(levels, torch.zeros(levels.shape))
    high = model.prepare(levels, torch.ones(levels.shape))
    assert low.min() == -1 and high.max() == 1
    assert torch.equal(low.flatten()[1:], high.flatten()[:-1])


def test_without_dequantisation_black_is_minus_one_and_white_one() -> None:
    model = likelihood(dequantize=False, kind="gaussian")
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert not model.needs_uniform
    assert model.prepare(images, None).flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_missing_noise_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="uniform"):
        likelihood(kind=kind).prepare(random_images()[0], None)


def test_a_uniform_density_has_eight_bits_per_dim() -> None:
    model = likelihood(kind="gaussian")
    num_dims = 3 * 64 * 64
    nll_of_uniform_density = num_dims * math.log(2.0)  # density 1/2 on [-1, 1)
    nats = model.discrete_nll_nats(nll_of_uniform_density, num_dims)
    assert bits_per_dim(nats, num_dims=num_dims) == pytest.approx(8.0, abs=1e-12)


@pytest.mark.parametrize(("dequantize", "levels_per_unit"), [(True, 128.0), (False, 127.5)])
def test_level_nats_are_those_of_a_density_per_level(
    dequantize: bool, levels_per_unit: float
) -> None:
    """The same normal density, written over levels instead of over [-1, 1]."""
    model = likelihood(dequantize, kind="gaussian", variance="fixed", sigma=0.1)
    params, image = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.05)
    nats = model.discrete_nll_nats(-model.log_prob(params, image).item(), 1)
    over_levels = Normal(0.0, 0.1 * levels_per_unit)
    expected = -over_levels.log_prob(torch.tensor(0.05 * levels_per_unit)).item()
    assert nats == pytest.approx(expected, abs=1e-5)


def test_a_uniform_bernoulli_has_one_bit_per_dim() -> None:
    model = likelihood(kind="bernoulli")
    nll = -model.log_prob(torch.zeros(1, 1, 28, 28), torch.ones(1, 1, 28, 28)).item()
    nats = model.discrete_nll_nats(nll, 784)
    assert bits_per_dim(nats, num_dims=784) == pytest.approx(1.0, abs=1e-6)


def test_draws_have_the_moments_of_the_likelihood() -> None:
    bernoulli = likelihood(kind="bernoulli")
    logits = torch.full((1, 1, 300, 300), math.log(3.0))
    draws = bernoulli.sample(logits, generator())
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(draws, bernoulli.sample(logits, generator()))

    gaussian = likelihood(kind="gaussian", variance="fixed", sigma=0.1)
    assert isinstance(gaussian, Gaussian)
    draws = gaussian.sample(torch.full((1, 1, 300, 300), 0.25), generator())
    assert draws.mean().item() == pytest.approx(0.25, abs=2e-3)
    assert draws.std().item() == pytest.approx(0.1, abs=2e-3)


# ---- bits and binarisations ----


def test_five_bits_drop_three() -> None:
    data = DataConfig(bits=5, dequantize=False)
    model = build_likelihood(LikelihoodConfig(), data)
    stored = torch.tensor([0, 7, 8, 130, 248, 255], dtype=torch.uint8).view(1, 1, 1, 6)
    found = model.prepare(stored, None).flatten()
    torch.testing.assert_close(found, torch.tensor([0, 0, 1, 16, 31, 31]) / 15.5 - 1)


def test_sixteen_bits_and_floats_keep_theirs() -> None:
    sixteen = build_likelihood(LikelihoodConfig(), DataConfig(bits=16, dequantize=False))
    stored = torch.tensor([0, 1, 65535], dtype=torch.uint16).view(1, 1, 1, 3)
    found = sixteen.prepare(stored, None).flatten().double()
    torch.testing.assert_close(
        found, torch.tensor([-1.0, 2 / 65535 - 1, 1.0]).double(), rtol=0, atol=6e-8
    )
    floats = build_likelihood(LikelihoodConfig(), DataConfig(bits=32))
    values = torch.tensor([-1.0, 0.3, 0.9]).view(1, 1, 1, 3)
    assert not floats.needs_uniform and torch.equal(floats.prepare(values, None), values)


def test_what_has_no_levels_has_no_bits() -> None:
    floats = build_likelihood(LikelihoodConfig(), DataConfig(bits=32))
    soft = likelihood(kind="bernoulli", binarization="soft")
    for model in (floats, soft):
        assert not model.has_levels and model.bits_per_dim(3.0, 4) is None
        with pytest.raises(ValueError, match="no bits/dim"):
            model.discrete_nll_nats(3.0, 4)
    assert likelihood(kind="bernoulli").bits_per_dim(math.log(16), 4) == pytest.approx(1.0)
    # nor has an image whose pixels are all missing
    assert likelihood(kind="bernoulli").bits_per_dim(0.0, 0) is None


def test_static_binarisation_is_one_draw_of_each_image() -> None:
    model = likelihood(kind="bernoulli", binarization="static")
    assert not model.needs_uniform
    images = random_images(1)[0].repeat(1, 1, 8, 8)
    images = torch.cat([images, images[:1] // 2])
    whole = model.prepare(images, None)
    assert torch.equal(model.prepare(images[2:3], None), whole[2:3])  # in any batch
    share = (whole > 0).double().mean().item()
    assert share == pytest.approx((images.double() / 255).mean().item(), abs=0.02)
    # images of one grey differ from pixel to pixel, and from each other
    flat = torch.full((2, 1, 64, 64), 128, dtype=torch.uint8)
    flat[1, 0, 0, 0] = 127
    first, second = model.prepare(flat, None) > 0
    assert first.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_noise_of_content_is_uniform() -> None:
    images = random_images(1)[0].repeat(1, 1, 20, 20)
    noise = uniform_of_content(images).double().flatten()
    assert noise.min() >= 0 and noise.max() < 1
    shares = torch.histc(noise, 20, 0, 1) / len(noise)
    # multinomial: five standard deviations of a share
    assert (shares - 0.05).abs().max().item() < 5 * (0.05 * 0.95 / len(noise)) ** 0.5
    pairs = noise.view(4, -1)
    assert torch.corrcoef(pairs).fill_diagonal_(0).abs().max() < 0.05
    shifted = torch.corrcoef(torch.stack([pairs[0, :-1], pairs[0, 1:]]))[0, 1]
    assert shifted.abs() < 0.05


def test_threshold_and_soft_targets_are_deterministic() -> None:
    stored = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    threshold = likelihood(kind="bernoulli", binarization="threshold")
    assert threshold.prepare(stored, None).flatten().tolist() == [-1, -1, 1, 1]
    soft = likelihood(kind="bernoulli", binarization="soft")
    images = soft.prepare(stored, None)
    logits = random_params(soft, 1)[:1, :, :1, :4]
    targets = stored.double() / 255
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(
        logits.double(), targets, reduction="sum"
    )
    assert soft.log_prob(logits, images).item() == pytest.approx(expected.item(), rel=1e-6)
