"""One optimizer step over ranks: gradients before clipping, agreement on what is not finite."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.distributed import run_ranks
from tests.support.steps import first_step
from vae_dist.config.schema import ObjectiveConfig, RuntimeConfig, TrainConfig
from vae_dist.data.loader import Batch, Group
from vae_dist.distributed import Runtime
from vae_dist.training.step import StepReport, TrainingStep

BATCH_SIZE, SLOTS = 16, 8


IWAE = ObjectiveConfig(
    importance_samples=4, gradient="doubly_reparameterized", free_bits=0.3, beta=0.7
)


def config(
    *,
    microbatch_size: int = 0,
    clip: float = 0.0,
    objective: ObjectiveConfig | None = None,
    precision: str = "no",
) -> TrainConfig:
    config = TrainConfig(objective=objective or ObjectiveConfig())
    config.data.channels, config.data.slots = 3, SLOTS
    config.model.channels, config.model.blocks = [8, 8], 1
    config.model.norm_groups, config.model.attention = 4, False
    config.training.batch_size = BATCH_SIZE
    config.training.microbatch_size = microbatch_size
    config.training.precision = precision
    config.optimizer.clip_grad_norm = clip
    return config


def training_step(config: TrainConfig, runtime: Runtime) -> TrainingStep:
    return TrainingStep(config, runtime, (8, 8))


def batch(runtime: Runtime, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (BATCH_SIZE, 3, 8, 8), generator=generator, dtype=torch.uint8)
    share = BATCH_SIZE // runtime.world
    part = slice(runtime.rank * share, (runtime.rank + 1) * share)
    slots = range(SLOTS)[runtime.rank * SLOTS // runtime.world :][: SLOTS // runtime.world]
    group = Group(tuple(slots), images[part], torch.zeros(share, dtype=torch.int64))
    return Batch(step, (group,), ("a.tar",), ())


SHAPES = ((8, 8), (8, 8), (4, 12), (8, 8), (8, 8), (8, 8), (8, 8), (8, 8))  # of each slot


def mixed_batch(runtime: Runtime, step: int) -> Batch:
    """Slots of two shapes; on two ranks the first has one group more than the second."""
    images = batch_of_one(step)
    mine = range(SLOTS)[runtime.rank * SLOTS // runtime.world :][: SLOTS // runtime.world]
    groups = []
    for shape in dict.fromkeys(SHAPES[slot] for slot in mine):
        slots = tuple(slot for slot in mine if SHAPES[slot] == shape)
        pixels = [images[2 * slot : 2 * slot + 2, :, : shape[0], : shape[1]] for slot in slots]
        labels = torch.zeros(2 * len(slots), dtype=torch.int64)
        groups.append(Group(slots, torch.cat(pixels), labels))
    return Batch(step, tuple(groups), ("a.tar",), ())


def batch_of_one(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(256, (BATCH_SIZE, 3, 8, 12), generator=generator, dtype=torch.uint8)


def gradients(
    microbatch_size: int,
    clip: float,
    make_batch: Callable[[Runtime, int], Batch] = batch,
    objective: ObjectiveConfig | None = None,
    precision: str = "no",
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients that the optimizer sees, the norm before clipping, the loss sum of this rank."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision=precision)
    step = training_step(
        config(
            microbatch_size=microbatch_size, clip=clip, objective=objective, precision=precision
        ),
        runtime,
    )
    seen, report = first_step(step, make_batch(runtime, 0))
    dims = sum(group.images.numel() for group in make_batch(runtime, 0).groups)
    assert int(report.sums["num_dims"]) == dims
    return seen, float(report.grad_norm), float(report.sums["train/loss"])


CASES = {"elbo": (batch, None), "iwae": (batch, IWAE), "two shapes": (mixed_batch, None)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "microbatch"), [(1, 2), (2, 0), (2, 2), (4, 4)])
def test_gradients_do_not_depend_on_ranks_or_microbatches(world, microbatch, case):
    make_batch, objective = CASES[case]
    ((expected, norm, loss),) = run_ranks(1, gradients, 0, 0.0, make_batch, objective)
    outcomes = run_ranks(world, gradients, microbatch, 0.0, make_batch, objective)
    for found, found_norm, _ in outcomes:
        assert found.keys() == expected.keys()
        for name in expected:
            scale = expected[name].abs().max()
            assert (found[name] - expected[name]).abs().max() <= 1e-4 * scale, name
        assert found_norm == pytest.approx(norm, rel=1e-4)
    assert sum(o[2] for o in outcomes) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_of_z_is_weighed_through_the_wrappers(world):
    """Autocast and DDP hand the objective the z of the graph, not a copy that leads nowhere."""
    name = "encoder.conv_out.bias"
    ((exact, _, _),) = run_ranks(1, gradients, 0, 0.0, batch, IWAE)
    plain = dataclasses.replace(IWAE, gradient="standard")
    ((standard, _, _),) = run_ranks(1, gradients, 0, 0.0, batch, plain)
    ((found, _, _), *_) = run_ranks(world, gradients, 0, 0.0, batch, IWAE, "bf16")
    scale = (standard[name] - exact[name]).abs().max()
    assert scale > 0
    assert (found[name] - exact[name]).abs().max() < 0.2 * scale


def test_clipping_scales_the_gradient_of_all_ranks():
    ((free, norm, _),) = run_ranks(1, gradients, 0, 0.0)
    for found, found_norm, _ in run_ranks(2, gradients, 0, norm / 4):
        assert found_norm == pytest.approx(norm, rel=1e-4)
        for name in free:
            torch.testing.assert_close(found[name], free[name] / 4, rtol=1e-3, atol=1e-3)


def poisoned_run(bad_rank: int, bad_step: int) -> tuple[list[float], list[torch.Tensor], int]:
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    step = training_step(config(), runtime)
    inputs = step._inputs

    def poisoned(group: Group, stored: torch.Tensor, number: int) -> Any:
        (images, noise, *others), more = inputs(group, stored, number)
        if number == bad_step and runtime.rank == bad_rank:
            noise = noise * float("nan")
        return (images, noise, *others), more

    step._inputs = poisoned
    flags, sums = [], []
    for number in range(4):
        report: StepReport = step(batch(runtime, number), number)
        flags.append(float(report.found_inf))
        sums.append(parameter_sum(step.vae))
    averages = parameter_sum(step.ema.module)
    assert torch.isfinite(averages)
    count = step.optimizer.state[next(step.vae.parameters())]["step"]
    return flags, sums, int(count)


def parameter_sum(module: nn.Module) -> torch.Tensor:
    return torch.stack([p.detach().double().abs().sum() for p in module.parameters()]).sum()


def test_a_nan_on_one_rank_means_that_nobody_updates():
    outcomes = run_ranks(2, poisoned_run, 1, 2)
    for flags, sums, count in outcomes:
        assert flags == [0, 0, 1, 0]
        assert sums[1] == sums[2] != sums[3] and sums[0] != sums[1]
        assert count == 3
    assert outcomes[0][1] == outcomes[1][1]  # ranks stay equal, bit for bit
