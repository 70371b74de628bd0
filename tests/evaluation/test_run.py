"""The bound against torch.distributions, what it may not depend on, and results.json."""

import functools
import json
import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from tests.support.devices import CUDA, runtime_on
from tests.support.distributed import run_ranks
from tests.support.evaluated import (
    CPU,
    IMAGES,
    SIZE,
    all_metrics,
    batch_of,
    batches,
    drawn,
    result_of,
    start,
    tiny_model,
)
from vae_dist.config.errors import ConfigError
from vae_dist.data.reader import SkippedSample
from vae_dist.evaluation.importance import ImportanceMetric
from vae_dist.evaluation.metrics import PriorMetric, ReconstructionMetric, comparisons
from vae_dist.evaluation.run import COUNTS, SAME, as_json, evaluate, merged_with_earlier
from vae_dist.inference.mixture import GaussianMixture
from vae_dist.randomness import torch_generator
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
    prior = PriorMetric("gmm", GaussianMixture(halves, 0.7 * of_two, 1.3 * of_two), CPU)
    metrics = prior, ReconstructionMetric(comparisons(["psnr"]), CPU)
    expected = {
        "distortion_nats": distortion,
        "rate_nats": rate,
        "neg_elbo_nats": distortion + rate,
        "bits_per_dim": (distortion + rate) / (30 * math.log(2)),
        "rate_gmm_nats": rate_gmm,
        "neg_elbo_gmm_nats": distortion + rate_gmm,
        "psnr_db": psnr,
    }
    figures = result_of(model, *metrics).figures
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
    whole = measured(kind, 13)
    others = [measured(kind, 4)]
    if kind == "bernoulli":
        ranks = run_ranks(2, functools.partial(measured, kind, 2))
        assert ranks[0] == ranks[1]
        others.append(ranks[0])
    for other in others:
        assert other.figures == pytest.approx(whole.figures, rel=1e-5)
        assert other.row().keys() == whole.row().keys()


def test_it_stops_between_batches_when_asked():
    answers, model = iter([False, True]), tiny_model().train()
    options = {"runtime": start(), "seed": 3, "stop_requested": answers.__next__}
    assert evaluate(model, batches(4), **options) is None
    assert model.training and next(answers, None) is None


def test_too_many_lost_images_are_an_error():
    """As in training: above data.max_skipped_fraction, or where there is none at all."""

    def measured_without(num_lost, limit):
        def damaged(batch):
            lost = batch.samples < num_lost
            skipped = [SkippedSample("a.tar", int(n), "no PNG", None) for n in batch.samples[lost]]
            return batch._replace(weights=torch.where(lost, 0.0, batch.weights), skipped=skipped)

        return result_of(tiny_model(), change=damaged, max_skipped_fraction=limit).figures

    for num_lost, limit in ((4, 0.3), (13, 1.0)):
        sentence = f"{num_lost} of 13 images .* a.tar sample 0: no PNG"
        with pytest.raises(ConfigError, match=sentence):
            measured_without(num_lost, limit)
    found = measured_without(4, 0.31)
    assert (found["num_images"], found["skipped_samples"]) == (9, 4)


def test_images_of_two_shapes_count_by_their_values():
    """bits/dim of all is the mean of both weighted by values, nats per image by images; small
    images are left out of what needs larger ones."""
    model = tiny_model(latent="spatial", kind="gaussian")

    def of_shape(height, width, samples):
        shape, generator = (len(samples), 1, height, width), torch_generator(0, "shapes", height)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return batch_of(images, samples)

    def measured_of(*shares):
        compare = ReconstructionMetric(comparisons(["psnr", "ssim"]), CPU)
        metrics = [ImportanceMetric(model, CPU, num_samples=3, seed=3), compare]
        return evaluate(model, shares, runtime=start(), seed=3, metrics=metrics)

    small, large = of_shape(6, 5, [0, 3, 4]), of_shape(12, 13, [1, 2])
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
            results.append(evaluate(model, batches(4), seed=3, **options))
            use_tensor_float_32(runtime.device, "no")
    expected, found = results
    for name, value in expected.figures.items():
        # pictures are rounded to levels, so that a rounding may move one of them
        is_of_pictures = name in ("rfid", "fid", "psnr_db")
        assert found.figures[name] == pytest.approx(value, rel=1e-2 if is_of_pictures else 1e-4)
    stds = [one.statistics["per_channel"]["std"] for one in results]
    assert stds[0] == pytest.approx(stds[1], rel=1e-4)


# results.json


def record(**figures):
    figures = {"num_images": 4, "skipped_samples": 0, **figures}
    conditions = {name: {"importance_samples": 7} for name in figures if name[:3] == "is_"}
    same = {key: f"this {key}" for key in SAME}
    return same | {"figures": figures, "conditions": conditions, "notes": {}, "metric_weights": {}}


def test_what_was_not_measured_again_stays_of_the_same_evaluation(tmp_path):
    path, earlier = tmp_path / "r.json", record(is_nll_nats=2.0, psnr_db=20.0)
    earlier |= {"notes": {"psnr_db": "of 8 bits", "is_nll_nats": "few"}}
    path.write_bytes(as_json(earlier))
    now = record(psnr_db=21.0, ssim=0.5)
    merged = merged_with_earlier(now, path)
    assert merged["figures"] == {**earlier["figures"], **now["figures"]}
    assert merged["conditions"] == {"is_nll_nats": {"importance_samples": 7}}
    assert merged["notes"] == {"is_nll_nats": "few"}
    for key in (*SAME, *COUNTS):
        other = record(psnr_db=20.0, lpips=0.3)
        (other["figures"] if key in COUNTS else other)[key] = "another"
        path.write_bytes(as_json(other))
        assert merged_with_earlier(now, path) == now, key
    for text in ("", "[]", "null", '{"figures": 3}', "{", "[" * 10**5):
        path.write_text(text)
        assert merged_with_earlier(now, path) == now
    assert merged_with_earlier(now, tmp_path / "none.json") == now
    data = as_json({"a": [1.0, float("nan"), float("inf")]})  # numbers that JSON does not know
    assert json.loads(data, parse_constant=pytest.fail) == {"a": [1.0, None, None]}
