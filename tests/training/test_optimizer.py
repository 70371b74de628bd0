import copy

import pytest
import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.training.optimizer import (
    Ema,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    scale_and_clip,
)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, flag: float = 0) -> None:
    torch.manual_seed(seed)
    model(torch.randn(5, 1, 4, 4)).square().sum().backward()
    optimizer.found_inf = torch.tensor(float(flag))
    optimizer.step()
    optimizer.zero_grad()


def test_only_kernels_decay():
    model = module()
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 4]


def test_restored_state_continues_bit_for_bit():
    model = module()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    train(model, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    other = module()
    other.load_state_dict(model.state_dict())
    restored = build_optimizer(other, OptimizerConfig(lr=0.1))
    load_optimizer_tensors(restored, other, saved)
    assert "exp_avg/0.weight" in saved and "step/3.bias" in saved
    for seed in (2, 3):
        train(model, optimizer, seed)
        train(other, restored, seed)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_found_inf_skips_the_update_and_its_count():
    model = module()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    count = optimizer_tensors(optimizer, model)["step/0.weight"].clone()
    train(model, optimizer, 2, flag=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer_tensors(optimizer, model)["step/0.weight"] == count == 1


def gradients_of_many_sizes() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((3,), (200, 150), (1,), (8, 4, 3, 3), (130, 130), ())
    return [10.0**k * torch.randn(shape) for k, shape in enumerate(shapes, -3)]


def with_gradients(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


@pytest.mark.parametrize("largest", [0.0, 2.0, 1e6])
def test_the_norm_is_of_all_gradients_together(largest: float):
    gradients = gradients_of_many_sizes()
    before = [gradient.double() for gradient in gradients]
    expected = sum(float(gradient.square().sum()) for gradient in before) ** 0.5 / 4
    norm = scale_and_clip(with_gradients(gradients), torch.tensor(4.0), largest=largest)
    assert abs(float(norm) - expected) < 1e-5 * expected
    factor = min(1.0, largest / expected) / 4 if largest else 1 / 4
    for gradient, value in zip(gradients, before, strict=True):
        assert torch.allclose(gradient.double(), factor * value, rtol=1e-5)


@pytest.mark.parametrize("place", range(6))
def test_a_gradient_of_any_size_that_is_not_finite_shows_in_the_norm(place: int):
    gradients = gradients_of_many_sizes()
    gradients[place].view(-1)[-1] = torch.nan
    norm = scale_and_clip(with_gradients(gradients), torch.tensor(1.0), largest=0.0)
    assert not torch.isfinite(norm)


def test_the_average_follows_its_recurrence():
    layer = nn.Linear(3, 2)
    ema = Ema(layer, copy.deepcopy(layer), decay=0.9)
    expected = layer.weight.detach().double().clone()
    for step in range(50):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update(step, skip=torch.tensor(0.0))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(ema.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_moves_nothing():
    layer = nn.Linear(3, 2)
    ema = Ema(layer, copy.deepcopy(layer), decay=0.9)
    before = ema.module.weight.clone()
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(3, skip=torch.tensor(1.0))
    assert torch.equal(ema.module.weight, before)
    assert not any(p.requires_grad for p in ema.module.parameters())
