"""Training steps without data, folder and loop: small models, batches of random images."""

import torch

from vae_dist.config.schema import ObjectiveConfig, RuntimeConfig, TrainConfig
from vae_dist.data.loader import Batch, Group
from vae_dist.distributed import Runtime
from vae_dist.training.compile import compile_towers
from vae_dist.training.step import TrainingStep

BATCH_SIZE, SLOTS, SIZE = 16, 8, (8, 8)
IWAE = ObjectiveConfig(
    importance_samples=4, gradient="doubly_reparameterized", free_bits=0.3, beta=0.7
)
SHAPES = ((8, 8), (8, 8), (4, 12), *((8, 8),) * 5)  # of each slot of a mixed batch


def config(*, microbatch_size=0, objective=None, precision="no"):
    made = TrainConfig(objective=objective or ObjectiveConfig())
    made.data.channels, made.data.slots = 3, SLOTS
    made.model.channels, made.model.blocks = [8, 8], 1
    made.model.norm_groups, made.model.attention = 4, False
    made.training.batch_size, made.training.microbatch_size = BATCH_SIZE, microbatch_size
    made.training.precision = precision
    return made


def one_process(precision="no"):
    return Runtime.start(RuntimeConfig(threads=1), precision=precision)


def make_step(settings, runtime, size):
    """`size`: (H, W) of its images, pixels; its weights come from the config's seed. Compiled where
    runtime.compile says so."""
    step = TrainingStep(settings, runtime, size)
    compile_towers(step.vae, settings)
    return step


def batch(runtime, step, *, mixed=False):
    """This rank's share of a step; `mixed`: slots of two shapes, so that on two ranks the first has
    one group more than the second."""
    generator = torch.Generator().manual_seed(step)
    width = 12 if mixed else 8
    images = torch.randint(256, (BATCH_SIZE, 3, 8, width), generator=generator, dtype=torch.uint8)
    shapes = SHAPES if mixed else [SIZE] * SLOTS
    return batch_of(
        runtime, step, shapes, lambda k, size: images[2 * k : 2 * k + 2, :, : size[0], : size[1]]
    )


def batch_of(runtime, step, shapes, draw):
    """This rank's share of slots of these (H, W); `draw(slot, size)` gives a slot's images."""
    share, groups = len(shapes) // runtime.world, {}
    for slot in range(runtime.rank * share, (runtime.rank + 1) * share):
        groups.setdefault(shapes[slot], []).append(slot)
    parts = []
    for size, slots in groups.items():
        images = torch.cat([draw(slot, size) for slot in slots])
        parts.append(Group(tuple(slots), images, torch.zeros(len(images), dtype=torch.int64)))
    return Batch(step, tuple(parts), ("a.tar",), ())


def first_step(step, batch):
    """The gradients that it leaves to the optimizer, and its report."""
    found = {}

    def keep(*_):
        for name, parameter in step.vae.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    handle = step.optimizer.register_step_pre_hook(keep)
    report = step(batch, 0)
    handle.remove()
    return found, report


def wrong_gradients(found, expected, *, rounding):
    """Names of those that differ by more than this part of their norm; below a thousandth of the
    largest norm gradients are rounding themselves."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = 1e-3 * max(norms.values())
    errors = {name: float((found.get(name, 0.0) - g).norm()) for name, g in expected.items()}
    return [name for name in norms if errors[name] > rounding * max(norms[name], least)]


def poison(step, at, *, discriminator=False):
    """A gradient of step `at` of this rank is not finite: of the VAE, or of the discriminator."""
    drawn, number = step._drawn, -1

    def poisoned(purpose, group, step_number, *args, **kwargs):
        nonlocal number
        number = step_number
        noise = drawn(purpose, group, step_number, *args, **kwargs)
        is_bad = purpose == "posterior" and number == at and not discriminator
        return noise * float("nan") if is_bad else noise

    step._drawn = poisoned
    if discriminator:
        assert step.adversary is not None
        step.adversary.network.conv_out.register_full_backward_hook(
            lambda _, gradients, __: tuple(
                g * float("nan") if number == at and g is not None else g for g in gradients
            )
        )
