"""A run is a function of its config: not of ranks, microbatches, loader processes, sharding or
interruptions."""

import functools
import math
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed.fsdp  # a second that the forked ranks need not spend each

from tests.support.training import losses, rows, same_weights, stop_after, train
from vae_dist.run.checkpoint import CheckpointWriter

assert torch.distributed.fsdp
submit = CheckpointWriter.submit
STEPS = 8
KINDS = {
    "bound": "",
    "importance-weighted, labels and masks": "objective.importance_samples=4 "
    "objective.free_bits=0.2 objective.gradient=doubly_reparameterized "
    "objective.beta_warmup_steps=6 model.num_classes=10 model.label_dropout=0.3 "
    "data.mask=rectangle",
    "adversarial": "model.latent=spatial model.latent_channels=3 likelihood.kind=gaussian "
    "perceptual.kind=structure adversarial.weight=0.5 adversarial.start_step=2 "
    "adversarial.warmup_steps=2 adversarial.ramp_steps=20 adversarial.channels=8 "
    "adversarial.layers=1 objective.latent_noise=0.1 objective.scale_equivariance=0.2",
    "ladder": "model.arch=ladder model.latent=spatial model.channels=[8,16] model.patch=4 "
    "model.factors=7 model.groups=[2,1]",
}
FIXED = f"training.steps={STEPS} evaluation.every=6 checkpoint.every=0 evaluation.batch_size=8"
SLOW = pytest.mark.slow


class Leg(NamedTuple):
    """A part of a run: to the step after which the last rank is signalled, 0: to the end."""

    world: int = 1
    microbatch: int = 0
    workers: int = 0
    parallel: str = "ddp"
    stop: int = 0


def submit_on_main(self, *arguments, **options):
    assert os.environ["RANK"] == "0"  # of several ranks that write some spoil others' files
    submit(self, *arguments, **options)


def run_legs(run, digits, kind, legs, monkeypatch):
    for leg in legs:
        options = [f"training.microbatch_size={leg.microbatch}", f"data.workers={leg.workers}"]
        options += [f"runtime.parallel={leg.parallel}", *FIXED.split(), *KINDS[kind].split()]
        options += ["model.gradient_checkpointing=true"] * (leg.world > 1)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "submit", submit_on_main)
            if leg.stop:
                stop_after(patch, leg.stop)
            codes = train(run, digits, *options, world=leg.world)
        assert codes == [75 if leg.stop else 0] * leg.world


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """The run of a kind on one process, without a break."""

    @functools.cache
    def run_of(kind):
        run = tmp_path_factory.mktemp("whole") / "run"
        run_legs(run, digits, kind, [Leg()], pytest.MonkeyPatch)
        return run

    return run_of


@pytest.mark.parametrize(
    ("kind", "legs"),
    [
        ("bound", [Leg(stop=2), Leg(stop=6), Leg()]),  # an evaluation is due at step 6
        ("adversarial", [Leg(stop=3), Leg(stop=6), Leg()]),  # in its warm-up, after it
        ("bound", [Leg(2, 4, workers=2, stop=4), Leg(1, 8)]),
        ("bound", [Leg(2, 4, parallel="fsdp", stop=3), Leg(1, 4)]),
        ("importance-weighted, labels and masks", [Leg(2, 4)]),
        ("adversarial", [Leg(2, 4, stop=5), Leg(1, 8)]),
        ("ladder", [Leg(2, 4, stop=5), Leg(1, 8)]),
        pytest.param("ladder", [Leg(2, 4, parallel="fsdp")], marks=SLOW),
        pytest.param("bound", [Leg(1, stop=4), Leg(2, 0, 2, "fsdp")], marks=SLOW),
        pytest.param("bound", [Leg(4, stop=4), Leg(2)], marks=SLOW),
        pytest.param("adversarial", [Leg(2, 8, 2, "fsdp")], marks=SLOW),
    ],
    ids=str,
)
def test_a_run_is_the_same_however_it_is_cut(whole, tmp_path, digits, monkeypatch, kind, legs):
    """Interruptions alone change no bit."""
    run, exact = tmp_path / "run", all(leg._replace(stop=0) == Leg() for leg in legs)
    run_legs(run, digits, kind, legs, monkeypatch)
    assert not exact or same_weights(run, whole(kind), STEPS)
    torch.testing.assert_close(losses(run), losses(whole(kind)), rtol=1e-4, atol=0)
    found = rows(run)
    for step, expected in rows(whole(kind)).items():
        learns = kind == "adversarial" and step > 2  # adversarial.start_step
        assert ("train/discriminator_loss" in expected) == learns
        for name, value in expected.items():
            if exact and name.startswith(("train/", "optim/", "eval/")):
                assert found[step][name] == value, (step, name)
            elif name in ("train/bits_per_dim", "eval/neg_elbo_nats", "train/discriminator_loss"):
                assert found[step][name] == pytest.approx(value, rel=1e-4), name
    if "masks" in kind:
        last = found[STEPS]
        assert last["train/neg_iwae_nats"] < last["train/neg_elbo_nats"]
        # per dim means per observed one: half of 784
        dims = last["eval/neg_elbo_nats"] / (last["eval/bits_per_dim"] * math.log(2))
        assert dims == pytest.approx(392, rel=0.02)
