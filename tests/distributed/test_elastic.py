"""A run is a function of its config: not of the number of ranks, microbatches or interruptions."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.support.training import arguments, losses, rows, same_weights, status, train
from vae_dist.train import main
from vae_dist.training.loop import Trainer

STEPS = 12
KINDS = {
    "bound": (),
    "importance-weighted": (
        "objective.importance_samples=4",
        "objective.gradient=doubly_reparameterized",
        "objective.free_bits=0.2",
        "objective.beta_warmup_steps=8",
    ),
    "labels and masks": (
        "model.num_classes=10",
        "model.label_dropout=0.3",
        "data.mask=rectangle",
    ),
}
EVALUATED = ("evaluation.every=10", f"training.steps={STEPS}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits) -> Path:
    """Float32 steps on one process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert main(arguments(run, digits, *EVALUATED)) == 0
    return run


@pytest.mark.parametrize(
    ("kind", "world", "microbatch"),
    [
        ("bound", 2, 8),
        pytest.param("bound", 2, 0, marks=pytest.mark.slow),
        pytest.param("bound", 1, 16, marks=pytest.mark.slow),
        ("importance-weighted", 2, 16),
        ("labels and masks", 2, 8),
    ],
)
def test_losses_do_not_depend_on_ranks_or_microbatches(
    reference, tmp_path, digits, kind, world, microbatch
):
    alone, run = reference, tmp_path / "run"
    if kind != "bound":
        alone = tmp_path / "alone"
        assert main(arguments(alone, digits, *EVALUATED, *KINDS[kind])) == 0
    overrides = (*EVALUATED, *KINDS[kind], f"training.microbatch_size={microbatch}")
    assert train(run, digits, *overrides, world=world) == [0] * world
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-4, atol=0)
    ours, expected = rows(run)[STEPS], rows(alone)[STEPS]
    for name in ("train/bits_per_dim", "eval/neg_elbo_nats", "eval/bits_per_dim"):
        if name in expected:
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name
    if kind == "importance-weighted":
        assert ours["train/neg_iwae_nats"] < ours["train/neg_elbo_nats"]
    if kind == "labels and masks":  # per dim means per observed one: half of 784
        dims = ours["eval/neg_elbo_nats"] / (ours["eval/bits_per_dim"] * math.log(2))
        assert dims == pytest.approx(392, rel=0.02)


@pytest.mark.parametrize(("first", "second"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_with_another_number_of_ranks(
    reference, tmp_path, digits, monkeypatch, first, second
):
    run = tmp_path / "run"
    stop_after(monkeypatch, 6)
    overrides = (*EVALUATED, "checkpoint.every=0")
    assert train(run, digits, *overrides, world=first) == [75] * first
    # ranks agree one step after the first of them was asked
    assert status(run)["status"] == "interrupted" and status(run)["step"] == 5 + first
    assert 0 < rows(run)[status(run)["step"]]["data/epoch"] < 1  # in the middle of an epoch
    monkeypatch.undo()
    assert train(run, digits, *overrides, world=second) == [0] * second
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-4, atol=0)


def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    reference, tmp_path, digits, monkeypatch
):
    run = tmp_path / "run"
    for step in (3, 10):  # 10: an evaluation is due at that step
        stop_after(monkeypatch, step)
        assert train(run, digits, *EVALUATED) == [75]
        monkeypatch.undo()
    assert 10 not in rows(run)
    assert train(run, digits, *EVALUATED) == [0]
    assert same_weights(run, reference, STEPS)
    assert torch.equal(losses(run), losses(reference))
    evaluated = [rows(r)[10]["eval/neg_elbo_nats"] for r in (run, reference)]
    assert evaluated[0] == evaluated[1] and "train/loss" in rows(run)[10]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM to the last rank alone when a step is done; forked ranks inherit this."""
    advance = Trainer._advance

    def advance_and_stop(self: Trainer) -> None:
        advance(self)
        if self.step == step and self.runtime.rank == self.runtime.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_advance", advance_and_stop)


def test_a_finished_run_says_so_and_computes_nothing(reference, digits, capfd):
    before = (reference / "log.jsonl").read_bytes()
    assert main(arguments(reference, digits, *EVALUATED)) == 0
    assert f"finished: {reference} stands at step {STEPS}" in capfd.readouterr().out
    assert (reference / "log.jsonl").read_bytes() == before
