"""One cycle of both networks: what changes, which term reaches which weights, what is skipped."""

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
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms
from vae_dist.training import adversarial
from vae_dist.training.adversarial import LastLayer


@pytest.fixture
def runtime():
    reset_accelerate()
    torch.set_num_threads(1)
    return start()


def copies(step):
    groups = step.tensors()
    return {f"{g}/{k}": v.detach().clone() for g, group in groups.items() for k, v in group.items()}


def test_every_parameter_changes_in_one_cycle(runtime):
    config = adversarial_config()
    config.model.num_classes = 3
    step = adversarial_step(config, runtime)
    before = copies(step)
    for number in range(3):  # blocks end in zeros, so that the first step reaches part of them
        step(picture_batch(runtime, number), number)
    after = copies(step)
    for name, value in before.items():
        if not name.startswith(("optimizer/", "discriminator_optimizer/")):
            is_kept = name == "discriminator/conv_out.bias"
            assert torch.equal(value, after[name]) == is_kept, name


# which term reaches what


def bare(**changes):
    """The bound alone, and what `changes` adds to it."""
    config = adversarial_config()
    config.perceptual.kind, config.adversarial.weight = "none", 0.0
    config.objective.scale_equivariance = config.objective.latent_noise = 0.0
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def gradients(config, runtime):
    """Of both networks in the second of two steps, whose updates are left out, so that all configs
    have the same weights."""
    step, seen = adversarial_step(config, runtime), {}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # the blocks' last layers begin at zero
        for parameter in step.vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def see(network, optimizer, prefix):
        def hook(*_):
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    seen[prefix + name] = parameter.grad.clone()
                parameter.grad = None

        optimizer.register_step_pre_hook(hook)

    see(step.vae, step.optimizer, "")
    if step.adversary is not None:
        see(step.adversary.network, step.adversary.optimizer, "d/")
    for number in range(2):
        step(picture_batch(runtime, number), number)
    return seen


TERMS = {  # what is set; whether it reaches encoder, decoder, the learned scale
    "perceptual": ({"perceptual__kind": "structure"}, (True, True, False)),
    "adversarial": ({"adversarial__weight": 0.5}, (True, True, False)),
    "half size": ({"objective__scale_equivariance": 0.5}, (True, True, True)),
    "latent noise": ({"objective__latent_noise": 0.5}, (True, True, True)),
    "rate": ({"objective__beta": 3.0}, (True, False, False)),
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_what_it_should_and_nothing_else(runtime, term):
    changes, reached = TERMS[term]
    plain, added = gradients(bare(), runtime), gradients(bare(**changes), runtime)
    parts = ("encoder.", "decoder.", "likelihood.")
    for part, is_reached in zip(parts, reached, strict=True):
        names = [name for name in plain if name.startswith(part)]
        moved = [not torch.equal(plain[name], added[name]) for name in names]
        assert names and (all(moved) if is_reached else not any(moved)), part
    assert any(name.startswith("d/") for name in added) == (term == "adversarial")


def test_the_discriminator_learns_from_its_own_loss_alone_and_is_clipped_alone(runtime):
    """Its gradient is that of hinge loss on constants: the decoder's term leaves none."""
    config = adversarial_config()
    heard = gradients(config, runtime)
    config.adversarial.warmup_steps = 100  # the decoder hears nothing
    unheard = gradients(config, runtime)
    own = [name for name in heard if name.startswith("d/")]
    assert own and all(torch.equal(heard[name], unheard[name]) for name in own)
    assert any(not torch.equal(heard[n], unheard[n]) for n in heard if n.startswith("decoder."))
    norm = sum(float(heard[name].square().sum()) for name in own) ** 0.5
    config.adversarial.warmup_steps, config.adversarial.clip_grad_norm = 1, norm / 4
    clipped = gradients(config, runtime)
    for name, value in heard.items():
        factor = 0.25 if name in own else 1.0
        torch.testing.assert_close(clipped[name], factor * value, rtol=1e-3, atol=1e-6)


def test_before_its_first_step_the_discriminator_rests(runtime):
    config = adversarial_config()
    config.adversarial.start_step = 1
    step = adversarial_step(config, runtime)
    before = copies(step)
    report = step(picture_batch(runtime, 0), 0)
    after = copies(step)
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("discriminator/"))
    assert "train/discriminator_loss" not in report.sums
    report = step(picture_batch(runtime, 1), 1)
    assert "train/discriminator_loss" in report.sums
    assert float(report.shared["optim/adversarial_weight"]) == 0
    assert float(step.adversary.weight) > 0  # for the step in which the decoder hears of it


# the gradients themselves


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


def test_the_gradient_is_that_of_the_sum_of_all_terms(runtime):
    """Term by term at a leaf, and one backward through the VAE: the same as one loss."""
    config, found = adversarial_config(), {}
    config.adversarial.ramp_steps = 1
    step = adversarial_step(config, runtime)
    step(picture_batch(runtime, 0), 0)
    step.optimizer.zero_grad()
    parameters = dict(step.vae.named_parameters())
    step.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in parameters.items()})
    )
    batch = picture_batch(runtime, 1)
    (group,) = batch.groups
    (images, noise, *_), more = step._inputs(group, group.images, 1)
    output, half_size = step.vae(images, noise, **more)
    pictures, means = group.images.float() / 127.5 - 1, step.vae.likelihood.mean(output.params)
    dims, weight = 3 * SIZE[0] * SIZE[1], 0.5 * float(step.adversary.weight)
    assert weight > 0
    loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
    loss = loss + dims * step.losses.perceptual(means, pictures).sum()
    loss = loss - weight * dims * step.adversary.network(means).flatten(1).mean(1).sum()
    expected = torch.autograd.grad(loss / len(images), list(parameters.values()))
    report = step(batch, 1)
    assert float(report.sums["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in zip(parameters, expected, strict=True):
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-4, name


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
    def exact(_):
        inside[0] = True
        yield
        inside[0] = False

    def see(_, inputs, __):
        seen.append(inside[0])
        inputs[0].register_hook(lambda _: seen.append(inside[0]))

    monkeypatch.setattr(adversarial, "exact_float32", exact)
    step = adversarial_step(bare(perceptual__kind="structure"), runtime)
    step.losses.perceptual.distance.register_forward_hook(see)
    step(picture_batch(runtime, 0), 0)
    assert seen == [True, True]
