import copy
import math

import pytest
import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.training.optimizer import Ema, build_optimizer, lr_at, scale_and_clip


def test_only_kernels_decay():
    layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)
    optimizer = build_optimizer(nn.Sequential(*layers), OptimizerConfig(weight_decay=0.5))
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 4]


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
    for bad in range(len(gradients)):
        gradients = gradients_of_many_sizes()
        gradients[bad].view(-1)[-1] = torch.nan
        assert math.isnan(norm_of(gradients, 1.0, largest))


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
