import copy
import math

import pytest
import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.training.optimizer import (
    Ema,
    build_optimizer,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    scale_and_clip,
    update,
)


def made(**options):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)
    model = nn.Sequential(*layers)
    return model, build_optimizer(model, OptimizerConfig(lr=0.1, **options))


def train(model, optimizer, seed, skip=0.0):
    torch.manual_seed(seed)
    model(torch.randn(5, 1, 4, 4)).square().sum().backward()
    update(optimizer, 0.1, skip=torch.tensor(skip))


def test_only_kernels_decay():
    groups = made(weight_decay=0.5)[1].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 4]


def test_restored_state_continues_bit_for_bit_and_a_skipped_step_leaves_all():
    (model, optimizer), (other, restored) = made(), made()
    train(model, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    assert "exp_avg/0.weight" in saved and "step/3.bias" in saved
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(restored, other, saved)
    for seed in (2, 3):
        train(model, optimizer, seed)
        train(other, restored, seed - 100, skip=1.0)
        train(other, restored, seed)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert optimizer_tensors(restored, other)["step/0.weight"] == 3


def gradients_of_many_sizes():
    torch.manual_seed(0)
    shapes = ((3,), (200, 150), (1,), (8, 4, 3, 3), (130, 130), ())
    return [10.0**k * torch.randn(shape) for k, shape in enumerate(shapes, -3)]


def norm_of(gradients, scale, largest):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return float(scale_and_clip(parameters, torch.tensor(scale), largest=largest))


@pytest.mark.parametrize("largest", [0.0, 2.0, 1e6])
def test_the_norm_is_of_all_gradients_together(largest):
    gradients = gradients_of_many_sizes()
    before = [gradient.double() for gradient in gradients]
    expected = sum(float(gradient.square().sum()) for gradient in before) ** 0.5 / 4
    assert norm_of(gradients, 4.0, largest) == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, largest / expected) / 4 if largest else 1 / 4
    for gradient, value in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient.double(), factor * value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("place", range(6))
def test_a_gradient_of_any_size_that_is_not_finite_shows_in_the_norm(place):
    gradients = gradients_of_many_sizes()
    gradients[place].view(-1)[-1] = torch.nan
    norm = norm_of(gradients, 1.0, 0.0)
    assert norm != norm


def test_the_average_follows_its_recurrence_and_a_skipped_step_moves_nothing():
    layer = nn.Linear(3, 2)
    ema = Ema(layer, copy.deepcopy(layer), decay=0.9)
    expected = layer.weight.detach().double().clone()
    for step in range(50):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        skip = float(step % 5 == 4)
        ema.update(step, skip=torch.tensor(skip))
        decay = 1.0 if skip else min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(ema.module.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_rate_rises_linearly_and_stays_or_falls_as_a_cosine(final):
    config = OptimizerConfig(lr=0.01, warmup_steps=100, final_lr_fraction=final)
    rates = [lr_at(config, 1000, step) for step in range(1000)]
    assert rates[:100] == pytest.approx([0.0001 * (step + 1) for step in range(100)])
    assert rates[99] == 0.01 and rates[99:] == sorted(rates[99:], reverse=True)
    for step, fraction in ((324, 0.25), (549, 0.5), (999, 1.0), (1050, 1.0)):
        fall = 0.5 * (1 + math.cos(math.pi * fraction))
        expected = 0.01 * (final + (1 - final) * fall)
        assert lr_at(config, 1000, step) == pytest.approx(expected, abs=1e-12)
    config.schedule = "constant"
    assert [lr_at(config, 1000, step) for step in (49, 99, 500, 5000)] == [0.005] + [0.01] * 3
    for warmup, steps in ((0, 1), (1, 1), (5, 5)):
        config = OptimizerConfig(lr=0.01, warmup_steps=warmup, final_lr_fraction=final)
        assert all(0 <= lr_at(config, steps, step) <= 0.01 for step in range(steps))
