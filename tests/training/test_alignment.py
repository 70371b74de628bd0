"""Trainings whose latent is aligned with a vision model, and whose channels are masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vae_dist
from tests.support.steps import batch, config, make_step, one_process
from tests.support.training import losses, rows, same_weights, stop_after, train
from vae_dist.config.errors import ConfigError

SPATIAL = (
    "model.latent=spatial",
    "model.latent_channels=4",
    "model.initial_sigma=0.1",
    "training.batch_size=16",
    "data.slots=8",
    "optimizer.lr=0.005",
    "evaluation.every=0",
    "log.every=1",
)


@pytest.fixture(scope="module")
def keys(vision: Path) -> list[str]:
    return [*SPATIAL, f"objective.alignment={vision}", "training.steps=12"]


@pytest.fixture(scope="module")
def straight(keys: list[str], tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    run = tmp_path_factory.mktemp("aligned") / "run"
    assert train(run, digits, *keys) == [0]
    return run


def test_the_latent_comes_nearer_to_the_features(straight: Path) -> None:
    logged = rows(straight)
    distances = [logged[step]["train/alignment"] for step in range(1, 13)]
    assert sum(distances[-3:]) < 0.9 * sum(distances[:3])
    weights = [logged[step]["optim/alignment_weight"] for step in range(1, 13)]
    assert weights[0] == 0 and all(weight > 0 for weight in weights[1:])


@pytest.mark.parametrize(
    ("world", "more"),
    [(1, "training.microbatch_size=4"), (2, "seed=0"), (2, "runtime.parallel=fsdp")],
)
def test_ranks_and_microbatches_change_nothing(
    world: int, more: str, keys: list[str], straight: Path, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    assert train(run, digits, *keys, more, world=world) == [0] * world
    torch.testing.assert_close(losses(run), losses(straight), rtol=1e-4, atol=0)
    for name in ("train/alignment", "optim/alignment_weight"):
        assert rows(run)[6][name] == pytest.approx(rows(straight)[6][name], rel=1e-2)


def test_a_resumed_run_is_the_same_bit_for_bit(
    keys: list[str], straight: Path, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(run, digits, *keys)
    assert train(run, digits, *keys) == [0]
    assert torch.equal(losses(run), losses(straight))
    assert same_weights(run, straight, 12)


def test_the_run_is_used_without_its_vision_model(
    straight: Path, tmp_path: Path, digits: Path
) -> None:
    vae = vae_dist.load(straight, device="cpu")
    assert vae.sample(2, seed=0).shape == (2, 1, 28, 28)
    second = ("training.steps=1", f"init_from={straight}")
    assert train(tmp_path / "run", digits, *SPATIAL, *second) == [0]


def test_what_alignment_does_not_go_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.alignment=.* needs model.latent=spatial"):
        vae_dist.config("config=debug", "objective.alignment=x", "model.latent=vector")
    with pytest.raises(ConfigError, match=r"objective.alignment_weight=2 has no effect"):
        vae_dist.config("config=debug", "objective.alignment_weight=2")


def test_masked_channels_are_the_last_ones_of_some_images() -> None:
    settings = config()
    settings.objective.channel_masking = 0.5
    runtime = one_process()
    step = make_step(settings, runtime, (8, 8))
    draws = torch.tensor([[0.9, 0.0], [0.4, 0.0], [0.4, 0.5], [0.4, 0.99]])
    mask = step._channel_mask(draws, 4).squeeze()
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    seen = []
    step.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    step(batch(runtime, 0), 0)
    assert seen[0].shape[0] == 16
