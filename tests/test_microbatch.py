"""training.microbatch_size=auto: the choice by the estimate, and the trial that corrects it."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.test_step import batch, config, training_step
from tests.support.distributed import run_ranks
from vae_dist import microbatch
from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.estimate import step_cost
from vae_dist.microbatch import (
    candidates,
    check_compiled,
    fitting_microbatch,
    try_microbatch,
)

SIZE = (8, 8)


def one_process():
    return Runtime.start(RuntimeConfig(threads=1), precision="no")


def test_candidates_cut_the_share_of_a_rank_evenly():
    settings = config()  # 16 images in 8 slots
    assert candidates(settings, 1) == [16, 8, 6, 4, 2]
    assert candidates(settings, 4) == [4, 2]
    settings.data.resolution = {"area": 64, "multiple": 8, "max_aspect": 2.0}
    assert candidates(settings, 4) == [4, 2]
    settings.runtime.compile = "true"
    assert candidates(settings, 4) == [2]


def test_a_number_is_left_alone():
    settings = config(microbatch_size=4)
    assert fitting_microbatch(settings, SIZE, one_process()) is settings


@pytest.mark.parametrize("num_images", [16, 6, 2])
def test_the_largest_that_fits_is_chosen(monkeypatch, num_images):
    settings = config(microbatch_size="auto")
    room = step_cost(config(), SIZE, torch.device("cpu"), num_images=num_images).peak_bytes
    monkeypatch.setattr(microbatch, "free_bytes", lambda device: room + 100)
    fitted = fitting_microbatch(settings, SIZE, one_process())
    assert fitted.training.microbatch_size == num_images
    assert settings.training.microbatch_size == "auto"


def choice_of_a_rank():
    runtime = Runtime.start(RuntimeConfig(threads=1), precision="no")
    microbatch.free_bytes = lambda device: 10**12 if runtime.rank == 0 else 1
    return fitting_microbatch(
        config(microbatch_size="auto"), SIZE, runtime
    ).training.microbatch_size


def test_ranks_agree_on_what_fits_everywhere():
    assert run_ranks(2, choice_of_a_rank) == [2, 2]


def test_a_trial_without_memory_halves_and_leaves_no_trace(monkeypatch):
    settings = config(microbatch_size=16)
    runtime = one_process()
    step = training_step(settings, runtime)
    before = {name: p.clone() for name, p in step.vae.named_parameters()}
    tried = []
    rehearse = microbatch._rehearse

    def scarce(step, num_images, image_size, **options):
        tried.append(num_images)
        if num_images > 6:
            raise torch.OutOfMemoryError("no memory")
        rehearse(step, num_images, image_size, **options)

    monkeypatch.setattr(microbatch, "_rehearse", scarce)
    assert try_microbatch(step, SIZE) == 4
    assert tried == [16, 8, 4]
    assert all(p.grad is None for p in step.vae.parameters())
    assert not step.optimizer.state
    for name, parameter in step.vae.named_parameters():
        assert torch.equal(parameter, before[name])
    # the step after a trial is that of a run without one
    fresh = training_step(config(microbatch_size=16), runtime)
    assert float(step(batch(runtime, 0), 0).loss_sum) == float(fresh(batch(runtime, 0), 0).loss_sum)


def without_gradients(tower):
    """What a compiler may make of a tower: its values, and no gradient of its weights."""

    def call(*args):
        output = type(tower).forward(tower, *args)
        return output.detach() + 0 * args[0].sum()

    return call


def test_a_compiler_that_loses_gradients_is_found_and_left_out():
    step = training_step(config(), one_process())
    assert check_compiled(step, SIZE, is_asked=True) == ""
    step.vae.decoder._compiled_call_impl = without_gradients(step.vae.decoder)
    with pytest.raises(ConfigError, match=r"gradients wrong .*runtime\.compile=false"):
        check_compiled(step, SIZE, is_asked=True)
    assert "without compilation" in check_compiled(step, SIZE, is_asked=False)
    assert step.vae.decoder._compiled_call_impl is None
    assert all(p.grad is None for p in step.vae.parameters())
    assert check_compiled(step, SIZE, is_asked=True) == ""


def test_not_even_a_slot_is_an_error(monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(microbatch, "_rehearse", none)
    with pytest.raises(ConfigError, match=r"training\.microbatch_size=auto.*one slot"):
        try_microbatch(training_step(config(microbatch_size=16), one_process()), SIZE)
