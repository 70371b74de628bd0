"""The notes of the plan: what a config says that its writer may not have meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vae_dist.config.schema import TrainConfig
from vae_dist.training import plan
from vae_dist.training.plan import _arithmetic, _rounded_weights, _unusual_epochs


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
    assert _unusual_epochs(config, num_samples) == ([f"note: {note}"] if note else [])


@pytest.mark.parametrize(
    ("weights", "gets"), [([1000, 1], "7:1"), ([3, 1], ""), ([], ""), ([1.0, 1.0, 1.5], "2:2:4")]
)
def test_weights_that_a_batch_cannot_give_are_noted(weights: list[float], gets: str) -> None:
    config = TrainConfig()
    config.training.batch_size = 8
    train = SimpleNamespace(parts=[(1, weight) for weight in weights])
    data: Any = SimpleNamespace(train=train, settings=SimpleNamespace(buckets=()))
    notes = _rounded_weights(config, data)
    assert len(notes) == bool(gets)
    assert all(f"8 images of a batch; the data sets get {gets} of them" in note for note in notes)


def test_what_keeps_a_gpu_run_from_being_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig()
    config.training.precision, config.runtime.compile = "no", "false"
    monkeypatch.setattr(plan, "compiler_problem", lambda device: "there is no Triton")
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 0))
    assert _arithmetic(config, gpu, 0) == "precision no, not compiled (there is no Triton)"
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    assert _arithmetic(config, cpu, 0) == "precision no"
    monkeypatch.setattr(plan, "compiler_problem", lambda device: None)
    assert _arithmetic(config, gpu, 0) == "precision no"
    config.runtime.compile = "blocks"
    assert _arithmetic(config, gpu, 0) == "precision no, compiled block by block"
