"""The step of two networks: its gradients are those of the sum of all terms, however it is cut."""

import math
from contextlib import contextmanager

import pytest
import torch

from tests.support.adversarial import (
    SIZE,
    adversarial_config,
    adversarial_step,
    picture_batch,
    start,
)
from tests.support.distributed import reset_accelerate
from vae_dist.config.schema import AdversarialConfig
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms
from vae_dist.training import adversarial
from vae_dist.training.adversarial import LastLayer, adaptive_weight, hinge_loss, ramp_at


@pytest.fixture
def runtime():
    reset_accelerate()
    torch.set_num_threads(1)
    return start()


def kept_gradients(network, optimizer):
    """Those of the next step, by name, once it is done."""
    found, parameters = {}, {n: p for n, p in network.named_parameters() if p.requires_grad}
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in parameters.items()})
    )
    return found


def test_the_gradients_of_both_networks_are_those_of_the_sums_of_their_terms(runtime):
    """Term by term at a leaf, and one backward through the VAE: the same as one loss. That of the
    discriminator, which reconstructions do not pass on, is clipped by itself."""
    config = adversarial_config()
    config.adversarial.ramp_steps, config.adversarial.clip_grad_norm = 1, 0.1
    step = adversarial_step(config, runtime)
    step(picture_batch(runtime, 0), 0)
    critic, weight = step.adversary.network, 0.5 * float(step.adversary.weight)
    found = kept_gradients(step.vae, step.optimizer)
    found_of_critic = kept_gradients(critic, step.adversary.optimizer)
    batch = picture_batch(runtime, 1)
    (group,) = batch.groups
    (images, noise, *_), more = step._inputs(group, group.images, 1)
    output, half_size = step.vae(images, noise, **more)
    pictures, means = group.images.float() / 127.5 - 1, step.vae.likelihood.mean(output.params)
    dims = 3 * SIZE[0] * SIZE[1]
    assert weight > 0
    loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
    loss = loss + dims * step.losses.perceptual(means, pictures).sum()
    loss = loss - weight * dims * critic(means).flatten(1).mean(1).sum()
    own = hinge_loss(critic(pictures), critic(means.detach())).sum()
    expected = torch.autograd.grad(loss / len(images), list(step.vae.parameters()))
    trained = [p for p in critic.parameters() if p.requires_grad]
    of_critic = torch.autograd.grad(own / len(images), trained)
    report = step(batch, 1)
    assert float(report.sums["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, gradient), value in zip(found.items(), expected, strict=True):
        assert (gradient - value).abs().max() <= 1e-4 * value.abs().max() + 1e-4, name
    norm = sum(float(value.square().sum()) for value in of_critic) ** 0.5
    assert norm > 0.1 and float(report.shared["optim/discriminator_grad_norm"]) == pytest.approx(
        norm
    )
    for gradient, value in zip(found_of_critic.values(), of_critic, strict=True):
        torch.testing.assert_close(gradient, 0.1 / norm * value, rtol=1e-3, atol=1e-6)


def test_before_its_first_step_the_discriminator_rests(runtime):
    config = adversarial_config()
    config.adversarial.start_step = 1
    step = adversarial_step(config, runtime)
    before = {k: v.clone() for k, v in step.tensors()["discriminator"].items()}
    report = step(picture_batch(runtime, 0), 0)
    after = step.tensors()["discriminator"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "train/discriminator_loss" not in report.sums
    report = step(picture_batch(runtime, 1), 1)
    assert "train/discriminator_loss" in report.sums
    assert float(report.shared["optim/adversarial_weight"]) == 0
    assert float(step.adversary.weight) > 0  # for the step in which the decoder hears of it


@pytest.mark.parametrize("patch", [1, 2])
def test_last_layers_gradient_is_that_of_autograd(patch):
    config = adversarial_config()
    config.model.patch = patch
    vae = build_vae(config, (22, 30))  # padded to the stride
    last = LastLayer(vae)
    last.watch(wanted=True)
    images, noise = torch.rand(3, 3, 22, 30), torch.randn(3, *vae.latent_shape(22, 30))
    output, _ = vae(images, noise, half_size=True)  # a second pass of the decoder, not watched
    at_params = torch.randn_like(output.params)
    (expected,) = torch.autograd.grad(output.params, vae.decoder.conv_out.weight, at_params)
    (found,) = last.gradients([at_params])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_nothing(runtime):
    def some_steps():
        step, found = adversarial_step(config, runtime), []
        for number in range(3):
            report = step(picture_batch(runtime, number), number)
            found += [float(report.sums["train/loss"]), float(step.adversary.weight)]
        return found

    config = adversarial_config()
    config.training.microbatch_size = 4
    config.adversarial.warmup_steps = 0  # the first step is watched
    expected = some_steps()
    config.model.gradient_checkpointing = True
    assert some_steps() == pytest.approx(expected, rel=1e-5)


def test_structure_is_compared_in_exact_float32(runtime, monkeypatch):
    """Forward and gradient, whatever the rest of the step is computed in."""
    inside, seen = [False], []

    @contextmanager
    def exact():
        inside[0] = True
        yield
        inside[0] = False

    def see(_, inputs, __):
        seen.append(inside[0])
        inputs[0].register_hook(lambda _: seen.append(inside[0]))

    monkeypatch.setattr(adversarial, "exact_float32", exact)
    step = adversarial_step(adversarial_config(), runtime)
    step.losses.perceptual.distance.register_forward_hook(see)
    step(picture_batch(runtime, 0), 0)
    assert seen == [True, True]


def test_hinge_loss_of_each_pair():
    on_real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
    on_fake = torch.tensor([[-3.0, 0.0], [0.5, -0.5]]).view(2, 1, 1, 2)
    expected = torch.tensor([0.5 * 0.25 + 0.5 * 0.5, 0.5 * 1.0 + 0.5 * 1.0])
    torch.testing.assert_close(hinge_loss(on_real, on_fake), expected)


def test_the_weight_rises_after_a_warm_up_and_follows_a_clamped_ratio_of_norms():
    config = AdversarialConfig(start_step=10, warmup_steps=5, ramp_steps=4)
    ramp = [ramp_at(config, step) for step in range(14, 21)]
    assert ramp == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ramp_at(AdversarialConfig(start_step=0, warmup_steps=0, ramp_steps=0), 0) == 1.0
    main, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(main, other, largest=100.0)) == pytest.approx(2.5)
    assert float(adaptive_weight(main, other, largest=2.0)) == 2.0
    assert float(adaptive_weight(main, 0 * other, largest=7.0)) == 7.0
    assert float(adaptive_weight(0 * main, other, largest=7.0)) == 0.0
    assert math.isnan(float(adaptive_weight(main * math.nan, other, largest=7.0)))
