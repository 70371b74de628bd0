"""A step with every term that is added to the bound, of networks that are small."""

import torch

from tests.support.steps import batch_of, make_step
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.distributed import Runtime

BATCH_SIZE, SLOTS = 8, 4
SIZE = (24, 32)


def adversarial_config():
    """Discriminator from step 0, decoder from step 1."""
    config = TrainConfig()
    config.data.slots = SLOTS
    config.training.batch_size, config.training.precision = BATCH_SIZE, "no"
    config.model.channels, config.model.blocks = [8, 16], 1
    config.model.norm_groups, config.model.attention = 4, False
    config.likelihood.kind = "gaussian"  # smooth: a rounding turns no sign of an absolute error
    config.optimizer.warmup_steps = 0
    config.perceptual.kind = "structure"
    adversarial = config.adversarial
    adversarial.weight, adversarial.warmup_steps, adversarial.ramp_steps = 0.5, 1, 2
    adversarial.channels, adversarial.layers = 8, 2
    config.objective.scale_equivariance, config.objective.latent_noise = 0.25, 0.1
    return config


def start(precision="no", parallel="ddp"):
    return Runtime.start(RuntimeConfig(threads=1, parallel=parallel), precision=precision)


def adversarial_step(config, runtime):
    return make_step(config, runtime, SIZE)


def picture_batch(runtime, step, *, mixed=False):
    """This rank's share of smooth random pictures; `mixed`: the second slot has another shape."""

    def draw(slot, size):
        generator = torch.Generator().manual_seed(1000 * step + slot)
        shape = (BATCH_SIZE // SLOTS, 3, size[0] // 4, size[1] // 4)
        coarse = 255 * torch.rand(shape, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=size).to(torch.uint8)

    return batch_of(runtime, step, [SIZE, (32, 24) if mixed else SIZE, SIZE, SIZE], draw)
