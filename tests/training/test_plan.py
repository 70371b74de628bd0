"""The notes of the plan: what a config says that its writer may not have meant."""

from types import SimpleNamespace

import pytest

from vae_dist.config.schema import TrainConfig
from vae_dist.training.plan import notes


@pytest.mark.parametrize(
    ("steps", "num_samples", "weights", "note"),
    [
        (100_000, 500, [], "each image is shown 25,600 times, more than most VAEs gain from; "
                           "training.steps=3906 makes 1,000"),
        (3906, 500, [], ""),
        (2, 256, [], ""),
        (2, 257, [], "the run ends within its first epoch, after 256 of 257 images"),
        (2, 200, [1000, 1], "training.batch_size=128 cannot be divided by the weights 1000:1 of "
                            "data.train; the data sets get 127:1 of it instead; raise "
                            "training.batch_size, or weigh them so"),
        (2, 200, [3, 1], ""),
    ],
)  # fmt: skip
def test_what_was_hardly_meant_is_noted(steps, num_samples, weights, note):
    config = TrainConfig()
    config.training.batch_size, config.training.steps = 128, steps
    config.optimizer.warmup_steps = 0
    train = SimpleNamespace(parts=[(1, weight) for weight in weights], num_samples=num_samples)
    data = SimpleNamespace(train=train, settings=SimpleNamespace(buckets=()))
    assert list(notes(config, data)) == ([note] if note else [])
