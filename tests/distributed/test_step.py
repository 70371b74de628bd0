"""One optimizer step over ranks: gradients before clipping, agreement on what is not finite."""

import pytest
import torch
from torch import nn

from tests.support.distributed import run_ranks
from vae_dist.config.schema import RuntimeConfig, TrainConfig
from vae_dist.data.stream import Batch
from vae_dist.models.build import build_vae
from vae_dist.runtime import Runtime
from vae_dist.training.ema import Ema
from vae_dist.training.optimizer import build_optimizer
from vae_dist.training.step import StepReport, TrainingStep

BATCH_SIZE, SLOTS = 16, 8


def config(*, microbatch_size: int = 0, clip: float = 0.0) -> TrainConfig:
    config = TrainConfig()
    config.data.channels, config.data.slots = 3, SLOTS
    config.model.channels, config.model.blocks = [8, 8], 1
    config.model.norm_groups, config.model.attention = 4, False
    config.training.batch_size = BATCH_SIZE
    config.training.microbatch_size = microbatch_size
    config.training.precision = "no"
    config.optimizer.clip_grad_norm = clip
    return config


def training_step(config: TrainConfig, runtime: Runtime) -> TrainingStep:
    vae = build_vae(config, (8, 8))
    return TrainingStep(
        config,
        runtime,
        wrapped=runtime.prepare(vae),
        vae=vae,
        optimizer=build_optimizer(vae, config.optimizer),
        ema=Ema(vae, decay=0.9),
    )


def batch(runtime: Runtime, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (BATCH_SIZE, 3, 8, 8), generator=generator, dtype=torch.uint8)
    share = BATCH_SIZE // runtime.world
    part = slice(runtime.rank * share, (runtime.rank + 1) * share)
    return Batch(step, images[part], torch.zeros(share, dtype=torch.int64), ("a.tar",), ())


def gradients(microbatch_size: int, clip: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients that the optimizer sees, the norm before clipping, the loss sum of this rank."""
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    step = training_step(config(microbatch_size=microbatch_size, clip=clip), runtime)
    seen: dict[str, torch.Tensor] = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            {name: p.grad.clone() for name, p in step.vae.named_parameters() if p.grad is not None}
        )
    )
    report = step(batch(runtime, 0), 0)
    return seen, float(report.grad_norm), float(report.loss_sum)


@pytest.mark.parametrize(("world", "microbatch"), [(1, 2), (2, 0), (2, 2), (2, 4)])
def test_gradients_do_not_depend_on_ranks_or_microbatches(world, microbatch):
    ((expected, norm, loss),) = run_ranks(1, gradients, 0, 0.0)
    outcomes = run_ranks(world, gradients, microbatch, 0.0)
    for found, found_norm, _ in outcomes:
        assert found.keys() == expected.keys()
        for name in expected:
            scale = expected[name].abs().max()
            assert (found[name] - expected[name]).abs().max() <= 1e-4 * scale, name
        assert found_norm == pytest.approx(norm, rel=1e-4)
    assert sum(o[2] for o in outcomes) == pytest.approx(loss, rel=1e-5)


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

    def poisoned(batch: Batch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, noise = inputs(batch, number)
        if number == bad_step and runtime.rank == bad_rank:
            noise = noise * float("nan")
        return images, noise

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
