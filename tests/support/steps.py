"""A training step without data, folder and loop, and its gradients."""

from __future__ import annotations

import torch

from vae_dist.config.schema import TrainConfig
from vae_dist.data.loader import Batch
from vae_dist.distributed import Runtime
from vae_dist.training.compile import compile_towers
from vae_dist.training.step import StepReport, TrainingStep


def make_step(settings: TrainConfig, runtime: Runtime, size: tuple[int, int]) -> TrainingStep:
    """`size`: (H, W) of its images, pixels; its weights come from the config's seed. Compiled where
    runtime.compile says so."""
    step = TrainingStep(settings, runtime, size)
    compile_towers(step.vae, settings, max_shapes=8)
    return step


def first_step(step: TrainingStep, batch: Batch) -> tuple[dict[str, torch.Tensor], StepReport]:
    """The gradients that it leaves to the optimizer, and its report."""
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in step.vae.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    handle = step.optimizer.register_step_pre_hook(keep)
    report = step(batch, 0)
    handle.remove()
    return found, report


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
