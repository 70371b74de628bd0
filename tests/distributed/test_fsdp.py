"""FSDP trains as DDP does, and its checkpoints are the same."""

import functools

import pytest
import torch

from tests.distributed.test_step import IWAE, batch, config
from tests.support.distributed import run_ranks
from tests.support.training import losses, rows, train, weights
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime, full_value, local_part
from vae_dist.training.optimizer import optimizer_tensors
from vae_dist.training.step import TrainingStep

Outcome = tuple[list[float], dict[str, torch.Tensor], list[float], int, int]


def three_steps(
    parallel: str, microbatch_size: int, clip: float, bad_step: int, *, iwae: bool = False
) -> Outcome:
    """Norms, all state after three steps, skip flags, count of the optimizer, elements held."""
    options = RuntimeConfig(threads=1)
    options.parallel = parallel  # type: ignore[assignment]
    runtime = Runtime.start(options, precision="no")
    settings = config(microbatch_size=microbatch_size, clip=clip, objective=IWAE if iwae else None)
    if iwae:
        settings.likelihood.variance = "per_channel"  # three numbers for two ranks
    # Adam divides by the root of small squares: a small eps would amplify rounding without bound
    settings.optimizer.eps, settings.optimizer.lr, settings.optimizer.warmup_steps = 1.0, 1e-2, 0
    step = TrainingStep(settings, runtime, (8, 8))
    inputs = step._inputs

    def poisoned(group, stored, number):
        (images, noise, *others), more = inputs(group, stored, number)
        bad = number == bad_step and runtime.rank == runtime.world - 1
        return (images, noise * float("nan") if bad else noise, *others), more

    step._inputs = poisoned
    norms, flags = [], []
    for number in range(3):
        report = step(batch(runtime, number), number)
        norms.append(float(report.grad_norm))
        flags.append(float(report.found_inf))
    state = {
        **{f"model/{k}": full_value(v.detach()) for k, v in step.vae.state_dict().items()},
        **{f"ema/{k}": v for k, v in step.ema.module.state_dict().items()},
        **{k: full_value(v) for k, v in optimizer_tensors(step.optimizer, step.vae).items()},
    }
    count = int(state["step/encoder.conv_in.weight"])
    held = sum(local_part(p).numel() for p in step.vae.parameters())
    return norms, {k: v.clone() for k, v in state.items()}, flags, count, held


def assert_close_to_largest(
    found: torch.Tensor, expected: torch.Tensor, name: str, *, largest: float | None = None
) -> None:
    """Equal to rounding, measured by the largest value: of the tensor, or the one given."""
    assert found.shape == expected.shape, name
    error = float((found - expected).abs().max())
    largest = float(expected.abs().max()) if largest is None else largest
    assert error <= 1e-4 * largest, (name, error, largest)


@pytest.mark.parametrize(
    ("microbatch_size", "clip", "bad_step", "iwae"),
    [
        pytest.param(0, 0.0, -1, False, id="whole", marks=pytest.mark.slow),
        pytest.param(2, 0.0, -1, False, id="accumulated", marks=pytest.mark.slow),
        pytest.param(2, 500.0, -1, False, id="accumulated and clipped"),
        pytest.param(2, 0.0, -1, True, id="importance-weighted"),
        pytest.param(0, 0.0, 1, False, id="a nan on one rank"),
    ],
)
def test_steps_equal_those_of_one_process(microbatch_size, clip, bad_step, iwae):
    three = functools.partial(three_steps, iwae=iwae)
    ((norms, state, flags, count, size),) = run_ranks(1, three, "ddp", 0, clip, bad_step)
    outcomes = run_ranks(2, three, "fsdp", microbatch_size, clip, bad_step)
    assert sum(outcome[4] for outcome in outcomes) == size  # each holds its part alone
    for found_norms, found, found_flags, found_count, held in outcomes:
        assert 0.4 * size < held < 0.6 * size
        assert found_flags == flags and found_count == count
        torch.testing.assert_close(found_norms, norms, rtol=1e-4, atol=0, equal_nan=True)
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert_close_to_largest(found[name], value, name)


def test_fsdp_on_two_processes_goes_on_as_ddp_on_one_and_back(tmp_path, digits):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("checkpoint.every=0", "evaluation.every=0", "optimizer.schedule=constant")
    options += ("optimizer.eps=0.1",)  # so that Adam does not amplify rounding
    assert train(whole, digits, *options, "training.steps=15") == [0]
    for steps, world, parallel in ((5, 2, "fsdp"), (10, 1, "ddp"), (15, 2, "fsdp")):
        overrides = (*options, f"training.steps={steps}", f"runtime.parallel={parallel}")
        assert train(run, digits, *overrides, world=world) == [0] * world
    torch.testing.assert_close(losses(run), losses(whole), rtol=1e-4, atol=0)
    for name in ("model", "ema", "optimizer"):
        found, expected = weights(run, 15, name), weights(whole, 15, name)
        assert found.keys() == expected.keys()
        kinds = {key: key.split("/")[0] if name == "optimizer" else name for key in expected}
        for key, value in found.items():
            # some gradients are zero but for rounding: biases in front of a GroupNorm
            same_kind = [expected[k] for k in expected if kinds[k] == kinds[key]]
            largest = max(float(tensor.abs().max()) for tensor in same_kind)
            assert_close_to_largest(value, expected[key], f"{name}/{key}", largest=largest)
    values = [rows(one)[15]["eval/neg_elbo_nats"] for one in (run, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
