"""A step put together as vae_dist.training.build does it, without data, folder and loop."""

from __future__ import annotations

import copy

import torch

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_vae
from vae_dist.training.build import build_reconstruction_losses
from vae_dist.training.compile import compile_towers, lay_out, num_shapes, use_tensor_float_32
from vae_dist.training.optimizer import Ema, build_optimizer, freeze_encoder
from vae_dist.training.step import TrainingStep


def make_step(settings: TrainConfig, runtime: Runtime, size: tuple[int, int]) -> TrainingStep:
    """`size`: (H, W) of its images, pixels; its weights come from the config's seed. Compiled where
    runtime.compile says so."""
    vae = build_vae(settings, size).to(runtime.device)
    if settings.training.train_only == "decoder":
        freeze_encoder(vae)
    use_tensor_float_32(runtime.device, settings.training.precision)
    lay_out(vae, settings)
    replica = copy.deepcopy(vae)
    step = TrainingStep(
        settings,
        runtime,
        wrapped=runtime.strategy.wrap(vae),
        vae=vae,
        optimizer=build_optimizer(vae, settings.optimizer),
        ema=Ema(vae, decay=0.9, replica=replica),
        losses=build_reconstruction_losses(settings, runtime, vae),
    )
    shapes = num_shapes(settings, num_buckets=0, microbatch_size=step.microbatch_size)
    compile_towers(vae, settings, num_shapes=shapes)
    return step


def gradients(step: TrainingStep, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the weights, as the first step leaves them to the optimizer."""
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in step.vae.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    handle = step.optimizer.register_step_pre_hook(keep)
    step(batch, 0)
    handle.remove()
    return found


def wrong_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, rounding: float
) -> list[str]:
    """Names of those that differ by more than this part of their norm; below a thousandth of the
    largest norm gradients are rounding themselves."""
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return [
        name
        for name, gradient in expected.items()
        if float((found.get(name, 0.0) - gradient).norm())
        > rounding * max(float(gradient.norm()), 1e-3 * largest)
    ]
