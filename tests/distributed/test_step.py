"""Steps over ranks equal those of one process, however batch and weights are cut."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed.fsdp  # a second that the forked ranks need not spend each

from tests.support import adversarial
from tests.support.distributed import run_ranks
from tests.support.steps import IWAE, SIZE, batch, config, first_step, poison
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime, full_value, local_part
from vae_dist.training.step import TrainingStep

assert torch.distributed.fsdp
STEPS, SLOW = 4, pytest.mark.slow


class Outcome(NamedTuple):
    rows: list  # of each step, means over all ranks by name
    gradients: dict  # of the first step, as the optimizer sees them
    weights: dict  # this rank's after the last step, whole
    held: float  # part of the elements that this rank holds


def start(parallel="ddp", precision="no"):
    return Runtime.start(RuntimeConfig(threads=1, parallel=parallel), precision=precision)


def settings_of(kind):
    if kind.startswith(("adversarial", "decoder")):
        made = adversarial.adversarial_config()
        made.training.train_only = "decoder" if kind == "decoder alone" else "all"
        return made
    made = config(objective=IWAE if kind == "importance-weighted" else None)
    made.optimizer.clip_grad_norm = 500.0 if kind == "clipped" else 0.0
    return made


def steps(kind, microbatch, parallel="ddp"):
    runtime, settings = start(parallel), settings_of(kind)
    settings.training.microbatch_size = microbatch
    is_adversarial, mixed = bool(settings.adversarial.weight), kind.endswith("two shapes")
    step = TrainingStep(settings, runtime, adversarial.SIZE if is_adversarial else SIZE)
    make = adversarial.picture_batch if is_adversarial else batch
    gradients, report = first_step(step, make(runtime, 0, mixed=mixed))
    gradients, rows = {name: full_value(value) for name, value in gradients.items()}, []
    for number in range(STEPS):
        if number:
            report = step(make(runtime, number, mixed=mixed), number)
        totals = runtime.sum_numbers(list(report.sums.values()))
        shared = {k: float(v) for k, v in report.shared.items()}
        rows.append({**dict(zip(report.sums, totals, strict=True)), **shared})
        rows[-1]["grad_norm"] = float(report.grad_norm)
    found = step.weights_of_every_rank()
    sizes = [(local_part(p).numel(), p.numel()) for p in step.vae.parameters()]
    held = sum(mine for mine, _ in sizes) / sum(whole for _, whole in sizes)
    whole = {name: full_value(value.detach()).clone() for name, value in found.items()}
    return Outcome(rows, gradients, whole, held)


@functools.cache
def alone(kind):
    return run_ranks(1, steps, kind, 0)[0]


@pytest.mark.parametrize(
    ("kind", "world", "microbatch", "parallel"),
    [
        pytest.param("bound", 4, 4, "ddp", marks=SLOW),
        ("clipped", 2, 2, "ddp"),
        ("importance-weighted", 2, 2, "ddp"),
        ("two shapes", 2, 2, "ddp"),
        ("adversarial", 2, 0, "ddp"),
        ("adversarial, two shapes", 2, 2, "ddp"),
        ("decoder alone", 2, 2, "ddp"),
        ("clipped", 2, 2, "fsdp"),
        ("adversarial", 2, 2, "fsdp"),
        pytest.param("importance-weighted", 2, 2, "fsdp", marks=SLOW),
        pytest.param("decoder alone", 2, 2, "fsdp", marks=SLOW),
    ],
)
def test_ranks_microbatches_and_sharding_change_steps_by_rounding(
    kind, world, microbatch, parallel
):
    expected = alone(kind)
    outcomes = run_ranks(world, steps, kind, microbatch, parallel)
    for found in outcomes:
        for number, (row, theirs) in enumerate(zip(found.rows, expected.rows, strict=True)):
            assert row == pytest.approx(theirs, rel=1e-5), number
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = (found.gradients[name] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max(), name
        assert found.weights.keys() == expected.weights.keys()
        for name, value in outcomes[0].weights.items():
            assert torch.equal(found.weights[name], value), name
            is_frozen = kind == "decoder alone" and name.removeprefix("ema/").startswith("encoder.")
            assert not is_frozen or torch.equal(value, expected.weights[name]), name
        assert 0.4 < found.held < 0.6 if parallel == "fsdp" else found.held == 1
    if "adversarial" in kind:
        assert expected.rows[-1]["optim/adversarial_weight"] > 0


def weighed(kind, precision):
    runtime, settings = start(precision=precision), config(objective=IWAE, precision=precision)
    settings.objective.gradient = kind
    gradients, _ = first_step(TrainingStep(settings, runtime, SIZE), batch(runtime, 0))
    return gradients["encoder.conv_out.bias"]


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_of_z_is_weighed_through_the_wrappers(world):
    """Autocast and DDP hand the objective the z of the graph, not a copy that leads nowhere."""
    (exact,) = run_ranks(1, weighed, "doubly_reparameterized", "no")
    (standard,) = run_ranks(1, weighed, "standard", "no")
    found = run_ranks(world, weighed, "doubly_reparameterized", "bf16")[0]
    scale = (standard - exact).abs().max()
    assert scale > 0 and (found - exact).abs().max() < 0.2 * scale


def poisoned(bad, parallel):
    """Flags of four steps, of which the last rank's gradient is bad in the third; whether each step
    changed any weight; the optimizer's count."""
    runtime = start(parallel)
    step = adversarial.adversarial_step(adversarial.adversarial_config(), runtime)
    if runtime.rank == runtime.world - 1:
        poison(step, 2, discriminator=bad == "discriminator")
    flags, changed = [], []
    for number in range(4):
        before = {k: v.detach().clone() for k, v in step.weights_of_every_rank().items()}
        report = step(adversarial.picture_batch(runtime, number), number)
        after = step.weights_of_every_rank()
        flags.append(float(report.found_inf))
        changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    count = step.optimizer.state[step.vae.decoder.conv_out.weight]["step"]
    return flags, changed, float(count)


@pytest.mark.parametrize(
    ("bad", "parallel"),
    [("vae", "ddp"), ("discriminator", "ddp"), pytest.param("vae", "fsdp", marks=SLOW)],
)
def test_a_nan_of_either_network_on_one_rank_means_that_nobody_updates(bad, parallel):
    for found in run_ranks(2, poisoned, bad, parallel):
        assert found == ([0, 0, 1, 0], [True, True, False, True], 3.0)
