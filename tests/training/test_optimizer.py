import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
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
