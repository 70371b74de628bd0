"""AdamW over a module's parameters, and its state by parameter name.

Fused on every device: the fused kernel takes `found_inf`, a device tensor that turns the update of
a non-finite gradient into nothing without a host synchronisation.
"""

from __future__ import annotations

import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.sharding import part_like


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay acts on matrices and kernels; biases, norms and scales have none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, torch.Tensor]:
    """The optimizer's state as "exp_avg/encoder.conv_in.weight" -> tensor. Empty before a step."""
    return {
        f"{kind}/{name}": value
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Inverse of `optimizer_tensors` for full values; each goes where its parameter is."""
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        if value.ndim:  # not Adam's count of steps, which is whole on every rank
            value = part_like(value, parameter)
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
