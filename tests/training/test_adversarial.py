"""One cycle of both networks: what changes, which term reaches which weights, what is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

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
from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_vae
from vae_dist.objectives.elbo import loss_terms
from vae_dist.training import losses, memory
from vae_dist.training.adversarial import Adversary, LastLayer
from vae_dist.training.step import TrainingStep


@pytest.fixture
def runtime() -> Runtime:
    reset_accelerate()
    torch.set_num_threads(1)
    return start()


def copies(step: TrainingStep) -> dict[str, torch.Tensor]:
    groups = step.tensors()
    return {f"{g}/{k}": v.detach().clone() for g, group in groups.items() for k, v in group.items()}


@pytest.mark.parametrize("train_only", ["all", "decoder"])
def test_every_parameter_that_is_trained_changes_in_one_cycle(
    runtime: Runtime, train_only: Literal["all", "decoder"]
) -> None:
    config = adversarial_config()
    config.training.train_only, config.model.num_classes = train_only, 3
    step = adversarial_step(config, runtime)
    before = copies(step)
    for number in range(3):  # blocks end in zeros, so that the first step reaches part of them
        step(picture_batch(runtime, number), number)
    after = copies(step)
    frozen = ("encoder.", "quant_conv.", "label_embedding.") if train_only == "decoder" else ()
    for name, value in before.items():
        group, _, key = name.partition("/")
        if group in ("model", "ema", "discriminator"):
            is_kept = key.startswith(frozen) if group != "discriminator" else key == "conv_out.bias"
            assert torch.equal(value, after[name]) == is_kept, name
    held = step.tensors()["optimizer"]
    assert held and not any(key.split("/")[1].startswith(frozen) for key in held if frozen)


# ---- which term reaches what ----


def bare(**changes: Any) -> TrainConfig:
    """The bound alone, and what `changes` adds to it."""
    config = adversarial_config()
    config.perceptual.kind = "none"
    config.adversarial.weight = 0.0
    config.objective.scale_equivariance = config.objective.latent_noise = 0.0
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def gradients(config: TrainConfig, runtime: Runtime, *, steps: int = 2) -> dict[str, torch.Tensor]:
    """Of both networks in the last of `steps` steps, whose updates are left out, so that all
    configs have the same weights."""
    step = adversarial_step(config, runtime)
    with torch.no_grad():  # the blocks' last layers begin at zero
        generator = torch.Generator().manual_seed(5)
        for parameter in step.vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    seen: dict[str, torch.Tensor] = {}

    def see(*_: object) -> None:
        seen.update(
            {n: p.grad.clone() for n, p in step.vae.named_parameters() if p.grad is not None}
        )
        for parameter in step.vae.parameters():
            parameter.grad = None

    def see_other(*_: object) -> None:
        network = step.adversary.network
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        seen.update({f"d/{n}": grad.clone() for n, grad in grads.items()})
        for parameter in network.parameters():
            parameter.grad = None

    step.optimizer.register_step_pre_hook(see)
    if step.adversary is not None:
        step.adversary.optimizer.register_step_pre_hook(see_other)
    for number in range(steps):
        step(picture_batch(runtime, number), number)
    return seen


TERMS: dict[str, dict[str, Any]] = {
    "perceptual": {"perceptual__kind": "structure"},
    "adversarial": {"adversarial__weight": 0.5},
    "half size": {"objective__scale_equivariance": 0.5},
    "latent noise": {"objective__latent_noise": 0.5},
    "rate": {"objective__beta": 3.0},
}
REACHED = {  # by the term beside the bound: encoder, decoder, the learned scale
    "perceptual": (True, True, False),
    "adversarial": (True, True, False),
    "half size": (True, True, True),
    "latent noise": (True, True, True),
    "rate": (True, False, False),
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_what_it_should_and_nothing_else(runtime: Runtime, term: str) -> None:
    plain, added = gradients(bare(), runtime), gradients(bare(**TERMS[term]), runtime)
    parts = ("encoder.", "decoder.", "likelihood.")
    for part, is_reached in zip(parts, REACHED[term], strict=True):
        names = [name for name in plain if name.startswith(part)]
        assert names
        moved = [not torch.equal(plain[name], added[name]) for name in names]
        assert all(moved) if is_reached else not any(moved), part
    assert any(name.startswith("d/") for name in added) == (term == "adversarial")


def test_the_discriminator_learns_from_its_own_loss_alone(runtime: Runtime) -> None:
    """Its gradient is that of hinge loss and R1 on constants: the decoder's term leaves none."""
    config = adversarial_config()
    heard = gradients(config, runtime)
    config.adversarial.warmup_steps = 100  # the decoder hears nothing
    unheard = gradients(config, runtime)
    names = [name for name in heard if name.startswith("d/")]
    assert names and all(torch.equal(heard[name], unheard[name]) for name in names)
    assert any(not torch.equal(heard[n], unheard[n]) for n in heard if n.startswith("decoder."))


