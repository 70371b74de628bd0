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
    NUM_IMAGES,
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
from vae_dist.evaluation.run import COUNTS, SAME, as_json, evaluate, merged_with_earlier
from vae_dist.randomness import torch_generator
from vae_dist.training.compile import use_tensor_float_32


def measured(kind, batch_size):
    model = tiny_model(kind=kind)
    return result_of(model, *all_metrics(model), batch_size=batch_size)


def test_figures_against_torch_distributions():
    model, distortion, rate = tiny_model(), 0.0, 0.0
    for sample in range(NUM_IMAGES):
        ink, posterior, z = drawn(model, sample)
        with torch.no_grad():
            logits = model.decode(z.float(), SIZE).double()
        distortion -= float(Independent(Bernoulli(logits=logits), 3).log_prob(ink))
        rate += float(kl_divergence(posterior, Normal(0.0, 1.0)).sum())
    result = result_of(model)
    found = result.figures
    assert found["distortion_nats"] == pytest.approx(distortion / NUM_IMAGES, rel=1e-6)
    assert found["rate_nats"] == pytest.approx(rate / NUM_IMAGES, rel=1e-5) and rate > 1e-3
    assert found["neg_elbo_nats"] == pytest.approx((distortion + rate) / NUM_IMAGES, rel=1e-6)
    assert found["bits_per_dim"] == pytest.approx(found["neg_elbo_nats"] / (30 * math.log(2)))
    names = "neg_elbo_nats rate_nats distortion_nats bits_per_dim num_images skipped_samples"
    of_latent = "active_units active_fraction posterior_variance mutual_information_nats"
    assert set(result.row()) == {  # names that scripts rely on
        *(f"eval/{name}" for name in names.split()),
        *(f"latent/{name}" for name in (*of_latent.split(), "kl_nats_per_unit")),
    }
    assert result_of(model, seed=4).figures != found


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
    stop = lambda: next(answers)  # noqa: E731
    assert evaluate(model, batches(4), runtime=start(), seed=3, stop_requested=stop) is None
    assert model.training and next(answers, None) is None


@pytest.mark.parametrize(("num_lost", "limit"), [(4, 0.3), (13, 1.0)])
def test_too_many_lost_images_are_an_error(num_lost, limit):
    """As in training: above data.max_skipped_fraction, or where there is none at all."""

    def damaged(batch):
        lost = batch.samples < num_lost
        skipped = [SkippedSample("a.tar", int(n), "no PNG", None) for n in batch.samples[lost]]
        return batch._replace(weights=torch.where(lost, 0.0, batch.weights), skipped=skipped)

    model, sentence = tiny_model(), f"{num_lost} of 13 images .* a.tar sample 0: no PNG"
    with pytest.raises(ConfigError, match=sentence):
        result_of(model, change=damaged, max_skipped_fraction=limit)
    if num_lost == 4:
        found = result_of(model, change=damaged, max_skipped_fraction=0.31).figures
        assert (found["num_images"], found["skipped_samples"]) == (9, 4)


def test_images_of_two_shapes_count_by_their_values():
    """bits/dim of all is the mean of both weighted by values, nats per image by images."""
    model = tiny_model(latent="spatial", kind="gaussian")

    def of_shape(height, width, samples):
        shape, generator = (len(samples), 1, height, width), torch_generator(0, "shapes", height)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return batch_of(images, samples)

    def figures_of(*shares):
        metrics = [ImportanceMetric(model, CPU, num_samples=3, seed=3)]
        result = evaluate(model, shares, runtime=start(), seed=3, metrics=metrics)
        assert result is not None
        return result.figures

    small, large = of_shape(6, 5, [0, 3, 4]), of_shape(8, 12, [1, 2])
    both, first, second = figures_of(small, large), figures_of(small), figures_of(large)
    for one, two, names in (
        (3 * 30, 2 * 96, ("bits_per_dim", "is_bits_per_dim")),
        (3, 2, ("neg_elbo_nats", "is_nll_nats", "rate_nats")),
    ):
        for name in names:
            expected = (first[name] * one + second[name] * two) / (one + two)
            assert both[name] == pytest.approx(expected, rel=1e-6), name


def result_on(device, **keys):
    with runtime_on(device) as runtime:
        use_tensor_float_32(runtime.device, "bf16")  # as training may have set it
        model = tiny_model(**keys).to(runtime.device)
        metrics = all_metrics(model, runtime.device)
        result = evaluate(model, batches(4), runtime=runtime, seed=3, metrics=metrics)
        use_tensor_float_32(runtime.device, "no")
    assert result is not None
    return result


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("latent", "kind"), [("vector", "bernoulli"), ("spatial", "gaussian")])
def test_an_evaluation_is_that_of_the_cpu(device, latent, kind):
    expected, found = (result_on(d, latent=latent, kind=kind) for d in ("cpu", device))
    assert found.figures.keys() == expected.figures.keys()
    for name, value in expected.figures.items():
        # pictures are rounded to levels, so that a rounding may move one of them
        is_of_pictures = name in ("rfid", "fid", "psnr_db")
        assert found.figures[name] == pytest.approx(value, rel=1e-2 if is_of_pictures else 1e-4)
    kl = expected.latent.kl_nats_per_unit
    assert found.latent.kl_nats_per_unit == pytest.approx(kl, rel=1e-4)
    stds = [one.statistics["per_channel"]["std"] for one in (found, expected)]
    assert stds[0] == pytest.approx(stds[1], rel=1e-4)


# results.json


def record(**figures):
    figures = {"num_images": 4, "skipped_samples": 0, "neg_elbo_nats": 3.5, **figures}
    conditions = {name: {"importance_samples": 7} for name in figures if name[:3] == "is_"}
    same = {key: f"this {key}" for key in SAME}
    return same | {"figures": figures, "conditions": conditions, "notes": {}, "metric_weights": {}}


def test_what_was_not_measured_again_stays_of_the_same_evaluation(tmp_path):
    path, earlier = tmp_path / "r.json", record(is_nll_nats=2.0, psnr_db=20.0, lpips=0.3)
    earlier["notes"] = {"psnr_db": "of 8 bits", "is_nll_nats": "few", "ms_ssim": "too small"}
    earlier["metric_weights"] = {"lpips": "a"}
    path.write_bytes(as_json(earlier))
    now = record(psnr_db=21.0, ssim=0.5)
    merged = merged_with_earlier(now, path)
    assert merged["figures"] == {**earlier["figures"], **now["figures"]}
    assert merged["conditions"] == {"is_nll_nats": {"importance_samples": 7}}
    assert merged["notes"] == {"is_nll_nats": "few", "ms_ssim": "too small"}
    assert merged["metric_weights"] == {"lpips": "a"}
    for key in (*SAME, *COUNTS):
        other = record(psnr_db=20.0)
        (other["figures"] if key in COUNTS else other)[key] = "another"
        path.write_bytes(as_json(other))
        assert merged_with_earlier(now, path) == now, key
    for text in ("", "[]", "{}", "null", '{"figures": 3}', "{", "[" * 10**5):
        path.write_text(text)
        assert merged_with_earlier(now, path) == now
    assert merged_with_earlier(now, tmp_path / "none.json") == now
    # numbers that JSON does not know
    data = as_json({"a": float("nan"), "latents": {"std": [1.0, float("inf")], "n": 3}})
    found = json.loads(data, parse_constant=pytest.fail)
    assert found == {"a": None, "latents": {"std": [1.0, None], "n": 3}}
