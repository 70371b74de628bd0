"""Two networks over ranks: equal losses and equal weights in the adversarial phase, however the
batch is split; resume in that phase; nobody updates where one rank's gradient is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.distributed.test_elastic import stop_after
from tests.support.adversarial import (
    BATCH_SIZE,
    adversarial_config,
    adversarial_step,
    picture_batch,
    start,
)
from tests.support.distributed import run_ranks
from tests.support.training import rows, same_weights, status, train, weights
from vae_dist.distributed import full_value

STEPS = 20

Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def steps(
    microbatch: int,
    mixed: bool,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    train_only: Literal["all", "decoder"] = "all",
) -> Outcome:
    """What is logged of each of 20 steps, means over all ranks, and this rank's weights at last."""
    runtime = start(parallel=parallel)
    config = adversarial_config()
    config.training.microbatch_size, config.training.train_only = microbatch, train_only
    step = adversarial_step(config, runtime)
    logged = []
    for number in range(STEPS):
        report = step(picture_batch(runtime, number, mixed=mixed), number)
        sums = report.sums
        row = {k: float(runtime.sum_over_ranks(v.clone())) / BATCH_SIZE for k, v in sums.items()}
        logged.append(row | {k: float(v) for k, v in report.shared.items()})
    weights = step.weights_of_every_rank().items()
    return logged, {k: full_value(v.detach()).clone() for k, v in weights}


@pytest.fixture(scope="module", params=[False, True], ids=["one shape", "two shapes"])
def alone(request: pytest.FixtureRequest) -> tuple[bool, Outcome]:
    (outcome,) = run_ranks(1, steps, 0, request.param)
    return request.param, outcome


@pytest.mark.parametrize(("world", "microbatch"), [(1, 2), (2, 0), (2, 2)])
def test_neither_ranks_nor_microbatches_change_the_adversarial_phase(alone, world, microbatch):
    mixed, (expected, _) = alone
    assert_equal(run_ranks(world, steps, microbatch, mixed), expected)


def test_a_model_that_is_cut_over_the_ranks_has_the_same_adversarial_phase():
    ((expected, _),) = run_ranks(1, steps, 0, False)
    assert_equal(run_ranks(2, steps, 2, False, "fsdp"), expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_change_nothing_where_the_decoder_alone_is_trained(parallel):
    ((expected, weights),) = run_ranks(1, steps, 0, False, "ddp", "decoder")
    outcomes = run_ranks(2, steps, 2, False, parallel, "decoder")
    assert_equal(outcomes, expected)
    for name in ("encoder.conv_in.weight", "ema/encoder.conv_in.weight"):
        assert torch.equal(outcomes[0][1][name], weights[name])


def assert_equal(outcomes: list[Outcome], expected: list[dict[str, float]]) -> None:
    assert expected[-1]["optim/adversarial_weight"] > 0
    for logged, found in outcomes:
        for number, row in enumerate(expected):
            assert logged[number].keys() == row.keys()
            for name, value in row.items():
                assert logged[number][name] == pytest.approx(value, rel=1e-5), (name, number)
        first = outcomes[0][1]
        assert {"ema/decoder.conv_out.weight", "discriminator/conv_in.weight"} <= found.keys()
        assert all(torch.equal(found[name], first[name]) for name in first)


def poisoned(network: str) -> tuple[list[float], list[bool]]:
    """Flags of four steps, of which rank 1's gradient is bad in the third; whether each step
    changed any weight."""
    runtime = start()
    step = adversarial_step(adversarial_config(), runtime)
    adversary = step.adversary
    source: Any = step.vae.decoder.conv_out if network == "vae" else adversary.network.conv_out
    number = 0
    if runtime.rank == 1:
        source.register_full_backward_hook(
            lambda _, gradients, __: tuple(
                g * float("nan") if number == 2 and g is not None else g for g in gradients
            )
        )
    flags, changed = [], []
    for number in range(4):
        before = {k: v.detach().clone() for k, v in step.weights_of_every_rank().items()}
        flags.append(float(step(picture_batch(runtime, number), number).found_inf))
        after = step.weights_of_every_rank()
        changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    return flags, changed


@pytest.mark.parametrize("network", ["vae", "discriminator"])
def test_a_nan_of_either_network_on_one_rank_means_that_nobody_updates(network):
    for flags, changed in run_ranks(2, poisoned, network):
        assert flags == [0, 0, 1, 0]
        assert changed == [True, True, False, True]


OPTIONS = (
    "training.steps=14",
    "evaluation.every=0",
    "checkpoint.every=0",
    "model.latent=spatial",
    "model.latent_channels=3",
    "likelihood.kind=gaussian",
    "perceptual.kind=structure",
    "adversarial.weight=0.5",
    "adversarial.start_step=2",
    "adversarial.warmup_steps=2",
    "adversarial.ramp_steps=20",
    "adversarial.channels=8",
    "adversarial.layers=1",
    "adversarial.r1=0.1",
    "adversarial.r1_every=3",
    "objective.latent_noise=0.1",
    "objective.scale_equivariance=0.2",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(run, digits, *OPTIONS) == [0]
    return run


def test_an_interrupted_adversarial_run_equals_the_uninterrupted_one_bit_for_bit(
    whole, tmp_path, digits, monkeypatch
):
    run = tmp_path / "run"
    for step in (1, 3, 8):  # before the discriminator, in its warm-up, in the adversarial phase
        stop_after(monkeypatch, step)
        assert train(run, digits, *OPTIONS) == [75]
        assert status(run)["step"] == step
        monkeypatch.undo()
    assert train(run, digits, *OPTIONS) == [0]
    assert same_weights(run, whole, 14)
    for name in ("discriminator", "discriminator_optimizer"):
        ours, theirs = weights(run, 14, name), weights(whole, 14, name)
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for step, row in rows(whole).items():
        for name, value in row.items():
            if name.startswith(("train/", "optim/")) and name != "optim/update_ratio":
                assert rows(run)[step][name] == value, (step, name)


def test_an_adversarial_run_goes_on_with_another_number_of_ranks(
    whole, tmp_path, digits, monkeypatch
):
    run = tmp_path / "run"
    stop_after(monkeypatch, 8)
    assert train(run, digits, *OPTIONS, world=2) == [75, 75]
    monkeypatch.undo()
    assert train(run, digits, *OPTIONS, "training.microbatch_size=16") == [0]
    expected = rows(whole)
    for step, row in rows(run).items():
        for name in ("train/loss", "train/discriminator_loss", "optim/adversarial_weight"):
            if name in expected[step]:
                assert row[name] == pytest.approx(expected[step][name], rel=1e-3), (step, name)
