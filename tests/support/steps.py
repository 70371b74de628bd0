"""Training steps without data, folder and loop: small models, batches of random images."""

import torch

from vae_dist.config.schema import ObjectiveConfig, RuntimeConfig, TrainConfig
from vae_dist.data.loader import Batch, Group
from vae_dist.distributed import Runtime
from vae_dist.training.compile import compile_towers
from vae_dist.training.step import TrainingStep

IWAE = ObjectiveConfig(
    importance_samples=4, gradient="doubly_reparameterized", free_bits=0.3, beta=0.7
)


def config(*, adversarial=False, microbatch_size=0, objective=None, precision="no"):
    """adversarial: with every term that is added to the bound, a discriminator from step 0, heard
    from step 1."""
    made = TrainConfig(objective=objective or ObjectiveConfig())
    made.data.channels, made.data.slots = 3, 8
    made.model.channels, made.model.blocks = [8, 8], 1
    made.model.norm_groups, made.model.attention = 4, False
    made.training.batch_size, made.training.microbatch_size = 16, microbatch_size
    made.training.precision = precision
    if not adversarial:
        return made
    made.data.slots, made.training.batch_size = 4, 8
    made.model.channels = [8, 16]
    made.likelihood.kind = "gaussian"  # smooth: a rounding turns no sign of an absolute error
    made.optimizer.warmup_steps = 0
    made.perceptual.kind = "structure"
    own = made.adversarial
    own.weight, own.warmup_steps, own.ramp_steps, own.channels, own.layers = 0.5, 1, 2, 8, 2
    made.objective.scale_equivariance, made.objective.latent_noise = 0.25, 0.1
    return made


def one_process(settings=None, parallel="ddp"):
    precision = settings.training.precision if settings else "no"
    return Runtime.start(RuntimeConfig(threads=1, parallel=parallel), precision=precision)


def make_step(settings, runtime=None, size=None, parallel="ddp"):
    """Its weights come from the config's seed. Compiled where runtime.compile says so."""
    size = size or ((24, 32) if settings.objective.scale_equivariance else (8, 8))
    step = TrainingStep(settings, runtime or one_process(settings, parallel), size)
    compile_towers(step.vae, settings)
    step.size = size
    return step


def batch(step, number, other=None):
    """This rank's share of a batch: two smooth random pictures a slot. `other`: (H, W) of those of
    slot 1, so that of two ranks the first one has a group more."""
    runtime, sizes = step.runtime, [step.size] * step.config.data.slots
    sizes[1] = other or step.size
    share, groups = len(sizes) // runtime.world, {}
    for slot in range(runtime.rank * share, (runtime.rank + 1) * share):
        height, width = sizes[slot]
        generator = torch.Generator().manual_seed(1000 * number + slot)
        coarse = 255 * torch.rand(2, 3, height // 4, width // 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, size=(height, width)).to(torch.uint8)
        groups.setdefault(sizes[slot], {})[slot] = images
    parts = []
    for by_slot in groups.values():
        images = torch.cat([*by_slot.values()])
        parts.append(Group(tuple(by_slot), images, torch.zeros(len(images), dtype=torch.int64)))
    return Batch(number, tuple(parts), ("a.tar",), ())


def kept_gradients(network, optimizer):
    """Those of the optimizer's next step by name, once it is done."""
    found = {}

    def keep(*_):
        if not found:
            gradients = {name: p.grad for name, p in network.named_parameters()}
            found.update({name: g.clone() for name, g in gradients.items() if g is not None})

    optimizer.register_step_pre_hook(keep)
    return found


def first_step(step, batch):
    """The gradients that it leaves to the optimizer, and its report."""
    return kept_gradients(step.vae, step.optimizer), step(batch, 0)


def wrong_gradients(found, expected, *, rounding):
    """Names of those that differ by more than this part of their norm; below a thousandth of the
    largest norm gradients are rounding themselves."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = 1e-3 * max(norms.values())
    errors = {name: float((found.get(name, 0.0) - g).norm()) for name, g in expected.items()}
    return [name for name in norms if errors[name] > rounding * max(norms[name], least)]
