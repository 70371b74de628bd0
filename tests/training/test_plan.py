"""The notes of the plan: what a config says that its writer may not have meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vae_dist.config.schema import TrainConfig
from vae_dist.training import plan
from vae_dist.training.plan import arithmetic, notes


@pytest.mark.parametrize(
    ("steps", "num_samples", "note"),
    [
        (100_000, 500, "each image is shown 25,600 times, more than most VAEs gain from; "
                       "training.steps=3906 makes 1,000"),
        (3906, 500, ""),
        (100_000, 162_770, ""),
        (2, 256, ""),
        (2, 257, "the run ends within its first epoch, after 256 of 257 images"),
        (1000, 1_281_167, "the run ends within its first epoch, after 128,000 of 1,281,167 images"),
    ],
)  # fmt: skip
def test_thousands_of_epochs_and_less_than_one_are_noted(
    steps: int, num_samples: int, note: str
) -> None:
    config = TrainConfig()
    config.training.batch_size, config.training.steps = 128, steps
    data: Any = SimpleNamespace(
        train=SimpleNamespace(parts=[], num_samples=num_samples),
        settings=SimpleNamespace(buckets=()),
    )
    config.optimizer.warmup_steps = 0
    assert list(notes(config, data)) == ([note] if note else [])


@pytest.mark.parametrize(
    ("weights", "gets"), [([1000, 1], "7:1"), ([3, 1], ""), ([], ""), ([1.0, 1.0, 1.5], "2:2:4")]
)
def test_weights_that_a_batch_cannot_give_are_noted(weights: list[float], gets: str) -> None:
    config = TrainConfig()
    config.training.batch_size = 8
    config.training.steps, config.optimizer.warmup_steps = 1, 0
    train = SimpleNamespace(parts=[(1, weight) for weight in weights], num_samples=8)
    data: Any = SimpleNamespace(train=train, settings=SimpleNamespace(buckets=()))
    found = list(notes(config, data))
    assert len(found) == bool(gets)
    assert all(f"; the data sets get {gets} of it instead" in note for note in found)


def test_what_keeps_a_gpu_run_from_being_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig()
    config.training.precision, config.runtime.compile = "no", "false"

    def words(device: str) -> str:
        runtime: Any = SimpleNamespace(device=torch.device(device))
        return ", ".join(arithmetic(config, runtime, 0))

    monkeypatch.setattr(plan, "compiler_problem", lambda device: "there is no Triton")
    assert words("cuda:0") == "precision no, not compiled (there is no Triton)"
    assert words("cpu") == "precision no"
    monkeypatch.setattr(plan, "compiler_problem", lambda device: None)
    assert words("cuda:0") == "precision no"
    config.runtime.compile = "blocks"
    assert words("cuda:0") == "precision no, compiled block by block"
