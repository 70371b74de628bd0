"""log p(x) by importance sampling: against the closed form, and what it may not depend on."""

from functools import partial

import pytest
import torch

from tests.support.evaluated import CPU, NUM_IMAGES, result_of
from tests.support.linear_gaussian import IMAGE_SIZE, linear_gaussian
from vae_dist.data.loader import EvaluationBatch
from vae_dist.evaluation.importance import ImportanceMetric, StreamedWeights
from vae_dist.inference.mixture import GaussianMixture


def figures(toy, num_samples, *, batch_size=NUM_IMAGES, masks=None, **more):
    metric = ImportanceMetric(toy.model, CPU, num_samples=num_samples, seed=5, **more)
    options = {"images": toy.images(NUM_IMAGES), "batch_size": batch_size, "seed": 5}
    hidden = partial(EvaluationBatch._replace, masks=masks)
    return result_of(toy.model, metric, change=hidden, **options).figures


def exact_nll(toy):
    return -float(toy.log_evidence(toy.prepared(NUM_IMAGES)).mean())


def test_it_finds_the_evidence_of_a_linear_gaussian_model():
    toy = linear_gaussian(encoder_error=0.3)  # the ELBO lies 0.15 nats below
    found = figures(toy, 5000)
    error = found["is_nll_draws_se_nats"]
    assert 1e-4 < error < 0.01
    assert abs(found["is_nll_nats"] - exact_nll(toy)) < 3 * error
    assert 500 < found["is_effective_samples"] < 4500
    spread = float(toy.log_evidence(toy.prepared(NUM_IMAGES)).std()) / NUM_IMAGES**0.5
    assert found["is_nll_se_nats"] == pytest.approx(spread, rel=0.01)
    one = figures(toy, 1)["is_nll_nats"]  # the ELBO, of one draw
    assert one == pytest.approx(exact_nll(toy) + toy.elbo_gap_nats, abs=0.8)
    found = figures(linear_gaussian(), 7)  # the exact posterior: weights without variance
    assert found["is_nll_nats"] == pytest.approx(exact_nll(linear_gaussian()), abs=1e-4)
    assert found["is_effective_samples"] == pytest.approx(7, rel=1e-5)


@pytest.mark.parametrize("num_samples", [3, 130])
def test_batch_and_chunk_do_not_matter(num_samples):
    toy = linear_gaussian(encoder_error=0.3)
    whole = figures(toy, num_samples)
    for batch_size, chunk in ((4, 1), (5, 7), (13, 50), (1, 120), (13, 10_000)):
        other = figures(toy, num_samples, batch_size=batch_size, chunk=chunk)
        assert other == pytest.approx(whole, rel=1e-5), (batch_size, chunk)


def test_the_decoder_runs_in_chunks_and_the_first_draws_stay():
    toy, decoded, latents = linear_gaussian(encoder_error=0.3), [], []
    toy.model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    for num_samples in (60, 73):
        decoded.clear()
        figures(toy, num_samples, chunk=9)
        assert max(map(len, decoded[1:])) == 9  # [0] is the ELBO's
        latents.append(torch.cat(decoded[1:])[:60])  # of the first image
    assert torch.equal(*latents)


def test_another_prior_is_estimated_from_the_same_decodings():
    toy = linear_gaussian(encoder_error=1.0)  # wide enough to cover both posteriors
    one = torch.ones(1, 3, dtype=torch.float64)
    shifted = GaussianMixture(torch.zeros(1, dtype=torch.float64), one, one)  # N(1, 1)
    found = figures(toy, 5000, priors={"shifted": shifted})
    # x ~ N(W 1 + b, W W' + s^2): the same as shifting the bias
    x = toy.prepared(NUM_IMAGES).double().flatten(1)
    exact = -float(toy.marginal.log_prob(x - toy.weight.sum(1)).mean())
    error = found["is_nll_shifted_draws_se_nats"]
    assert abs(found["is_nll_shifted_nats"] - exact) < 3 * error < 0.3


def test_missing_pixels_are_integrated_out():
    """The evidence of what is observed is that of the marginal, in closed form."""
    toy = linear_gaussian(encoder_error=1.0)
    mask = torch.ones(NUM_IMAGES, 1, *IMAGE_SIZE, dtype=torch.uint8)
    mask[:, :, 0, 1:3] = 0
    found = figures(toy, 5000, masks=mask)
    kept, full = mask[0].flatten() > 0, toy.marginal
    covariance = full.covariance_matrix[kept][:, kept]
    observed = torch.distributions.MultivariateNormal(full.mean[kept], covariance)
    exact = -float(observed.log_prob(toy.prepared(NUM_IMAGES).double().flatten(1)[:, kept]).mean())
    assert abs(found["is_nll_nats"] - exact) < 3 * found["is_nll_draws_se_nats"] < 0.3
    assert found["is_effective_samples"] > 300


def test_parts_sum_up_to_the_whole_and_survive_extremes():
    log_weights = 300 * torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).double()
    log_weights[0, 0] -= 1e5
    log_weights[1, 1] += 1e5
    log_weights[1, 2, :9] = -torch.inf  # whole parts without weight, first ones and others
    log_weights[0, 1, 12:18] = -torch.inf
    streamed = StreamedWeights(2, 3, device=CPU)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for part in log_weights.split(3, dim=-1):
        weights, shrink = streamed.add(part)
        total = total * shrink + weights.sum(-1)
    torch.testing.assert_close(streamed.log_sum, log_weights.logsumexp(-1))
    torch.testing.assert_close(streamed.sum, total)
    weights = log_weights.softmax(-1)
    torch.testing.assert_close(streamed.effective_samples, 1 / weights.square().sum(-1))
