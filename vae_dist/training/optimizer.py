"""AdamW over a module's parameters, what becomes of gradients before it, its state by name, and
the average of the weights.

Fused on every device: the fused kernel takes `found_inf`, a device tensor that turns the update of
a non-finite gradient into nothing without a host synchronisation.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.distributed import full_value, load_full, local_part, part_like

SMALL = 2**14  # values of a gradient that is joined with others for their norm


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


def freeze_encoder(vae: nn.Module) -> None:
    """Leave decoder and likelihood to be trained; the encoder reads the labels' embedding too."""
    for name, parameter in vae.named_parameters():
        is_trained = name.split(".")[0] in ("decoder", "post_quant_conv", "likelihood")
        parameter.requires_grad_(is_trained)


def scale_and_clip(
    gradients: list[torch.Tensor], scale: torch.Tensor, *, largest: float, is_scaled: bool
) -> torch.Tensor:
    """Divide gradients by the `scale` of an fp16 loss and clip their norm to `largest` (0: not), in
    place. Returns the norm over all ranks before clipping, not finite where a gradient is not."""
    norm = _total_norm(gradients) / scale
    if largest or is_scaled:
        factor = torch.ones_like(norm)
        if largest:
            factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        parts = [local_part(gradient) for gradient in gradients]
        torch._foreach_mul_(parts, factor / scale)
    return norm


def _total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all of them, 0-dim; there is at least one."""
    if type(gradients[0]) is not torch.Tensor or not gradients[0].is_cpu:
        # under FSDP the norm of DTensors, which is of all ranks' parts
        return full_value(torch.nn.utils.get_total_norm(gradients, foreach=True))
    # on a CPU the norm of a bias or of a small kernel costs more than to copy it
    parts = [gradient for gradient in gradients if gradient.numel() > SMALL]
    if len(parts) < len(gradients):
        small = [gradient for gradient in gradients if gradient.numel() <= SMALL]
        parts.append(torch._utils._flatten_dense_tensors(small))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))


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
        if not value.ndim:  # Adam's count of steps, which is whole on every rank
            optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
            continue
        # in the parameter's own memory layout, which the fused update takes for granted
        state = torch.empty_like(parameter, dtype=value.dtype)
        with torch.no_grad():
            state.copy_(part_like(value, parameter))
        optimizer.state[parameter][kind] = state


class Ema:
    """Exponential moving average: ema <- ema + (1 - decay) (weights - ema). Holds an averaged copy
    of a module, float32, on the module's device.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the average follows early
    training; it is a function of the step, so that a resumed run averages as if never stopped.
    `replica` is a whole module of the same weights, needed where `module` is cut over ranks.
    """

    def __init__(
        self, module: nn.Module, *, decay: float, replica: nn.Module | None = None
    ) -> None:
        self._module = copy.deepcopy(module) if replica is None else replica
        self._module.requires_grad_(False).eval()
        self.decay = decay
        self._sources = dict(module.named_parameters())
        whole = dict(self._module.named_parameters())
        # where the sources are cut, so are the averages; else they are the copy's own weights
        self.averages = {
            name: part_like(whole[name].detach(), source) for name, source in self._sources.items()
        }

    @property
    def module(self) -> nn.Module:
        """The averaged model, whole, for evaluation. Every rank takes part."""
        for name, parameter in self._module.named_parameters():
            average = self.averages[name]
            if local_part(average).data_ptr() != parameter.data_ptr():
                parameter.copy_(full_value(average))
        return self._module

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the averages to full values."""
        load_full(self._module, tensors)
        for name, average in self.averages.items():
            local_part(average).copy_(local_part(part_like(tensors[name], average)))

    @torch.no_grad()
    def update(self, step: int, *, found_inf: torch.Tensor) -> None:
        """After the update of step `step` (from 0); found_inf = 1 moves nothing."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local_part(average) for average in self.averages.values()]
        sources = [local_part(source).detach() for source in self._sources.values()]
        if found_inf.device.type == "cpu":  # which can be asked without a wait
            if not found_inf:
                torch._foreach_lerp_(averages, sources, 1 - decay)  # one pass instead of three
            return
        difference = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(difference, (1 - decay) * (1 - found_inf))
        torch._foreach_add_(averages, difference)
