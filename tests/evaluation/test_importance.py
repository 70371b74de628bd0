"""log p(x) by importance sampling: against the closed form, and what it may not depend on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.linear_gaussian import LinearGaussian, linear_gaussian
from vae_dist.config.schema import RuntimeConfig
from vae_dist.data.evaluation import EvaluationBatch
from vae_dist.distributed import Runtime
from vae_dist.evaluation.importance import ImportanceMetric, StreamedWeights, importance_evidence
from vae_dist.evaluation.metrics import Inputs
from vae_dist.evaluation.run import EvaluationResult, evaluate

NUM_IMAGES = 13
ENCODER_ERROR = 0.3  # the proposal misses: the ELBO lies 0.15 nats below


def batches(
    toy: LinearGaussian, batch_size: int, *, rank: int = 0, world: int = 1
) -> Iterator[EvaluationBatch]:
    images = toy.images(NUM_IMAGES)
    for low in range(0, NUM_IMAGES, batch_size * world):
        samples = torch.arange(low + rank * batch_size, low + (rank + 1) * batch_size)
        counts = samples < NUM_IMAGES
        yield EvaluationBatch(
            images=images[samples.clamp(max=NUM_IMAGES - 1)],
            labels=torch.full((batch_size,), -1),
            samples=torch.where(counts, samples, -1),
            weights=counts.float(),
            skipped=(),
        )


def run(
    toy: LinearGaussian,
    *,
    num_samples: int,
    batch_size: int = NUM_IMAGES,
    chunk: int = 0,
    priors: dict[str, object] | None = None,
) -> EvaluationResult:
    runtime = Runtime.start(RuntimeConfig(device="cpu", threads=1), precision="no")
    meter = ImportanceMetric(
        toy.model,
        runtime.device,
        num_samples=num_samples,
        seed=5,
        chunk=chunk,
        priors=priors,  # type: ignore[arg-type]
    )
    shares = batches(toy, batch_size, rank=runtime.rank, world=runtime.world)
    result = evaluate(toy.model, shares, runtime=runtime, seed=5, metrics=[meter])
    assert result is not None
    return result


def exact_nll(toy: LinearGaussian) -> float:
    x = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None)
    return -float(toy.log_evidence(x).mean())


def test_it_finds_the_evidence_of_a_linear_gaussian_model() -> None:
    toy = linear_gaussian(encoder_error=ENCODER_ERROR)
    figures = run(toy, num_samples=5000).figures()
    error = figures["is_nll_draws_se_nats"]
    assert 1e-4 < error < 0.01
    assert abs(figures["is_nll_nats"] - exact_nll(toy)) < 3 * error
    assert 500 < figures["is_effective_samples"] < 4500
    x = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None)
    spread = float(toy.log_evidence(x).std()) / NUM_IMAGES**0.5
    assert figures["is_nll_se_nats"] == pytest.approx(spread, rel=0.01)


def test_the_exact_posterior_has_weights_without_variance() -> None:
    toy = linear_gaussian()
    figures = run(toy, num_samples=7).figures()
    assert figures["is_nll_nats"] == pytest.approx(exact_nll(toy), abs=1e-4)
    assert figures["is_effective_samples"] == pytest.approx(7, rel=1e-5)


def test_it_lies_between_the_bound_and_the_evidence() -> None:
    toy = linear_gaussian(encoder_error=0.5)
    x = toy.model.likelihood.prepare(toy.images(2000), None)
    inputs = Inputs(toy.images(2000), x, list(range(2000)))
    with torch.inference_mode():
        moments = toy.model.encode(x)
    gaps = []
    for num_samples in (1, 10, 100):
        evidence = importance_evidence(
            toy.model, inputs, *moments, num_samples=num_samples, seed=0, priors={}
        )
        gaps.append(float((toy.log_evidence(x) - evidence.log_evidence[0]).mean()))
    assert gaps[0] == pytest.approx(toy.elbo_gap_nats, abs=0.1)  # one draw: the ELBO
    assert gaps[0] > gaps[1] > gaps[2] > 0


@pytest.mark.parametrize("num_samples", [3, 130])
def test_batch_and_chunk_do_not_matter(num_samples: int) -> None:
    toy = linear_gaussian(encoder_error=ENCODER_ERROR)
    whole = run(toy, num_samples=num_samples).figures()
    for batch_size, chunk in ((4, 1), (5, 7), (13, 50), (1, 120), (13, 10_000)):
        other = run(toy, num_samples=num_samples, batch_size=batch_size, chunk=chunk).figures()
        assert other == pytest.approx(whole, rel=1e-5), (batch_size, chunk)


def test_the_first_draws_are_the_same_for_any_number() -> None:
    toy = linear_gaussian(encoder_error=ENCODER_ERROR)
    decoded: list[Tensor] = []
    toy.model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    latents = []
    for num_samples in (60, 73):
        decoded.clear()
        run(toy, num_samples=num_samples, chunk=9)
        latents.append(torch.cat(decoded[1:])[:60])  # of the first image; [0] is the ELBO's
    assert torch.equal(*latents)


def test_the_encoder_runs_once_and_the_decoder_in_chunks() -> None:
    toy = linear_gaussian(encoder_error=ENCODER_ERROR)
    encoded: list[int] = []
    decoded: list[int] = []
    toy.model.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    toy.model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    run(toy, num_samples=120, batch_size=5, chunk=70)
    assert encoded == [5, 5, 3]
    assert max(decoded) <= 70
    assert sum(decoded) == NUM_IMAGES * 121  # one for the ELBO


class Shifted:
    """N(1, 1) in each latent."""

    def log_prob(self, z: Tensor) -> Tensor:
        normal = torch.distributions.Normal(torch.ones_like(z).double(), 1.0)
        return normal.log_prob(z.double()).flatten(1).sum(1)


def test_another_prior_is_estimated_from_the_same_decodings() -> None:
    toy = linear_gaussian(encoder_error=1.0)  # wide enough to cover both posteriors
    figures = run(toy, num_samples=5000, priors={"shifted": Shifted()}).figures()
    # x ~ N(W 1 + b, W W' + s^2): the same as shifting the bias
    x = toy.model.likelihood.prepare(toy.images(NUM_IMAGES), None).double().flatten(1)
    exact = -float(toy.marginal.log_prob(x - toy.weight.sum(1)).mean())
    error = figures["is_nll_shifted_draws_se_nats"]
    assert abs(figures["is_nll_shifted_nats"] - exact) < 3 * error
    assert error < 0.1
    assert figures["is_nll_nats"] == pytest.approx(exact_nll(toy), abs=0.05)


def test_missing_pixels_are_integrated_out() -> None:
    """The evidence of what is observed is that of the marginal, in closed form."""
    toy = linear_gaussian(encoder_error=1.0)
    stored = toy.images(NUM_IMAGES)
    mask = torch.ones_like(stored)
    mask[:, :, 0, 1:3] = 0
    x = toy.model.likelihood.prepare(stored, None)
    with torch.inference_mode():  # the encoder of whole images: a proposal as good as any
        moments = toy.model.encode(x)
    evidence = importance_evidence(
        toy.model,
        Inputs(stored, torch.where(mask > 0, x, torch.nan), list(range(NUM_IMAGES)), mask=mask),
        *moments,
        num_samples=5000,
        seed=0,
        priors={},
    )
    kept = mask[0].flatten() > 0
    full = toy.marginal
    observed = torch.distributions.MultivariateNormal(
        full.mean[kept], full.covariance_matrix[kept][:, kept]
    )
    gap = evidence.log_evidence[0] - observed.log_prob(x.double().flatten(1)[:, kept])
    variance = 1 / evidence.effective_samples[0] - 1 / 5000
    assert evidence.effective_samples.mean() > 300
    assert abs(float(gap.mean())) < 3 * float(variance.sum()) ** 0.5 / NUM_IMAGES


@pytest.mark.parametrize("offset", [0.0, -1e5, 1e5])
def test_parts_sum_up_to_the_whole_and_survive_extremes(offset: float) -> None:
    log_weights = 300 * torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).double()
    log_weights += offset
    log_weights[0, 0] -= 1e5
    log_weights[1, 2, :9] = -torch.inf  # whole parts without weight, first ones and others
    log_weights[0, 1, 12:18] = -torch.inf
    streamed = StreamedWeights(2, 3, device=torch.device("cpu"))
    total = torch.zeros(2, 3, dtype=torch.float64)
    for part in log_weights.split(3, dim=-1):
        weights, shrink = streamed.add(part)
        total = total * shrink + weights.sum(-1)
    torch.testing.assert_close(streamed.log_sum, log_weights.logsumexp(-1))
    torch.testing.assert_close(streamed.sum, total)
    weights = log_weights.softmax(-1)
    torch.testing.assert_close(streamed.effective_samples, 1 / weights.square().sum(-1))