def test_before_its_first_step_the_discriminator_rests(runtime: Runtime) -> None:
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


# ---- the gradients themselves ----


@pytest.mark.parametrize("patch", [1, 2])
def test_last_layers_gradient_is_that_of_autograd(patch: int) -> None:
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


def test_the_gradient_is_that_of_the_sum_of_all_terms(runtime: Runtime) -> None:
    """Term by term at a leaf, and one backward through the VAE: the same as one loss."""
    config = adversarial_config()
    config.adversarial.ramp_steps = 1
    step = adversarial_step(config, runtime)
    step(picture_batch(runtime, 0), 0)
    step.optimizer.zero_grad()
    found: dict[str, torch.Tensor] = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in step.vae.named_parameters()})
    )
    batch = picture_batch(runtime, 1)
    (group,) = batch.groups
    (images, noise, *_), more = step._inputs(group, group.images, 1)
    jitter = more["latent_noise"]
    output, half_size = step.vae(images, noise, latent_noise=jitter, half_size=True)
    pictures = group.images.float() / 127.5 - 1
    means = step.vae.likelihood.mean(output.params)
    dims, weight = 3 * SIZE[0] * SIZE[1], 0.5 * float(step.adversary.weight)
    assert weight > 0
    loss = loss_terms(output, config.objective, beta=1.0, half_size=half_size).loss_sum
    loss = loss + dims * step.losses.perceptual(means, pictures).sum()
    loss = loss - weight * dims * step.adversary.network(means).flatten(1).mean(1).sum()
    expected = torch.autograd.grad(loss / len(images), list(step.vae.parameters()))
    report = step(batch, 1)
    assert float(report.sums["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, _), value in zip(step.vae.named_parameters(), expected, strict=True):
        largest = value.abs().max()
        assert (found[name] - value).abs().max() <= 1e-4 * largest + 1e-4, name


def test_clipping_is_of_each_network_alone(runtime: Runtime) -> None:
    config = adversarial_config()
    free = gradients(config, runtime)
    norm = (
        torch.stack([g.square().sum() for n, g in free.items() if n.startswith("d/")]).sum() ** 0.5
    )
    config.adversarial.clip_grad_norm = float(norm) / 4
    clipped = gradients(config, runtime)
    for name, value in free.items():
        factor = 0.25 if name.startswith("d/") else 1.0
        torch.testing.assert_close(clipped[name], factor * value, rtol=1e-3, atol=1e-6)


# ---- what passes through the decoder beside the forward of a step ----


def some_steps(config: TrainConfig, runtime: Runtime, *, rehearsals: int = 0) -> list[float]:
    step = adversarial_step(config, runtime)
    for _ in range(rehearsals):
        assert memory._fits(step, 4, SIZE)
    found = []
    for number in range(4):
        report = step(picture_batch(runtime, number), number)
        found += [float(report.sums["train/loss"]), float(step.adversary.weight)]
    return found


@pytest.mark.parametrize("half_size", [0.0, 0.25])
def test_gradient_checkpointing_changes_nothing_with_a_discriminator(
    runtime: Runtime, half_size: float
) -> None:
    config = adversarial_config()
    config.training.microbatch_size = 2
    config.objective.scale_equivariance = half_size
    expected = some_steps(config, runtime)
    config.model.gradient_checkpointing = True
    assert some_steps(config, runtime) == pytest.approx(expected, rel=1e-5)


def test_a_trial_for_memory_runs_every_term_and_leaves_no_trace(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adversarial_config()
    config.training.microbatch_size = 4
    config.adversarial.warmup_steps = 0  # the first step is watched
    expected = some_steps(config, runtime)
    heard = []
    generator_loss = Adversary.generator_loss

    def hear(self: Adversary, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heard.append(len(inputs[0]))
        return generator_loss(self, *inputs)

    monkeypatch.setattr(Adversary, "generator_loss", hear)
    assert some_steps(config, runtime, rehearsals=1) == expected
    assert heard == [4] * 9


def test_structure_is_compared_in_exact_float32(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradient, whatever the rest of the step is computed in."""
    inside, seen = [False], []

    @contextmanager
    def exact(_: torch.device) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(losses, "exact_float32", exact)
    step = adversarial_step(bare(perceptual__kind="structure"), runtime)
    distance = step.losses.perceptual._distance

    def see(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        seen.append(inside[0])
        inputs[0].register_hook(lambda _: seen.append(inside[0]))

    distance.register_forward_hook(see)
    step(picture_batch(runtime, 0), 0)
    assert seen == [True, True]
