"""The ladder: one group is the flat VAE, known evidence, log ratios, any size, draws, labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from tests.models.test_vae import away_from_zero, inputs
from vae_dist.config.schema import (
    DataConfig,
    LikelihoodConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from vae_dist.evaluation.importance import ImportanceMetric, weighted_draws
from vae_dist.evaluation.metrics import EvaluatedBatch, Inputs
from vae_dist.models.build import build_vae
from vae_dist.models.ladder import Found, LadderVAE, draw
from vae_dist.models.latent import kl_to_standard_normal, log_ratio_to_prior, sample_posterior
from vae_dist.models.likelihoods import build_likelihood
from vae_dist.objectives.elbo import loss_terms
from vae_dist.randomness import torch_generator
from vae_dist.tracking.images import to_uint8

SIZE = (20, 28)
SMALL = {
    **{"arch": "ladder", "channels": [8, 12], "groups": [2, 1], "factors": 2, "patch": 2},
    **{"blocks": 1, "norm_groups": 4, "latent_channels": 3},
}


def fresh(size, mask="none", **model):
    config = TrainConfig(config="test", data=DataConfig(channels=3, mask=mask))
    config.model = ModelConfig(**{**SMALL, **model})
    found = build_vae(config, size)
    assert isinstance(found, LadderVAE)
    return found.eval()


def ladder(size=SIZE, **model):
    """Of random weights, away from where training starts."""
    found = fresh(size, **model)
    away_from_zero(found)
    return found


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch_generator(seed, "noise"))


def test_one_group_of_a_fresh_ladder_is_the_flat_vae():
    """Its prior is N(0, I) before training: rate, draws and log ratios are the flat ones."""
    model = fresh((8, 12), channels=[8], groups=[1])
    images, e = inputs(model, 3, 3, (8, 12))
    output = model(images, e)
    flat = output.mean, output.log_variance
    torch.testing.assert_close(output.z, sample_posterior(*flat, e))
    torch.testing.assert_close(output.kl, kl_to_standard_normal(*flat), rtol=1e-4, atol=1e-4)
    ratio = log_ratio_to_prior(output.z.unsqueeze(1), *flat)[:, 0]
    torch.testing.assert_close(output.log_ratio, ratio, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.from_prior(e, (8, 12)), e)
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_a_ladder_of_one_level_is_none_the_less_one():
    """Its prior is learned and its second group depends on the first."""
    model = ladder(channels=[8], groups=[2])
    images, e = inputs(model, 2, 3, SIZE)
    output, stored = model(images, e), (127.5 * (images + 1)).round().clamp(0, 255).byte()
    _, found = weighted_draws(model, images, e.unsqueeze(1), output.mean, output.log_variance)
    expected = (output.log_likelihood - output.log_ratio).double()
    torch.testing.assert_close(found[0, :, 0], expected)
    # reconstructions of an evaluation are those of `reconstruct`: on the path of the means
    _, shown = EvaluatedBatch(model, Inputs(stored, images, [0, 1]), e, output).pictures
    means = model.likelihood.mean(model(images, torch.zeros_like(e)).params)
    torch.testing.assert_close(shown, to_uint8(means).float() / 255)


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("size", [SIZE, (33, 47)])
def test_any_size(size, aggregate):
    model = ladder(aggregate=aggregate)
    images, e = inputs(model, 2, 3, size)
    output, shape = model(images, e), model.latent_shape(*size)
    assert output.params.shape == (2, model.likelihood.num_params, *size)
    assert output.kl.shape == (2, 3) and output.z.shape == (2, *shape)
    # what was drawn is decoded to the same
    torch.testing.assert_close(model.decode(output.z, size), output.params)
    draws = noise(2, 3, *shape)
    several, one = model(images, draws), model(images, draws[:, 1])
    for field in ("log_likelihood", "log_ratio", "z", "params"):
        torch.testing.assert_close(getattr(several, field)[:, 1], getattr(one, field))
    torch.testing.assert_close(model(images, torch.zeros_like(e)).z, model.encode(images)[0])
    (output.kl.sum() - output.log_likelihood.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_temperature_0_is_one_picture_and_each_level_has_its_own():
    model = ladder()
    shape, top = model.latent_shape(*SIZE), model._sizes(SIZE)[0]

    def drawn(seed, temperature):
        return model.from_prior(noise(2, *shape, seed=seed), SIZE, temperature=temperature)

    torch.testing.assert_close(drawn(0, 0), drawn(1, 0))
    first, other = drawn(0, [0, 1.0]), drawn(1, [0, 1.0])
    assert torch.equal(first[..., :top], other[..., :top])
    assert not torch.isclose(first[..., top:], other[..., top:]).any(-1).all()
    # the top level alone: the rest at the means of their priors
    z = drawn(0, [1.0, 0])
    changed = z + torch.cat([torch.zeros(2, 1, top), torch.ones(2, 1, shape[1] - top)], 2)
    torch.testing.assert_close(model.decode(changed, SIZE, levels=1), model.decode(z, SIZE))


def test_labels_and_masks_reach_all_that_depends_on_them():
    model = ladder(num_classes=3, mask="half")
    images, e = inputs(model, 2, 3, SIZE)
    mask = torch.ones(2, 1, *SIZE, dtype=torch.uint8)
    mask[:, :, :10] = 0
    output, other = (model(images, e, torch.tensor([y, -1]), mask) for y in (0, 1))
    broken = torch.where(mask > 0, images, float("nan"))
    assert torch.equal(model(broken, e, torch.tensor([0, -1]), mask).params, output.params)
    drawn = [model.from_prior(e, SIZE, torch.tensor([y, 1])) for y in (0, 2)]
    for one, two in ((output.mean, other.mean), drawn):
        assert not torch.allclose(one[0], two[0])
        torch.testing.assert_close(one[1], two[1])


@pytest.mark.parametrize("options", [{}, {"aggregate": True}, {"num_classes": 3}])
def test_each_tower_is_one_graph(options):
    model = ladder(**options)
    images, e = inputs(model, 2, 3, SIZE)
    expected = model(images, e)
    for tower in (model.encoder, model.decoder):
        tower.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(images, e).params, expected.params)


# two levels of one latent each whose evidence is known

SIGMA, SPREAD, SLOPE, DIMS = 0.2, 0.5, 0.8, (2, 3)


class NoTaps(nn.Module):
    """The image itself."""

    def forward(self, images):
        return [images.flatten(1)]


class LinearLadder(nn.Module):
    """z1 ~ N(0, 1), z2 | z1 ~ N(SLOPE z1, SPREAD^2), x | z ~ N(w1 z1 + w2 z2, SIGMA^2 I); the
    posterior is the exact one of z1 and of z2 given z1, but `error` standard deviations off."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        weight = torch.randn(6, 2, generator=torch_generator(0, "linear"), dtype=torch.float64)
        self.weight = nn.Parameter(0.3 * weight)
        self.levels = nn.ModuleList([nn.Identity(), nn.Identity()])
        between = torch.tensor([[1.0, SLOPE], [SLOPE, SLOPE**2 + SPREAD**2]])
        self.prior_covariance = between.double()

    def sizes(self, rows, columns):
        return [1, 1]

    def forward(self, value, top_size, taps=None, condition=None, num_given=0):
        x = taps[0].double()
        precision = self.prior_covariance.inverse() + self.weight.T @ self.weight / SIGMA**2
        covariance = precision.inverse()
        means = x @ self.weight @ covariance / SIGMA**2  # (B, 2)
        mean, mean2 = means.split(1, 1)
        spread = covariance[0, 0].sqrt().expand(len(x), 1)
        spread2 = (1 / precision[1, 1]).sqrt().expand(len(x), 1)
        zero, (e, e2) = torch.zeros_like(spread), value.double().split(1, 1)
        first = draw(e, (zero, zero + 1), (mean + self.error * spread, spread))
        mean2 = mean2 + covariance[1, 0] / covariance[0, 0] * (first.z - mean)
        prior2 = SLOPE * first.z, zero + SPREAD
        second = draw(e2, prior2, (mean2 - self.error * spread2, spread2))
        found = Found.of([first, second])
        return (found.z @ self.weight.T).float().unflatten(1, (1, *DIMS)), found


