"""Compilation, memory layout and what `auto` makes of them; compiled steps equal eager ones."""

import functools

import pytest
import torch

from tests.support.adversarial import SIZE as PICTURE_SIZE
from tests.support.adversarial import adversarial_config, picture_batch
from tests.support.distributed import run_ranks
from tests.support.steps import (
    IWAE,
    SIZE,
    batch,
    config,
    first_step,
    make_step,
    one_process,
    wrong_gradients,
)
from vae_dist.models.blocks import Block
from vae_dist.models.towers import Decoder, Encoder
from vae_dist.training.compile import compiler_problem
from vae_dist.training.optimizer import load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler (g++ or clang++" in str(compiler_problem(CPU))
    monkeypatch.setenv("CXX", "/bin/sh")
    assert "C++ compiler" not in str(compiler_problem(CPU))


def stepper(runtime, *, channels_last="false", compiled="false"):
    settings = config()
    settings.runtime.channels_last, settings.runtime.compile = channels_last, compiled
    return make_step(settings, runtime, SIZE)


def test_channels_last_changes_the_layout_and_no_number():
    runtime = one_process()
    plain, other = stepper(runtime), stepper(runtime, channels_last="true")
    losses = [
        [float(step(batch(runtime, k), k).sums["train/loss"]) for k in range(3)]
        for step in (plain, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    weight = dict(other.vae.named_parameters())[name]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    saved = {k: v.contiguous() for k, v in optimizer_tensors(other.optimizer, other.vae).items()}
    again = stepper(runtime, channels_last="true")
    load_optimizer_tensors(again.optimizer, again.vae, saved)
    moment = again.optimizer.state[dict(again.vae.named_parameters())[name]]["exp_avg"]
    assert moment.stride() == weight.stride()
    assert torch.equal(moment, saved[f"exp_avg/{name}"])


def test_what_is_compiled_is_what_was_asked_for(monkeypatch):
    asked = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.add(type(self)))
    stepper(one_process(), compiled="true")
    assert asked >= {Encoder, Decoder} and not any(issubclass(kind, Block) for kind in asked)
    asked.clear()
    stepper(one_process(), compiled="blocks")
    assert asked and all(issubclass(kind, Block) for kind in asked)


@pytest.fixture
def front_end(monkeypatch):
    """Graphs as the compiler's front end makes them; code, which takes minutes, is not written."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)


def numbers(kind, compiled):
    """Losses and norms of three steps, and the lambda of an adversary; the step."""
    runtime, has_adversary = one_process(), kind.startswith("discriminator")
    settings = config(objective=IWAE if kind == "importance-weighted" else None)
    if has_adversary:
        settings = adversarial_config()
        settings.training.microbatch_size = 4
    if kind.startswith("blocks"):
        settings.model.blocks, settings.model.attention = 3, True
    settings.model.gradient_checkpointing = kind.endswith("checkpointed")
    settings.runtime.compile = compiled
    step, found = make_step(settings, runtime, PICTURE_SIZE if has_adversary else SIZE), []
    for k in range(3):
        report = step((picture_batch if has_adversary else batch)(runtime, k), k)
        found += [*runtime.sum_numbers([report.sums["train/loss"]]), float(report.grad_norm)]
        found += [float(step.adversary.weight)] if has_adversary else []
    return found, step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "compiled", "graphs"),
    [
        ("importance-weighted", "true", 2),  # one of each tower
        ("blocks", "blocks", 5),  # residual blocks at 8x8 and 4x4, attention, down, up
        ("blocks checkpointed", "blocks", 5),
        ("discriminator checkpointed", "true", 3),  # encoder; decoder, watched; at half size
    ],
)
def test_compiled_steps_equal_eager_ones(front_end, kind, compiled, graphs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, _ = numbers(kind, "false")
    found, step = numbers(kind, compiled)
    assert found == pytest.approx(expected, rel=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    if compiled == "blocks":
        blocks = [module for module in step.vae.modules() if isinstance(module, Block)]
        assert len(blocks) == 22
        assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.slow
def test_compiled_steps_on_two_ranks_equal_eager_ones_on_one(front_end):
    expected, _ = numbers("bound", "false")
    for found in run_ranks(2, compiled_numbers, timeout_s=300):
        assert found == pytest.approx(expected, rel=1e-4)


def compiled_numbers():
    return numbers("bound", "true")[0]


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(CPU) is not None, reason=str(compiler_problem(CPU)))
def test_compiled_gradients_are_those_of_plain_towers():
    torch._dynamo.reset()
    runtime = one_process()
    expected, _ = first_step(stepper(runtime), batch(runtime, 0))
    step = stepper(runtime, compiled="true")
    found, _ = first_step(step, batch(runtime, 0))
    assert len(found) == len(expected) > 20
    assert wrong_gradients(found, expected, rounding=1e-4) == []
