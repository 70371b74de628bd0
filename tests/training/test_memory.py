"""The estimate of a step against the step itself on CPU, and the microbatch that fits."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.adversarial import (
    BATCH_SIZE,
    SIZE,
    adversarial_config,
    adversarial_step,
    picture_batch,
    start,
)
from tests.support.distributed import run_ranks
from tests.support.steps import SIZE as SMALL_SIZE
from tests.support.steps import batch, config, make_step, one_process
from vae_dist.config.errors import ConfigError
from vae_dist.config.load import load_train_config
from vae_dist.training import memory
from vae_dist.training.memory import candidates, fit_microbatch, step_cost
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


@pytest.mark.parametrize("kind", ["bound", "structure", "discriminator", "checkpointed"])
def test_the_estimate_is_near_the_worst_moment_of_a_step(kind):
    settings = adversarial_config()
    settings.objective.latent_noise, settings.adversarial.channels = 0.0, 32
    settings.adversarial.weight *= kind == "discriminator"
    settings.perceptual.kind = "structure" if kind == "structure" else "none"
    settings.model.gradient_checkpointing = kind == "checkpointed"
    runtime = start()
    step = adversarial_step(settings, runtime)
    for number in range(3):
        step(picture_batch(runtime, number), number)
    made = picture_batch(runtime, 3)
    peak = peak_of(lambda: step(made, 3))
    there = 4 * 4 * sum(p.numel() for p in step.vae.parameters())  # weights, moments, average
    if step.adversary is not None:
        there += 3 * 4 * sum(p.numel() for p in step.adversary.network.parameters())
    estimate = step_cost(settings, SIZE, CPU).peak_bytes(BATCH_SIZE)
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


@pytest.mark.parametrize("num_images", [16, 6, 2])
def test_on_a_cpu_the_largest_whose_estimate_fits_is_chosen(monkeypatch, num_images):
    """Of even cuts of a rank's share: 16 images in 8 slots."""
    assert candidates(config(), 1) == [16, 8, 6, 4, 2] and candidates(config(), 4) == [4, 2]
    step = make_step(config(microbatch_size="auto"), one_process(), SMALL_SIZE)
    room = step_cost(step.config, SIZE, CPU).peak_bytes(num_images)
    monkeypatch.setattr(memory, "free_bytes", lambda device: room)
    fit_microbatch(step, SIZE)
    assert step.microbatch_size == num_images
    assert step.config.training.microbatch_size == "auto"


def test_a_number_is_left_alone():
    step = make_step(config(microbatch_size=4), one_process(), SMALL_SIZE)
    fit_microbatch(step, SIZE)
    assert step.microbatch_size == 4


def choice_of_a_rank():
    runtime = one_process()
    memory.free_bytes = lambda device: 10**12 if runtime.rank == 0 else 1
    step = make_step(config(microbatch_size="auto"), runtime, SMALL_SIZE)
    fit_microbatch(step, SIZE)
    return step.microbatch_size


def test_ranks_agree_on_what_fits_everywhere():
    assert run_ranks(2, choice_of_a_rank) == [2, 2]


class OnCuda:
    """A runtime that says that its device is one of CUDA."""

    device = torch.device("cuda")

    def __init__(self, runtime):
        self.runtime = runtime

    def __getattr__(self, name):
        return getattr(self.runtime, name)


def test_a_trial_without_memory_halves_and_leaves_no_trace(monkeypatch):
    runtime, tried, rehearse = one_process(), [], TrainingStep.rehearse
    step = make_step(config(microbatch_size="auto"), runtime, SMALL_SIZE)
    before = {name: p.clone() for name, p in step.vae.named_parameters()}
    room = 6  # images

    def scarce(step, group):
        tried.append(len(group.images))
        step.runtime = runtime
        rehearse(step, group)
        step.runtime = OnCuda(runtime)
        if len(group.images) > room:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TrainingStep, "rehearse", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step.runtime = OnCuda(runtime)
    fit_microbatch(step, (8, 8))
    assert (step.microbatch_size, tried) == (4, [16, 8, 4])
    room = 0
    with pytest.raises(ConfigError, match=r"training\.microbatch_size=auto.*one slot"):
        fit_microbatch(step, (8, 8))
    step.runtime = runtime
    assert all(p.grad is None for p in step.vae.parameters()) and not step.optimizer.state
    for name, parameter in step.vae.named_parameters():
        assert torch.equal(parameter, before[name])
    # the step after a trial is that of a run without one
    fresh = make_step(config(microbatch_size=4), runtime, SMALL_SIZE)
    reports = [one(batch(runtime, 0), 0) for one in (step, fresh)]
    assert reports[0].sums["train/loss"] == reports[1].sums["train/loss"]


@pytest.mark.parametrize(("variable", "calls"), [("NOTHING", 2), ("MALLOC_ARENA_MAX", 0)])
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept_unless_the_environment_says_how(monkeypatch, variable, calls):
    asked = []
    libc = SimpleNamespace(mallopt=lambda parameter, value: asked.append((parameter, value)))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setenv(variable, "8")
    memory.keep_freed_memory()
    assert len(asked) == calls
