"""Compilation, memory layout and what `auto` makes of them; compiled steps equal eager ones."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from tests.distributed.test_step import IWAE, batch, config
from tests.support.adversarial import adversarial_config, adversarial_step, picture_batch
from tests.support.distributed import run_ranks
from tests.support.steps import first_step, make_step, wrong_gradients
from vae_dist.config.schema import RuntimeConfig
from vae_dist.distributed import Runtime
from vae_dist.models.blocks import Block
from vae_dist.models.build import build_vae
from vae_dist.training.compile import compiler_problem
from vae_dist.training.optimizer import (
    load_optimizer_tensors,
    optimizer_tensors,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler (g++ or clang++" in str(compiler_problem(CPU))
    monkeypatch.setenv("CXX", "/bin/sh")
    assert "C++ compiler" not in str(compiler_problem(CPU))


def one_process():
    return Runtime.start(RuntimeConfig(threads=1), precision="no")


def stepper(runtime, *, channels_last="false", compiled="false", settings=None):
    settings = settings or config()
    settings.runtime.channels_last, settings.runtime.compile = channels_last, compiled
    return make_step(settings, runtime, (8, 8))


def losses(step, runtime, num_steps=5):
    return [float(step(batch(runtime, k), k).sums["train/loss"]) for k in range(num_steps)]


def test_channels_last_changes_the_layout_and_no_number():
    runtime = one_process()
    plain, other = stepper(runtime), stepper(runtime, channels_last="true")
    assert losses(other, runtime) == pytest.approx(losses(plain, runtime), rel=1e-5)
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    weight = dict(other.vae.named_parameters())[name]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    saved = {k: v.contiguous() for k, v in optimizer_tensors(other.optimizer, other.vae).items()}
    again = stepper(runtime, channels_last="true")
    load_optimizer_tensors(again.optimizer, again.vae, saved)
    moment = again.optimizer.state[dict(again.vae.named_parameters())[name]]["exp_avg"]
    assert moment.stride() == weight.stride()
    assert torch.equal(moment, saved[f"exp_avg/{name}"])


@pytest.fixture
def front_end(monkeypatch):
    """Graphs as the compiler's front end makes them; code, which takes minutes, is not written."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(CPU) is not None, reason=str(compiler_problem(CPU)))
def test_compiled_steps_equal_eager_ones():
    assert_compiled_equals_eager(None)


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(CPU) is not None, reason=str(compiler_problem(CPU)))
def test_compiled_gradients_are_those_of_plain_towers():
    torch._dynamo.reset()
    runtime = one_process()
    expected, _ = first_step(stepper(runtime), batch(runtime, 0))
    found, _ = first_step(stepper(runtime, compiled="true"), batch(runtime, 0))
    assert len(found) == len(expected) > 20
    assert wrong_gradients(found, expected, rounding=1e-4) == []


@pytest.mark.slow
def test_compiled_steps_with_hooked_gradients_equal_eager_ones(front_end):
    assert_compiled_equals_eager(IWAE)


def assert_compiled_equals_eager(objective):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runtime = one_process()
    settings = config(objective=objective)
    expected = losses(stepper(runtime, settings=settings), runtime)
    step = stepper(runtime, compiled="true", settings=settings)
    assert losses(step, runtime) == pytest.approx(expected, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of each tower
    assert set(step.vae.state_dict()) == set(build_vae(config(), (8, 8)).state_dict())
    # a copy computes with its own weights
    twin = copy.deepcopy(step.vae)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(twin.encode(torch.ones(2, 3, 8, 8))[0].abs().sum()) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_steps_compiled_block_by_block_equal_eager_ones(front_end, checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runtime = one_process()
    settings = config()
    settings.model.blocks, settings.model.attention = 3, True
    settings.model.gradient_checkpointing = checkpointed
    expected = losses(stepper(runtime, settings=settings), runtime)
    step = stepper(runtime, compiled="blocks", settings=settings)
    assert losses(step, runtime) == pytest.approx(expected, rel=1e-5)
    blocks = [module for module in step.vae.modules() if isinstance(module, Block)]
    assert len(blocks) == 22
    # residual blocks at 8x8 and 4x4, attention, down, up
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(block._compiled_call_impl is not None for block in blocks)


def compiled_losses():
    runtime = one_process()
    step = stepper(runtime, compiled="true")
    reports = [step(batch(runtime, k), k) for k in range(3)]
    return [runtime.sum_numbers([report.sums["train/loss"]])[0] for report in reports]


@pytest.mark.slow
def test_compiled_steps_on_two_ranks_equal_eager_ones_on_one(front_end):
    runtime = one_process()
    expected = losses(stepper(runtime), runtime, 3)
    for found in run_ranks(2, compiled_losses, timeout_s=300):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_steps_with_a_discriminator_equal_eager_ones(front_end, checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runtime = one_process()
    settings = adversarial_config()
    settings.training.microbatch_size = 4
    settings.model.gradient_checkpointing = checkpointed

    def numbers(step):
        found = []
        for k in range(3):
            report = step(picture_batch(runtime, k), k)
            found.append((float(report.sums["train/loss"]), float(step.adversary.weight)))
        return found

    expected = numbers(adversarial_step(settings, runtime))
    settings.runtime.compile = "true"
    found = numbers(adversarial_step(settings, runtime))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    # encoder; decoder, watched; decoder at half size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
