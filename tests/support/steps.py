"""A step put together as vae_dist.training.build does it, without data, folder and loop."""

from __future__ import annotations

import copy

from torch import nn

from vae_dist.config.schema import TrainConfig
from vae_dist.distributed import Runtime
from vae_dist.models.build import build_vae
from vae_dist.training.build import build_picture_terms
from vae_dist.training.compile import compile_towers, lay_out, num_shapes, use_tensor_float_32
from vae_dist.training.optimizer import Ema, build_optimizer, freeze_encoder
from vae_dist.training.step import TrainingStep


def make_step(
    settings: TrainConfig,
    runtime: Runtime,
    size: tuple[int, int],
    *,
    compiled: bool = False,
    parts: type[nn.Module] | None = None,
) -> TrainingStep:
    """`size`: (H, W) of its images, pixels; its weights come from the config's seed. `parts`: what
    is compiled by itself."""
    vae = build_vae(settings, size).to(runtime.device)
    if settings.training.train_only == "decoder":
        freeze_encoder(vae)
    use_tensor_float_32(runtime.device, settings.training.precision)
    lay_out(vae, settings)
    replica = copy.deepcopy(vae)
    if compiled:
        compile_towers(vae, num_shapes=num_shapes(settings, num_buckets=0), parts=parts)
    return TrainingStep(
        settings,
        runtime,
        wrapped=runtime.strategy.wrap(vae),
        vae=vae,
        optimizer=build_optimizer(vae, settings.optimizer),
        ema=Ema(vae, decay=0.9, replica=replica),
        pictures=build_picture_terms(settings, runtime, vae),
    )
