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
    ("steps", "num_samples", "weights", "note"),
    [
        (100_000, 500, [], "each image is shown 25,600 times, more than most VAEs gain from; "
                           "training.steps=3906 makes 1,000"),
        (3906, 500, [], ""),
        (100_000, 162_770, [], ""),
        (2, 256, [], ""),
        (2, 257, [], "the run ends within its first epoch, after 256 of 257 images"),
        (2, 200, [1000, 1], "training.batch_size=128 cannot be divided by the weights 1000:1 of "
                            "data.train; the data sets get 127:1 of it instead; raise "
                            "training.batch_size, or weigh them so"),
        (2, 200, [3, 1], ""),
    ],
)  # fmt: skip
def test_what_was_hardly_meant_is_noted(
    steps: int, num_samples: int, weights: list[float], note: str
) -> None:
    config = TrainConfig()
    config.training.batch_size, config.training.steps = 128, steps
    config.optimizer.warmup_steps = 0
    parts = [(1, weight) for weight in weights]
    train = SimpleNamespace(parts=parts, num_samples=num_samples)
    data: Any = SimpleNamespace(train=train, settings=SimpleNamespace(buckets=()))
    assert list(notes(config, data)) == ([note] if note else [])


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
