"""The estimate of a step against the step itself on CPU, and the microbatch that fits."""

import pytest
import torch

from tests.support.steps import batch, config, make_step, one_process
from vae_dist.config.errors import ConfigError
from vae_dist.training.memory import candidates, largest_that_fits, largest_that_runs, step_cost
from vae_dist.training.step import TrainingStep

CPU, SIZE = torch.device("cpu"), (8, 8)


def peak_of(run):
    """Bytes that torch's allocator gives out beside what is there before, at the worst moment."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, num_bytes in moves:
        live += num_bytes
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("is_checkpointed", "trained"), [(False, "all"), (True, "all"), (False, "decoder")]
)
def test_the_estimate_is_near_the_worst_moment_of_a_step(is_checkpointed, trained):
    settings = config(adversarial=True)
    settings.adversarial.weight, settings.perceptual.kind = 0.0, "none"
    settings.objective.latent_noise = 0.0
    settings.model.gradient_checkpointing, settings.training.train_only = is_checkpointed, trained
    step = make_step(settings)
    for number in range(3):
        step(batch(step, number), number)
    made = batch(step, 3)
    peak = peak_of(lambda: step(made, 3))
    # weights and average, and the moments of what is trained
    there = 8 * sum(p.numel() * (1 + p.requires_grad) for p in step.vae.parameters())
    estimate = step_cost(settings, step.size, CPU).peak_bytes(settings.training.batch_size)
    assert estimate - there == pytest.approx(peak, rel=0.3)


@pytest.mark.parametrize(("fitting", "found"), [((20, 16), 16), ((6, 16), 6), ((16, 1), 2)])
def test_the_largest_microbatch_that_fits_on_every_rank_is_chosen(monkeypatch, fitting, found):
    """By the estimate, of even cuts of a rank's share: 16 images in 8 slots."""
    settings, runtime = config(), one_process()
    assert candidates(settings, 1) == [16, 8, 6, 4, 2] and candidates(settings, 4) == [4, 2]
    cost = step_cost(settings, SIZE, CPU)
    monkeypatch.setattr(runtime, "gather", lambda free: [cost.peak_bytes(n) for n in fitting])
    assert largest_that_fits(settings, runtime, cost) == found


def test_a_trial_without_memory_halves_and_leaves_no_trace(monkeypatch):
    tried, rehearse = [], TrainingStep.rehearse
    step = make_step(config(microbatch_size=4))
    fitting = 6  # images

    def scarce(step, group):
        tried.append(len(group.images))
        rehearse(step, group)
        if len(group.images) > fitting:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TrainingStep, "rehearse", scarce)
    assert (largest_that_runs(step, SIZE, ()), tried) == (4, [16, 8, 4])
    fitting = 0
    with pytest.raises(ConfigError, match=r"training\.microbatch_size=auto.*one slot"):
        largest_that_runs(step, SIZE, ())
    assert all(p.grad is None for p in step.vae.parameters()) and not step.optimizer.state
    # the step after a trial is that of a run without one
    fresh = make_step(config(microbatch_size=4))
    reports = [one(batch(one, 0), 0) for one in (step, fresh)]
    assert reports[0].sums["train/loss"] == reports[1].sums["train/loss"]
