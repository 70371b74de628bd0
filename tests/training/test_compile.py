"""Compilation, memory layout and what `auto` makes of them; compiled steps equal eager ones."""

import functools

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.steps import IWAE, batch, config, first_step, make_step, wrong_gradients
from vae_dist.models.blocks import Block
from vae_dist.models.towers import Decoder, Encoder
from vae_dist.training.compile import compiler_problem

CPU = torch.device("cpu")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler (g++ or clang++" in str(compiler_problem(CPU))
    monkeypatch.setenv("CXX", "/bin/sh")
    assert "C++ compiler" not in str(compiler_problem(CPU))


def stepper(*, channels_last="false", compiled="false"):
    settings = config()
    settings.runtime.channels_last, settings.runtime.compile = channels_last, compiled
    return make_step(settings)


def test_channels_last_changes_the_layout_and_no_number():
    def losses(step, numbers):
        return [float(step(batch(step, k), k).sums["train/loss"]) for k in numbers]

    step, again = (stepper(channels_last="true") for _ in range(2))
    assert losses(step, range(3)) == pytest.approx(losses(stepper(), range(3)), rel=1e-5)
    weight = step.vae.encoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    saved = {
        group: {name: value.contiguous() for name, value in tensors.items()}
        for group, tensors in step.tensors().items()
    }
    again.load(saved, step.scalars())
    assert losses(again, range(3, 6)) == losses(step, range(3, 6))


def test_what_is_compiled_is_what_was_asked_for(monkeypatch):
    asked = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.add(type(self)))
    stepper(compiled="true")
    assert asked >= {Encoder, Decoder} and not any(issubclass(kind, Block) for kind in asked)
    asked.clear()
    stepper(compiled="blocks")
    assert asked and all(issubclass(kind, Block) for kind in asked)


def numbers(kind, compiled):
    """Losses and norms of three steps, and the lambda of an adversary; graphs, and their breaks."""
    has_adversary = kind.startswith("discriminator")
    settings = config(
        adversarial=has_adversary,
        microbatch_size=4 * has_adversary,
        objective=IWAE if kind == "importance-weighted" else None,
    )
    if kind.startswith("blocks"):
        settings.model.blocks, settings.model.attention = 3, True
    settings.model.gradient_checkpointing = kind.endswith("checkpointed")
    settings.runtime.compile = compiled
    step, found = make_step(settings), []
    for k in range(3):
        report = step(batch(step, k), k)
        found += [*step.runtime.sum_numbers([report.sums["train/loss"]]), float(report.grad_norm)]
        found += [float(step.adversary.weight)] if has_adversary else []
    counters = torch._dynamo.utils.counters
    return found, counters["stats"]["unique_graphs"], len(counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "compiled", "world", "graphs"),
    [
        ("bound", "true", 2, 2),
        ("importance-weighted", "true", 1, 2),  # one of each tower
        ("blocks", "blocks", 1, 5),  # residual blocks at 8x8 and 4x4, attention, down, up
        ("blocks checkpointed", "blocks", 1, 5),
        ("discriminator checkpointed", "true", 1, 3),  # encoder; decoder, watched; at half size
    ],
)
def test_compiled_steps_equal_eager_ones(monkeypatch, kind, compiled, world, graphs):
    """Graphs as the compiler's front end makes them; code, which takes minutes, is not written."""
    front_end = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", front_end)
    ((expected, *_),) = run_ranks(1, numbers, kind, "false")
    for found, *counts in run_ranks(world, numbers, kind, compiled, timeout_s=300):
        assert found == pytest.approx(expected, rel=1e-4) and counts == [graphs, 0]


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(CPU) is not None, reason=str(compiler_problem(CPU)))
def test_compiled_gradients_are_those_of_plain_towers():
    torch._dynamo.reset()
    plain, step = stepper(), stepper(compiled="true")
    expected, _ = first_step(plain, batch(plain, 0))
    found, _ = first_step(step, batch(step, 0))
    assert len(found) == len(expected) > 20
    assert wrong_gradients(found, expected, rounding=1e-4) == []
