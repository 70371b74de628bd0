"""A run is a function of its config: not of ranks, microbatches, loader processes, sharding or
interruptions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.training import losses, rows, same_weights, status, stop_after, train

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
    "adversarial": (
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
    ),
}
Options = tuple[str, ...]
SLOW = pytest.mark.slow


class Leg(NamedTuple):
    """A part of a run: to the step after which the last rank is signalled, 0: to the end."""

    world: int = 1
    microbatch: int = 0
    workers: int = 0
    parallel: str = "ddp"
    stop: int = 0

    def options(self) -> Options:
        return (
            f"training.microbatch_size={self.microbatch}",
            f"data.workers={self.workers}",
            f"runtime.parallel={self.parallel}",
        )


def options_of(kind: str) -> Options:
    fixed = (f"training.steps={STEPS}", "evaluation.every=10", "checkpoint.every=0")
    return (*fixed, "evaluation.batch_size=50", *KINDS[kind])


def run_legs(
    run: Path, digits: Path, kind: str, legs: list[Leg], monkeypatch: pytest.MonkeyPatch
) -> None:
    for leg in legs:
        with monkeypatch.context() as patch:
            if leg.stop:
                stop_after(patch, leg.stop)
            codes = train(run, digits, *options_of(kind), *leg.options(), world=leg.world)
        assert codes == [75 if leg.stop else 0] * leg.world
        if leg.stop:  # ranks agree one step after the first of them was asked
            assert status(run)["step"] == leg.stop + (leg.world > 1)
            assert status(run)["status"] == "interrupted"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[[str], Path]:
    """The run of a kind on one process, without a break."""

    @functools.cache
    def run_of(kind: str) -> Path:
        run = tmp_path_factory.mktemp("whole") / "run"
        assert train(run, digits, *options_of(kind)) == [0]
        return run

    return run_of


@pytest.mark.parametrize(
    ("kind", "legs"),
    [
        ("bound", [Leg(2, 8)]),
        ("bound", [Leg(2, workers=2, stop=6), Leg(1, 16)]),
        ("bound", [Leg(2, 8, 0, "fsdp", stop=4), Leg(1, stop=8), Leg(2, 0, 2, "fsdp")]),
        ("importance-weighted", [Leg(2, 16)]),
        ("labels and masks", [Leg(2, 8, 2)]),
        ("adversarial", [Leg(2, 16, stop=7), Leg(1, 16)]),
        pytest.param("bound", [Leg(1, 16)], marks=SLOW),
        pytest.param("bound", [Leg(1, stop=6), Leg(2)], marks=SLOW),
        pytest.param("adversarial", [Leg(2, 16, 2, "fsdp")], marks=SLOW),
    ],
    ids=str,
)
def test_a_run_is_the_same_however_it_is_cut(
    whole, tmp_path: Path, digits: Path, monkeypatch, kind: str, legs: list[Leg]
) -> None:
    run = tmp_path / "run"
    run_legs(run, digits, kind, legs, monkeypatch)
    torch.testing.assert_close(losses(run), losses(whole(kind)), rtol=1e-4, atol=0)
    for step, expected in rows(whole(kind)).items():
        for name in ("train/bits_per_dim", "eval/neg_elbo_nats", "train/discriminator_loss"):
            if name in expected:
                assert rows(run)[step][name] == pytest.approx(expected[name], rel=1e-4), name
    last = rows(run)[STEPS]
    if kind == "importance-weighted":
        assert last["train/neg_iwae_nats"] < last["train/neg_elbo_nats"]
    if kind == "labels and masks":  # per dim means per observed one: half of 784
        dims = last["eval/neg_elbo_nats"] / (last["eval/bits_per_dim"] * math.log(2))
        assert dims == pytest.approx(392, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("bound", (3, 10)),  # 10: an evaluation is due at that step
        ("adversarial", (1, 3, 7)),  # before the discriminator, in its warm-up, after it
    ],
)
def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    whole, tmp_path: Path, digits: Path, monkeypatch, kind: str, stops: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    run_legs(run, digits, kind, [Leg(stop=step) for step in stops], monkeypatch)
    assert 10 not in rows(run) or kind != "bound"
    run_legs(run, digits, kind, [Leg()], monkeypatch)
    assert same_weights(run, whole(kind), STEPS)
    for step, row in rows(whole(kind)).items():
        for name, value in row.items():
            if name.startswith(("train/", "optim/", "eval/")) and name != "optim/update_ratio":
                assert rows(run)[step][name] == value, (step, name)


def test_a_finished_run_says_so_and_computes_nothing(whole, digits: Path, capfd) -> None:
    run = whole("bound")
    before = (run / "log.jsonl").read_bytes()
    assert train(run, digits, *options_of("bound")) == [0]
    assert f"finished: {run} stands at step {STEPS}" in capfd.readouterr().out
    assert (run / "log.jsonl").read_bytes() == before
