"""The step of two networks: its gradients are those of the sum of all terms, however it is cut."""

import math

import pytest
import torch

from tests.support.steps import batch, config, kept_gradients, make_step
from vae_dist.config.schema import AdversarialConfig
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms
from vae_dist.training.adversarial import LastLayer, adaptive_weight, hinge_loss, ramp_at


def test_the_gradients_of_both_networks_are_those_of_the_sums_of_their_terms():
    """Term by term at a leaf, and one backward through the VAE: the same as one loss. That of the
    discriminator, which reconstructions do not pass on, is clipped by itself."""
    settings = config(adversarial=True)
    settings.adversarial.ramp_steps, settings.adversarial.clip_grad_norm = 1, 0.1
    step = make_step(settings)
    step(batch(step, 0), 0)
    critic, weight = step.adversary.network, 0.5 * float(step.adversary.weight)
    found = kept_gradients(step.vae, step.optimizer)
    found_of_critic = kept_gradients(critic, step.adversary.optimizer)
    second = batch(step, 1)
    (group,) = second.groups
    (images, noise, *_), more = step._inputs(group, group.images, 1)
    output, half_size = step.vae(images, noise, **more)
    pictures, means = group.images.float() / 127.5 - 1, step.vae.likelihood.mean(output.params)
    dims = means[0].numel()
    assert weight > 0
    loss = loss_terms(output, settings.objective, beta=1.0, half_size=half_size).loss_sum
    loss = loss + dims * step.losses.perceptual(means, pictures).sum()
    loss = loss - weight * dims * critic(means).flatten(1).mean(1).sum()
    own = hinge_loss(critic(pictures), critic(means.detach())).sum()
    expected = torch.autograd.grad(loss / len(images), list(step.vae.parameters()))
    trained = [p for p in critic.parameters() if p.requires_grad]
    of_critic = torch.autograd.grad(own / len(images), trained)
    report = step(second, 1)
    assert float(report.sums["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, gradient), value in zip(found.items(), expected, strict=True):
        assert (gradient - value).abs().max() <= 1e-4 * value.abs().max() + 1e-4, name
    norm = sum(float(value.square().sum()) for value in of_critic) ** 0.5
    other_norm = float(report.shared["optim/discriminator_grad_norm"])
    assert other_norm == pytest.approx(norm) and norm > 0.1
    for gradient, value in zip(found_of_critic.values(), of_critic, strict=True):
        torch.testing.assert_close(gradient, 0.1 / norm * value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2])
def test_last_layers_gradient_is_that_of_autograd(patch):
    settings = config(adversarial=True)
    settings.model.patch = patch
    vae = build_vae(settings, (22, 30))  # padded to the stride
    last = LastLayer(vae)
    last.watch(wanted=True)
    images, noise = torch.rand(3, 3, 22, 30), torch.randn(3, *vae.latent_shape(22, 30))
    output, _ = vae(images, noise, half_size=True)  # a second pass of the decoder, not watched
    at_params = torch.randn_like(output.params)
    (expected,) = torch.autograd.grad(output.params, vae.decoder.conv_out.weight, at_params)
    (found,) = last.gradients([at_params])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_structure_is_compared_in_exact_float32():
    """Forward and gradient, whatever the rest of the step is computed in."""
    seen, products = [], torch.backends.cuda.matmul

    def see(_, inputs, __):
        seen.append(products.allow_tf32)
        inputs[0].register_hook(lambda _: seen.append(products.allow_tf32))

    step = make_step(config(adversarial=True))
    step.losses.perceptual.distance.register_forward_hook(see)
    try:
        products.allow_tf32 = True
        step(batch(step, 0), 0)
    finally:
        products.allow_tf32 = False  # as torch has it
    assert seen[:2] == [False, False]  # the last one is of the discriminator


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
