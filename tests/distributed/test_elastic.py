"""A run is a function of its config: not of the number of ranks, microbatches or interruptions."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.support.training import losses, rows, same_weights, status, train, weights
from vae_dist.training.loop import Trainer

STEPS = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits) -> Path:
    """Float32 steps on one process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert train(run, digits, f"training.steps={STEPS}") == [0]
    return run


@pytest.mark.parametrize(
    ("world", "microbatch"), [(2, 0), (2, 8), (1, 16)], ids=["2", "2 in parts of 8", "1 of 16"]
)
def test_losses_do_not_depend_on_ranks_or_microbatches(
    reference, tmp_path, digits, world, microbatch
):
    run = tmp_path / "run"
    overrides = (f"training.steps={STEPS}", f"training.microbatch_size={microbatch}")
    assert train(run, digits, *overrides, world=world) == [0] * world
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-4, atol=0)
    evaluated = [rows(r)[STEPS]["eval/neg_elbo_nats"] for r in (run, reference)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


def test_importance_samples_and_free_bits_do_not_depend_on_ranks_or_microbatches(tmp_path, digits):
    overrides = (
        "training.steps=12",
        "objective.importance_samples=4",
        "objective.gradient=doubly_reparameterized",
        "objective.free_bits=0.2",
        "objective.beta_warmup_steps=8",
    )
    found = []
    for world, microbatch in ((1, 0), (2, 16), (1, 8)):
        run = tmp_path / f"{world} {microbatch}"
        cut = f"training.microbatch_size={microbatch}"
        assert train(run, digits, *overrides, cut, world=world) == [0] * world
        found.append(losses(run))
        row = rows(run)[12]
        assert row["train/neg_iwae_nats"] < row["train/neg_elbo_nats"]
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=0)


def test_labels_and_masks_do_not_depend_on_ranks_or_microbatches(tmp_path, digits):
    conditions = ("model.num_classes=10", "model.label_dropout=0.3", "data.mask=rectangle")
    options = ("training.steps=12", "evaluation.every=0", *conditions)
    alone, together = tmp_path / "1", tmp_path / "2"
    assert train(alone, digits, *options) == [0]
    assert train(together, digits, *options, "training.microbatch_size=8", world=2) == [0, 0]
    torch.testing.assert_close(losses(together), losses(alone), rtol=1e-4, atol=0)
    for name in ("train/bits_per_dim", "eval/neg_elbo_nats", "eval/bits_per_dim"):
        found = [rows(run)[12][name] for run in (together, alone)]
        assert found[0] == pytest.approx(found[1], rel=1e-4), name
    row = rows(alone)[12]  # per dim means per observed one: half of 784
    total = row["eval/neg_elbo_nats"]
    assert row["eval/bits_per_dim"] == pytest.approx(total / (392 * math.log(2)), rel=0.02)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_an_interrupted_run_goes_on_with_another_number_of_ranks(
    reference, tmp_path, digits, monkeypatch, first, second
):
    run = tmp_path / "run"
    stop_after(monkeypatch, 11)
    overrides = (f"training.steps={STEPS}", "checkpoint.every=0")
    assert train(run, digits, *overrides, world=first) == [75] * first
    # ranks agree one step after the first of them was asked
    assert status(run)["status"] == "interrupted" and status(run)["step"] == 10 + first
    assert 0 < rows(run)[status(run)["step"]]["data/epoch"] < 1  # in the middle of an epoch
    monkeypatch.undo()
    assert train(run, digits, *overrides, world=second) == [0] * second
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-4, atol=0)


def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    reference, tmp_path, digits, monkeypatch
):
    run = tmp_path / "run"
    for step in (7, 20):  # 20: an evaluation is due at that step
        stop_after(monkeypatch, step)
        assert train(run, digits, f"training.steps={STEPS}") == [75]
        monkeypatch.undo()
    assert train(run, digits, f"training.steps={STEPS}") == [0]
    assert same_weights(run, reference, STEPS)
    assert torch.equal(losses(run), losses(reference))
    evaluated = [rows(r)[20]["eval/neg_elbo_nats"] for r in (run, reference)]
    assert evaluated[0] == evaluated[1]


def test_an_interrupted_last_evaluation_is_made_up_for_once(
    reference, tmp_path, digits, monkeypatch, capfd
):
    run = tmp_path / "run"
    options = ("training.steps=20", "log.every=10")
    stop_after(monkeypatch, 20)
    assert train(run, digits, *options) == [75]
    monkeypatch.undo()
    assert 20 not in rows(run)
    assert train(run, digits, *options) == [0]
    row = rows(run)[20]
    assert "train/loss" in row and "eval/neg_elbo_nats" in row
    capfd.readouterr()
    assert train(run, digits, *options) == [0]
    assert "nothing is left to do" in capfd.readouterr().out
    assert rows(run)[20] == row


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
    assert train(reference, digits, f"training.steps={STEPS}") == [0]
    assert f"finished: {reference} stands at step {STEPS}" in capfd.readouterr().out
    assert (reference / "log.jsonl").read_bytes() == before
    assert weights(reference, STEPS)
