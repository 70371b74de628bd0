"""Steps over ranks equal those of one process, however batch and weights are cut."""

import functools

import pytest
import torch
import torch.distributed.fsdp  # a second that the forked ranks need not spend each

from tests.support.distributed import run_ranks
from tests.support.steps import IWAE, batch, config, first_step, make_step
from vae_dist.distributed import full_value, local_part

assert torch.distributed.fsdp
STEPS, SLOW = 4, pytest.mark.slow


def steps(kind, microbatch, parallel="ddp"):
    """Rows of the steps, means over all ranks by name; gradients of the first one, as the optimizer
    sees them; weights after the last one, whole; the part of the elements that this rank holds."""
    settings = config(
        adversarial=kind.startswith(("adversarial", "decoder")),
        microbatch_size=microbatch,
        objective=IWAE if kind == "importance-weighted" else None,
    )
    settings.training.train_only = "decoder" if kind == "decoder alone" else "all"
    settings.optimizer.clip_grad_norm = 500.0 if kind == "clipped" else 0.0
    step, other = make_step(settings, parallel=parallel), None
    if kind.endswith("two shapes"):
        other = (32, 24) if settings.adversarial.weight else (4, 12)
    gradients, report = first_step(step, batch(step, 0, other))
    gradients, rows = {name: full_value(value) for name, value in gradients.items()}, []
    for number in range(STEPS):
        if number:
            report = step(batch(step, number, other), number)
        totals = step.runtime.sum_numbers(list(report.sums.values()))
        shared = {k: float(v) for k, v in report.shared.items()}
        rows.append({**dict(zip(report.sums, totals, strict=True)), **shared})
        rows[-1]["grad_norm"] = float(report.grad_norm)
    found = step.weights_of_every_rank()
    sizes = [(local_part(p).numel(), p.numel()) for p in step.vae.parameters()]
    held = sum(mine for mine, _ in sizes) / sum(whole for _, whole in sizes)
    whole = {name: full_value(value.detach()).clone() for name, value in found.items()}
    return rows, gradients, whole, held


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
    expected_rows, expected_gradients, expected_weights, _ = alone(kind)
    outcomes = run_ranks(world, steps, kind, microbatch, parallel)
    for rows, gradients, weights, held in outcomes:
        for number, (row, expected) in enumerate(zip(rows, expected_rows, strict=True)):
            assert row == pytest.approx(expected, rel=1e-5), number
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            error = (gradients[name] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max(), name
        assert weights.keys() == expected_weights.keys()
        for name, value in outcomes[0][2].items():
            assert torch.equal(weights[name], value), name
            is_frozen = kind == "decoder alone" and name.removeprefix("ema/").startswith("encoder.")
            assert not is_frozen or torch.equal(value, expected_weights[name]), name
        assert 0.4 < held < 0.6 if parallel == "fsdp" else held == 1
    if "adversarial" in kind:
        assert expected_rows[-1]["optim/adversarial_weight"] > 0


def weighed(kind, precision):
    settings = config(objective=IWAE, precision=precision)
    settings.objective.gradient = kind
    step = make_step(settings)
    gradients, _ = first_step(step, batch(step, 0))
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
    step = make_step(config(adversarial=True), parallel=parallel)
    runtime = step.runtime

    def spoiled(gradient):
        is_bad = number == 2 and runtime.rank == runtime.world - 1
        return gradient * torch.nan if is_bad else gradient

    if bad == "discriminator":
        step.adversary.network.conv_out.weight.register_hook(spoiled)
    else:
        step.vae.decoder.conv_out.register_full_backward_hook(
            lambda _, gradients, __: tuple(map(spoiled, gradients))
        )
    flags, changed = [], []
    for number in range(4):
        before = {k: v.detach().clone() for k, v in step.weights_of_every_rank().items()}
        report = step(batch(step, number), number)
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
