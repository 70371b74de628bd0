"""The ladder: one group is the flat VAE, what a group costs, levels of draws, the evaluation."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.models.test_vae import inputs, small, trained
from vae_dist.config.schema import ObjectiveConfig
from vae_dist.evaluation.importance import weighted_draws
from vae_dist.evaluation.metrics import EvaluatedBatch, Inputs
from vae_dist.models.build import build_vae
from vae_dist.models.ladder import draw
from vae_dist.models.latent import kl_to_standard_normal, log_ratio_to_prior, sample_posterior
from vae_dist.objectives.elbo import log_mean_exp, loss_terms
from vae_dist.tracking.images import to_uint8

SIZE = (20, 28)


def test_one_group_of_a_fresh_ladder_is_the_flat_vae():
    """Its prior is N(0, I) before training: rate, draws and log ratios are the flat ones."""
    model = build_vae(small("ladder", channels=[8], groups=[1]), (8, 12))
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


def test_a_group_costs_what_torch_distributions_say():
    """KL and log ratio of a draw, whatever prior and posterior; and of a z that is given."""
    value, *sizes = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)
    p, q = Normal(sizes[0], sizes[1].exp()), Normal(sizes[2], (0.5 * sizes[3]).exp())
    for is_latent in (False, True):
        z = value if is_latent else q.mean + q.stddev * value
        found = draw(value, (p.mean, p.stddev), (q.mean, q.stddev), is_latent=is_latent)
        torch.testing.assert_close(found.z, z.flatten(1))
        torch.testing.assert_close(found.log_variance, q.variance.log().flatten(1))
        parts = kl_divergence(q, p), q.log_prob(z) - p.log_prob(z)
        for part, expected in zip((found.kl, found.log_ratio), parts, strict=True):
            torch.testing.assert_close(part[:, 0], expected.flatten(1).sum(1))


def test_a_ladder_of_one_level_is_none_the_less_one():
    """Its prior is learned and its second group depends on the first."""
    model = trained(small("ladder", channels=[8], groups=[2]), SIZE)
    images, e = inputs(model, 2, 3, SIZE)
    output, stored = model(images, e), (127.5 * (images + 1)).round().clamp(0, 255).byte()
    _, found = weighted_draws(model, images, e.unsqueeze(1), output.mean, output.log_variance)
    expected = (output.log_likelihood - output.log_ratio).double()
    torch.testing.assert_close(found[0, :, 0], expected)
    several = model(images, torch.randn(2, 3, *model.latent_shape(*SIZE)))
    terms = loss_terms(several, ObjectiveConfig(importance_samples=3), beta=1.0)
    bound = log_mean_exp(several.log_likelihood - several.log_ratio).sum()
    torch.testing.assert_close(-terms.neg_bound_sum, bound)
    # reconstructions of an evaluation are those of `reconstruct`: on the path of the means
    _, shown = EvaluatedBatch(model, Inputs(stored, images, [0, 1]), e, output).pictures
    means = model.likelihood.mean(model(images, torch.zeros_like(e)).params)
    torch.testing.assert_close(shown, to_uint8(means).float() / 255)


def test_temperature_0_is_one_picture_and_each_level_has_its_own():
    model = trained(small("ladder", num_classes=3), SIZE)
    top, (_, size) = model._sizes(SIZE)[0], model.latent_shape(*SIZE)
    noise = torch.randn(2, 2, 1, size)

    def drawn(number, temperature):
        return model.from_prior(noise[number], SIZE, temperature=temperature)

    torch.testing.assert_close(drawn(0, 0), drawn(1, 0))
    first, other = drawn(0, [0, 1.0]), drawn(1, [0, 1.0])
    assert torch.equal(first[..., :top], other[..., :top])
    assert not torch.isclose(first[..., top:], other[..., top:]).any(-1).all()
    # the top level alone: the rest at the means of their priors
    z = drawn(0, [1.0, 0])
    changed = z + torch.cat([torch.zeros(2, 1, top), torch.ones(2, 1, size - top)], 2)
    torch.testing.assert_close(model.decode(changed, SIZE, levels=1), model.decode(z, SIZE))
    one, two = (model.from_prior(noise[0], SIZE, torch.tensor([y, 1])) for y in (0, 2))
    assert torch.isclose(one, two).all(-1).flatten().tolist() == [False, True]


@pytest.mark.parametrize("options", [{}, {"aggregate": True}, {"num_classes": 3}])
def test_towers_are_one_graph_and_decode_what_was_drawn(options):
    model, size = trained(small("ladder", **options), SIZE), (33, 47)
    images, e = inputs(model, 2, 3, size)
    expected = model(images, e)
    torch.testing.assert_close(model.decode(expected.z, size), expected.params)
    torch.testing.assert_close(model(images, torch.zeros_like(e)).z, model.encode(images)[0])
    for tower in (model.encoder, model.decoder):
        tower.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(images, e).params, expected.params)
