"""The bound against torch.distributions, what it may not depend on, and results.json."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from tests.support.devices import CUDA, runtime_on
from tests.support.distributed import run_ranks
from tests.support.evaluated import (
    CPU,
    IMAGES,
    NUM_IMAGES,
    SIZE,
    TWO_GAUSSIANS,
    all_metrics,
    batch_of,
    batches,
    drawn,
    result_of,
    start,
    tiny_model,
)
from tests.support.tiny_run import random_pixels
from vae_dist.config.errors import ConfigError
from vae_dist.data.loader import EvaluationBatch
from vae_dist.data.reader import SkippedSample
from vae_dist.evaluation import metrics, run
from vae_dist.evaluation.frechet import FrechetMetric, frechet_distance
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.inference.sampling import BatchedVAE
from vae_dist.models.likelihoods.base import Levels
from vae_dist.tracking.images import to_uint8
from vae_dist.training.compile import use_tensor_float_32


def measured(kind, batch_size):
    model = tiny_model(kind=kind)
    return result_of(model, *all_metrics(model), batch_size=batch_size)


def test_figures_against_torch_distributions():
    """The bound, that under a mixture of two equal components, and PSNR of 8 bits."""
    model, found = tiny_model(), []
    for sample, image in enumerate(IMAGES.double() / 255):
        ink, q, z = drawn(model, sample)
        with torch.no_grad():
            logits, at_mean = (model.decode(at.float(), SIZE).double() for at in (z, q.mean))
        shown = (255 * torch.sigmoid(at_mean)).round() / 255
        distortion = -Independent(Bernoulli(logits=logits), 3).log_prob(ink)
        rate = kl_divergence(q, Normal(0.0, 1.0)).sum()
        rate_gmm = (q.log_prob(z) - Normal(0.7, 1.3).log_prob(z)).sum()
        psnr = -10 * torch.log10((image - shown).square().mean())
        found.append([float(one) for one in (distortion, rate, rate_gmm, psnr)])
    distortion, rate, rate_gmm, psnr = torch.tensor(found).mean(0).tolist()
    halves, of_two = torch.full((2,), 0.5).double().log(), torch.ones(2, 3).double()
    prior = metrics.PriorMetric("gmm", GaussianMixture(halves, 0.7 * of_two, 1.3 * of_two), CPU)
    compare = metrics.ReconstructionMetric(metrics.comparisons(["psnr"]), CPU)
    expected = {
        "distortion_nats": distortion,
        "rate_nats": rate,
        "neg_elbo_nats": distortion + rate,
        "bits_per_dim": (distortion + rate) / (30 * math.log(2)),
        "rate_gmm_nats": rate_gmm,
        "neg_elbo_gmm_nats": distortion + rate_gmm,
        "psnr_db": psnr,
    }
    figures = result_of(model, prior, compare).figures
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert rate > 1e-3 and figures["neg_elbo_gmm_se_nats"] > 0
    names = "neg_elbo_nats rate_nats distortion_nats bits_per_dim num_images skipped_samples"
    of_latent = "active_units active_fraction posterior_variance mutual_information_nats"
    assert set(result_of(model, seed=4).row()) == {  # names that scripts rely on
        *(f"eval/{name}" for name in names.split()),
        *(f"latent/{name}" for name in (*of_latent.split(), "kl_nats_per_unit")),
    }
    assert result_of(model, seed=4).figures["neg_elbo_nats"] != figures["neg_elbo_nats"]


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_batches_padding_and_ranks_do_not_matter(kind):
    whole, others = measured(kind, 13), [measured(kind, 4)]
    if kind == "bernoulli":
        others += run_ranks(2, partial(measured, kind, 2))
        assert others[1] == others[2]
    for other in others:
        assert other.figures == pytest.approx(whole.figures, rel=1e-5)
        assert other.row().keys() == whole.row().keys()


def test_it_stops_between_batches_when_asked():
    answers, model = iter([False, True]), tiny_model().train()
    options = {"runtime": start(), "seed": 3, "stop_requested": answers.__next__}
    assert run.evaluate(model, batches(4), **options) is None
    assert model.training and next(answers, None) is None


def test_too_many_lost_images_are_an_error():
    """As in training: above data.max_skipped_fraction, or where there is none at all."""

    def found_without(num_lost, limit):
        lost = [SkippedSample("a.tar", number, "no PNG", None) for number in range(num_lost)]
        weights = (torch.arange(NUM_IMAGES) >= num_lost).float()
        change = partial(EvaluationBatch._replace, weights=weights, skipped=lost)
        return result_of(tiny_model(), change=change, max_skipped_fraction=limit).figures

    for num_lost, limit in ((4, 0.3), (13, 1.0)):
        with pytest.raises(ConfigError, match=f"{num_lost} of 13 images .* a.tar sample 0: no PNG"):
            found_without(num_lost, limit)
    found = found_without(4, 0.31)
    assert (found["num_images"], found["skipped_samples"]) == (9, 4)


def test_images_of_two_shapes_count_by_their_values():
    """bits/dim of all is the mean of both weighted by values, nats per image by images; small
    images are left out of what needs larger ones."""
    model = tiny_model(latent="spatial", kind="gaussian")
    small = batch_of(torch.from_numpy(random_pixels(3, 1, 6, 5)), [0, 3, 4])
    large = batch_of(torch.from_numpy(random_pixels(2, 1, 12, 13)), [1, 2])

    def measured_of(*shares):
        compare = metrics.ReconstructionMetric(metrics.comparisons(["psnr", "ssim"]), CPU)
        both = [ImportanceMetric(model, CPU, num_samples=3, seed=3), compare]
        return run.evaluate(model, shares, runtime=start(), seed=3, metrics=both)

    result = measured_of(small, large)
    both, first, second = result.figures, measured_of(small).figures, measured_of(large).figures
    for one, two, names in (
        (3 * 30, 2 * 156, ("bits_per_dim", "is_bits_per_dim")),
        (3, 2, ("neg_elbo_nats", "is_nll_nats", "rate_nats", "psnr_db")),
    ):
        for name in names:
            expected = (first[name] * one + second[name] * two) / (one + two)
            assert both[name] == pytest.approx(expected, rel=1e-6), name
    assert both["ssim"] == pytest.approx(second["ssim"]) and "ssim" not in first
    assert "3 of 5 images have a side of less than 11 pixels, which ssim" in result.notes["ssim"]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "gaussian")])
def test_an_evaluation_is_that_of_the_cpu(device, latent, kind):
    results = []
    for place in ("cpu", device):
        with runtime_on(place) as runtime:
            use_tensor_float_32(runtime.device, "bf16")  # as training may have set it
            model = tiny_model(latent=latent, kind=kind).to(runtime.device)
            options = {"runtime": runtime, "metrics": all_metrics(model, runtime.device)}
            results.append(run.evaluate(model, batches(4), seed=3, **options))
            use_tensor_float_32(runtime.device, "no")
    expected, found = results
    for name, value in expected.figures.items():
        # pictures are rounded to levels, so that a rounding may move one of them
        is_of_pictures = name in ("rfid", "fid", "fid_gmm", "psnr_db")
        assert found.figures[name] == pytest.approx(value, rel=1e-2 if is_of_pictures else 1e-4)
    stds = [one.statistics["per_channel"]["std"] for one in results]
    assert stds[0] == pytest.approx(stds[1], rel=1e-4)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_original_of_5_bits_is_the_image_that_the_model_was_given():
    stored, levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), Levels(5)
    images = levels.centers(stored)
    likelihood = SimpleNamespace(levels=levels, mean=lambda params: params)
    model = SimpleNamespace(likelihood=likelihood, num_levels=0, decode=lambda *_: images)
    inputs = metrics.Inputs(stored, images, [0])
    batch = metrics.EvaluatedBatch(model, inputs, images, SimpleNamespace(mean=0))
    assert metrics.psnr_db(*batch.pictures).tolist() == [100]  # of no error, and not infinity


def test_ssim_of_constant_images_is_the_luminance_term():
    compare, shape = metrics.comparisons(["ssim", "ms_ssim"]), (1, 1, 176, 180)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # c1 for a data range of 1
    # the luminance counts at the coarsest scale alone, whose exponent is 0.1333
    for name, expected in (("ssim", luminance), ("ms_ssim", luminance**0.1333)):
        found = compare[name].function(torch.full(shape, 0.2), torch.full(shape, 0.6))
        assert float(found) == pytest.approx(expected, abs=1e-6)


# latents


def latent_report(*groups):
    """Of groups of (mean, log variance, z, numbers)."""
    sums = metrics.LatentSums(3, CPU)
    for mean, log_variance, z, numbers in groups:
        for rows in torch.arange(len(mean)).split(3):
            output = SimpleNamespace(mean=mean[rows], log_variance=log_variance[rows], z=z[rows])
            sums.update(output, [numbers[row] for row in rows])
    return sums.compute(start())


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
def test_latents_against_torch_distributions(shape):
    mean, log_variance = randn(10, *shape).float(), randn(10, *shape, seed=1).float()
    mean[:, 1] *= 0.05  # of standard deviation 0.05: not active
    found = latent_report((mean, log_variance, mean, range(10)))
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    expected = kl.reshape(10, 3, -1).sum(2).mean(0).tolist()
    assert found.kl_nats_per_unit == pytest.approx(expected, rel=1e-5)
    assert (found.active_units, found.active_fraction) == (2, pytest.approx(2 / 3))
    assert found.posterior_variance == pytest.approx(log_variance.exp().mean().item())


@pytest.mark.parametrize("sigma", [2.0, 0.5])
def test_mutual_information_of_a_gaussian_channel(sigma):
    """x ~ N(0, 1) and q(z|x) = N(x, sigma^2) in each of 2 dimensions: I = log(1 + 1/sigma^2)."""
    mean = randn(2048, 2)
    z = mean + sigma * randn(2048, 2, seed=8)
    log_variance = torch.full_like(mean, 2 * math.log(sigma))
    found = metrics.mutual_information_nats(mean, log_variance, z)
    assert found == pytest.approx(math.log1p(1 / sigma**2), abs=0.05)


def test_mutual_information_is_at_most_the_log_of_the_images_of_one_shape():
    few, many = torch.randn(2, 3, 2, 2), torch.randn(5, 3, 4, 2)
    found = latent_report((few, 0 * few - 20, few, [5, 6]), (many, 0 * many - 20, many, range(5)))
    assert found.mutual_information_nats == pytest.approx(math.log(5))


# the Frechet distance


def test_distance_of_gaussians_with_commuting_covariances():
    """Then d^2 = |m_1 - m_2|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    basis, shift = torch.linalg.qr(randn(5, 5))[0], randn(5, seed=3)
    a, b = randn(5, seed=1).square(), randn(5, seed=2).square()
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    cov_a, cov_b = ((basis * values) @ basis.T for values in (a, b))
    found = frechet_distance(shift, cov_a, torch.zeros(5, dtype=torch.float64), cov_b)
    assert found == pytest.approx(float(exact), rel=1e-9)


