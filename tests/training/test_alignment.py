"""Trainings whose latent is aligned with a vision model, and whose channels are masked."""

import pytest
import torch

import vae_dist
from tests.support.steps import batch, config, make_step
from tests.support.training import arguments, losses, rows, same_weights, stop_after, train
from vae_dist import encode
from vae_dist.train import main
from vae_dist.training import alignment, data

SPATIAL = (
    *("model.latent=spatial", "model.latent_channels=4", "model.initial_sigma=0.1"),
    # with this eps Adam does not divide by the root of rounding errors
    *("optimizer.lr=0.005", "optimizer.eps=0.001", "evaluation.every=0"),
)


@pytest.fixture(scope="module")
def keys(vision):
    return [*SPATIAL, f"objective.alignment={vision}", "training.steps=8"]


@pytest.fixture(scope="module")
def stored(vision, tmp_path_factory, digits):
    """The digits with their features."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "validation").symlink_to(digits / "validation")
    data = (f"data={digits}/train", f"out={folder}/train", "device=cpu", "threads=1")
    assert encode.main([f"features={vision}", *data]) == 0
    return folder


def look_for_none(patch):
    """The same shards, whose features are not looked for."""
    patch.setattr(data, "with_features", lambda index, settings, **_: settings)


@pytest.fixture(scope="module")
def straight(keys, tmp_path_factory, stored):
    run = tmp_path_factory.mktemp("aligned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        look_for_none(patch)
        assert train(run, stored, *keys) == [0]
    return run


def test_the_latent_nears_the_features_and_is_used_without_them(straight, tmp_path, digits):
    logged = [rows(straight)[step] for step in range(1, 9)]
    distances = [row["train/alignment"] for row in logged]
    assert sum(distances[-3:]) < sum(distances[:3])
    weights = [row["optim/alignment_weight"] for row in logged]
    assert weights[0] == 0 and all(weight > 0 for weight in weights[1:])
    assert vae_dist.load(straight, device="cpu").sample(2, seed=0).shape == (2, 1, 28, 28)
    second = ("training.steps=3", f"init_from={straight}")
    assert train(tmp_path / "run", digits, *SPATIAL, *second) == [0]


@pytest.mark.parametrize(
    ("world", "more", "is_stored"),
    [
        (2, "training.microbatch_size=4", False),
        (1, "data.workers=2", True),
        (2, "data.cache_bytes=0", True),
        pytest.param(2, "runtime.parallel=fsdp", False, marks=pytest.mark.slow),
    ],
)
def test_ranks_microbatches_and_stored_features_change_nothing(
    world, more, is_stored, keys, straight, tmp_path, stored, monkeypatch
):
    run = tmp_path / "run"
    if is_stored:  # the vision model is not looked for
        monkeypatch.setattr(alignment, "load_features", None)
        monkeypatch.setattr(data, "feature_width", None)
    else:
        look_for_none(monkeypatch)
    assert train(run, stored, *keys, more, world=world) == [0] * world
    torch.testing.assert_close(losses(run), losses(straight), rtol=1e-4, atol=0)
    found, expected = rows(run), rows(straight)
    for name in ("train/alignment", "optim/alignment_weight"):
        assert found[6][name] == pytest.approx(expected[6][name], rel=1e-2)


def test_a_resumed_run_is_the_same_bit_for_bit(keys, straight, tmp_path, stored, monkeypatch):
    run = tmp_path / "run"
    look_for_none(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(run, stored, *keys)
    assert train(run, stored, *keys) == [0]
    assert torch.equal(losses(run), losses(straight)) and same_weights(run, straight, 8)


def test_the_plan_says_where_features_come_from(keys, digits, stored, tmp_path, capsys):
    def said(data, code, *more):
        assert main(arguments(tmp_path, data, *keys, "dry_run=true", *more)) == code
        return "".join(capsys.readouterr())

    assert "whose features are in the shards\n" in said(stored, 0)
    assert "features" not in said(digits, 0)
    assert "alignment_width=8: the features have" in said(stored, 2, "objective.alignment_width=8")
    assert "'28x28'" in said(stored, 2, "objective.alignment=other")


def test_masked_channels_are_the_last_ones_of_some_images():
    settings, seen = config(), []
    settings.objective.channel_masking = 0.5
    step = make_step(settings)
    draws = torch.tensor([[0.9, 0.0], [0.4, 0.0], [0.4, 0.5], [0.4, 0.99]])
    mask = step._channel_mask(draws, 4).squeeze()
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    step.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step(batch(step, 0), 0)
    is_hidden = (seen[0] == 0).flatten(2).all(2)  # (B, C)
    assert not is_hidden[:, 0].any() and 0 < is_hidden[:, -1].sum() < 16
