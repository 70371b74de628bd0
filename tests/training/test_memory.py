"""The estimate of a step against the step itself on CPU, and the microbatch that fits."""

import pytest
import torch

from tests.support.adversarial import BATCH_SIZE, adversarial_config, picture_batch
from tests.support.adversarial import SIZE as PICTURE_SIZE
from tests.support.distributed import run_ranks
from tests.support.steps import SIZE, batch, config, make_step, one_process
from vae_dist.config.errors import ConfigError
from vae_dist.config.load import load_train_config
from vae_dist.training import memory
from vae_dist.training.memory import candidates, largest_that_runs, microbatch_size, step_cost
from vae_dist.training.step import TrainingStep

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_estimate_is_near_the_worst_moment_of_a_step(is_checkpointed):
    settings = adversarial_config()
    settings.adversarial.weight, settings.perceptual.kind = 0.0, "none"
    settings.objective.latent_noise = 0.0
    settings.model.gradient_checkpointing = is_checkpointed
    runtime = one_process()
    step = make_step(settings, runtime, PICTURE_SIZE)
    for number in range(3):
        step(picture_batch(runtime, number), number)
    made = picture_batch(runtime, 3)
    peak = peak_of(lambda: step(made, 3))
    there = 4 * 4 * sum(p.numel() for p in step.vae.parameters())  # weights, moments, average
    estimate = step_cost(settings, PICTURE_SIZE, CPU).peak_bytes(BATCH_SIZE)
    assert estimate - there == pytest.approx(peak, rel=0.3)


def test_memory_and_operations_follow_the_config():
    def cost(*options):
        small = ("model.channels=[8,16]", "model.norm_groups=4", "model.latent_channels=4")
        shards = ("data.train=d/train", "data.validation=d/validation")
        return step_cost(load_train_config(["config=celeba64", *shards, *small, *options]),
                         (32, 32), CPU)  # fmt: skip

    plain, half = cost("training.precision=no"), cost("training.precision=bf16")
    assert half.image_bytes < 0.6 * plain.image_bytes
    assert half.forward_flops == plain.forward_flops
    lean = cost("training.precision=bf16", "model.gradient_checkpointing=true")
    assert lean.image_bytes < 0.7 * half.image_bytes
    assert half.step_flops < lean.step_flops <= half.step_flops + half.forward_flops
    frozen = ("model.latent=spatial", "training.train_only=decoder", "init_from=runs/first")
    assert cost(*frozen).state_bytes < plain.state_bytes


@pytest.mark.parametrize(
    ("asked", "fitting", "found"), [("auto", 16, 16), ("auto", 6, 6), ("auto", 1, 2), (4, 16, 4)]
)
def test_the_largest_microbatch_whose_estimate_fits_is_chosen(monkeypatch, asked, fitting, found):
    """Of even cuts of a rank's share: 16 images in 8 slots."""
    settings = config(microbatch_size=asked)
    assert candidates(settings, 1) == [16, 8, 6, 4, 2] and candidates(settings, 4) == [4, 2]
    free = step_cost(settings, SIZE, CPU).peak_bytes(fitting)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert microbatch_size(settings, SIZE, one_process()) == found


def choice_of_a_rank():
    runtime = one_process()
    memory.free_bytes = lambda device: 10**12 if runtime.rank == 0 else 1
    return microbatch_size(config(microbatch_size="auto"), SIZE, runtime)


def test_ranks_agree_on_what_fits_everywhere():
    assert run_ranks(2, choice_of_a_rank) == [2, 2]


def test_a_trial_without_memory_halves_and_leaves_no_trace(monkeypatch):
    runtime, tried, rehearse = one_process(), [], TrainingStep.rehearse
    step = make_step(config(microbatch_size=4), runtime, SIZE)
    before = {name: p.clone() for name, p in step.vae.named_parameters()}
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
    for name, parameter in step.vae.named_parameters():
        assert torch.equal(parameter, before[name])
    # the step after a trial is that of a run without one
    fresh = make_step(config(microbatch_size=4), runtime, SIZE)
    reports = [one(batch(runtime, 0), 0) for one in (step, fresh)]
    assert reports[0].sums["train/loss"] == reports[1].sums["train/loss"]