def pixels(images):
    """A feature network for tests: (b, 3, H, W) in [0, 1] -> (b, 4)."""
    assert images.shape[1] == 3
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    return images[:, 0, :2, :2].flatten(1)


def test_fid_is_of_the_samples_that_sample_draws():
    model, priors = tiny_model(), {"fid": None, "fid_gmm": TWO_GAUSSIANS}
    metric = FrechetMetric(pixels, 4, model, CPU, of_reconstructions=False, priors=priors, seed=3)
    result = result_of(model, metric)
    assert "of 13 images: biased" in result.notes["frechet"]

    def moments(shown):
        features = pixels(metrics.in_colour(shown.float() / 255)).double()
        return features.mean(0), torch.cov(features.T)

    for name, prior in priors.items():
        samples = to_uint8(BatchedVAE(model).sample(NUM_IMAGES, SIZE, seed=3, prior=prior))
        exact = frechet_distance(*moments(IMAGES), *moments(samples))
        assert result.figures[name] == pytest.approx(exact, rel=1e-5), name


# results.json


def record(**figures):
    figures = {"num_images": 4, "skipped_samples": 0, **figures}
    same = {key: f"this {key}" for key in run.SAME}
    return same | {"figures": figures, "conditions": {}, "notes": {}, "metric_weights": {}}


def test_what_another_evaluation_or_a_damaged_file_holds_does_not_stay(tmp_path):
    path, now = tmp_path / "r.json", record(psnr_db=21.0)
    earlier = record(psnr_db=20.0, lpips=0.3) | {"notes": {"psnr_db": "few", "lpips": "few"}}
    path.write_bytes(run.as_json(earlier))
    merged = run.merged_with_earlier(now, path)
    assert merged["figures"] == earlier["figures"] | now["figures"]
    assert merged["notes"] == {"lpips": "few"}
    for key in (*run.SAME, *run.COUNTS):
        other = earlier | {"figures": dict(earlier["figures"])}
        (other["figures"] if key in run.COUNTS else other)[key] = "another"
        path.write_bytes(run.as_json(other))
        assert run.merged_with_earlier(now, path) == now, key
    for text in ("", "[]", "null", '{"figures": 3}', "{", "[" * 10**5):
        path.write_text(text)
        assert run.merged_with_earlier(now, path) == now
    assert run.merged_with_earlier(now, tmp_path / "none.json") == now
    data = run.as_json({"a": [1.0, float("nan"), float("inf")]})  # numbers that JSON does not know
    assert json.loads(data, parse_constant=pytest.fail) == {"a": [1.0, None, None]}