@pytest.mark.parametrize("error", [0.0, 0.6])
def test_importance_estimates_rise_to_the_known_evidence(error):
    knobs = LikelihoodConfig(kind="gaussian", variance="fixed", sigma=SIGMA)
    likelihood = build_likelihood(knobs, DataConfig(channels=1, dequantize=False))
    sizes = {"latent_channels": 1, "stride": 1, "image_size": None, "shortcuts": True}
    decoder = LinearLadder(error)
    model = LadderVAE(NoTaps(), decoder, likelihood, **sizes)
    x = 0.5 * noise(40, 1, *DIMS)
    covariance = decoder.weight @ decoder.prior_covariance @ decoder.weight.T
    zero = torch.zeros(6, dtype=torch.float64)
    marginal = MultivariateNormal(zero, covariance + SIGMA**2 * torch.eye(6))
    expected = marginal.log_prob(x.double().flatten(1)).mean().item()
    shown = Inputs((127.5 * (x + 1)).round().clamp(0, 255).byte(), x, list(range(40)))
    with torch.no_grad():
        output = model(x, noise(40, 1, 2))
        bounds = []
        for count in (1, 20, 2000):
            metric = ImportanceMetric(model, torch.device("cpu"), num_samples=count, seed=0)
            found, _ = metric.evidence(shown, output.mean, output.log_variance)
            bounds.append(found[0].mean().item())
    if not error:  # each weight is the evidence
        assert bounds == pytest.approx([expected] * 3, abs=1e-3)
        return
    gap = error**2  # KL(q || p(z|x)): half a square of `error` for each latent
    elbo = (output.log_likelihood - output.kl.sum(1)).mean().item()
    assert elbo == pytest.approx(expected - gap, abs=0.5)
    assert bounds[0] < bounds[1] < expected and bounds[2] == pytest.approx(expected, abs=0.02)
    # training's bound is that of the same weights
    several = model(x, noise(40, 50, 1, 2))
    config = ObjectiveConfig(importance_samples=50)
    bound = -loss_terms(several, config, beta=1.0).neg_bound_sum.item() / 40
    assert expected - 0.5 * gap < bound < expected + 0.05
