"""AdamW over a module's parameters, its learning rate, what becomes of gradients before it, its
state by name, and the average of the weights.

    lr(k) = lr * (k + 1) / warmup                              steps k < warmup, from 0
          = lr * (f + (1 - f) * (1 + cos(pi * t)) / 2)         after it, schedule=cosine

with t = (k + 1 - warmup) / (steps - warmup) and f = final_lr_fraction: the rate is lr at the end of
the warm-up and f * lr at the last step.

Fused on every device: the fused kernel takes `found_inf`, a device tensor that turns the update of
a non-finite gradient into nothing without a host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vae_dist.config.schema import OptimizerConfig
from vae_dist.distributed import full_value, load_full, local_part, part_like

SMALL = 2**14  # values of a gradient that is joined with others for their norm


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay acts on matrices and kernels; biases, norms and scales have none."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def lr_at(config: OptimizerConfig, num_steps: int, step: int) -> float:
    """Learning rate of step `step` of a run of `num_steps` steps; past its end, that of the last
    one."""
    done = step + 1
    if done < config.warmup_steps:
        return config.lr * done / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min((done - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 1.0)
    final = config.final_lr_fraction
    return config.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def freeze_encoder(vae: nn.Module) -> None:
    """Leave decoder and likelihood to be trained; the encoder reads the labels' embedding too."""
    for name, parameter in vae.named_parameters():
        is_trained = name.split(".")[0] in ("decoder", "post_quant_conv", "likelihood")
        parameter.requires_grad_(is_trained)


def scale_and_clip(parameters: Iterable[nn.Parameter], scale: Tensor, *, largest: float) -> Tensor:
    """Divide gradients by the `scale` of the loss and clip their norm to `largest` (0: not), in
    place. Returns the norm over all ranks before clipping, not finite where a gradient is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(gradients) / scale
    factor = (largest / (norm + 1e-6)).clamp(max=1.0) if largest else torch.ones_like(norm)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor / scale)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them, 0-dim; there is at least one."""
    if type(gradients[0]) is not Tensor or not gradients[0].is_cpu:
        # under FSDP the norm of DTensors, which is of all ranks' parts
        return full_value(torch.nn.utils.get_total_norm(gradients, foreach=True))
    # on a CPU the norm of a bias or of a small kernel costs more than to copy it
    parts = [gradient for gradient in gradients if gradient.numel() > SMALL]
    small = [gradient for gradient in gradients if gradient.numel() <= SMALL]
    if small:
        parts.append(torch._utils._flatten_dense_tensors(small))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))


def update(optimizer: torch.optim.Optimizer, lr: float, *, skip: Tensor) -> None:
    """One step; `skip` = 1 leaves weights and moments as they are. Gradients are gone after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "exp_avg/encoder.conv_in.weight" -> tensor. Empty before a step."""
    return {
        f"{kind}/{name}": value
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
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
    """Exponential moving average: ema <- ema + (1 - decay) (weights - ema), float32.

    The decay of step k is min(decay, (1 + k) / (10 + k)), so that the average follows early
    training; it is a function of the step, so that a resumed run averages as if never stopped.
    `replica`: a whole copy of the module, made before that was cut over ranks; it becomes the
    averaged one.
    """

    def __init__(self, module: nn.Module, replica: nn.Module, *, decay: float) -> None:
        self._module = replica.requires_grad_(False).eval()
        self.decay = decay
        self._sources = dict(module.named_parameters())
        whole = dict(replica.named_parameters())
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

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set the averages to full values."""
        load_full(self._module, tensors)
        for name, average in self.averages.items():
            local_part(average).copy_(local_part(part_like(tensors[name], average)))

    @torch.no_grad()
    def update(self, step: int, *, skip: Tensor) -> None:
        """After the update of step `step` (from 0); skip = 1 moves nothing."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local_part(average) for average in self.averages.values()]
        sources = [local_part(source).detach() for source in self._sources.values()]
        if skip.is_cpu:  # which can be asked without a wait
            if not skip:
                torch._foreach_lerp_(averages, sources, 1 - decay)  # one pass instead of three
            return
        difference = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(difference, (1 - decay) * (1 - skip))
        torch._foreach_add_(averages, difference)
