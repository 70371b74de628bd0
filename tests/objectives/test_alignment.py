"""Alignment with a vision model: closed forms, features of a tiny DINOv2, errors."""

import math
import shutil

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.objectives.alignment import (
    alignment_distance,
    feature_width,
    load_features,
    weight_at,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def distance(projected, features, m1=0.0, m2=0.0):
    return alignment_distance(projected, features, cosine_margin=m1, distance_margin=m2)


def test_distances_of_vectors_at_known_angles_and_the_weight():
    """Two positions: p at 0 and 90 degrees, f at 0 and 60."""
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    third = math.pi / 3
    f = torch.tensor([[1.0, math.cos(third)], [0.0, math.sin(third)]]).view(1, 2, 1, 2)
    cosine = (0 + 1 - math.sin(third)) / 2
    pairs = 2 * math.cos(third) / 4  # the diagonal agrees
    assert float(distance(3 * p, 5 * f)) == pytest.approx(cosine + pairs, abs=1e-6)
    with_margins = max(0.0, 1 - 0.1 - math.sin(third)) / 2 + 2 * (math.cos(third) - 0.25) / 4
    assert float(distance(p, f, 0.1, 0.25)) == pytest.approx(with_margins, abs=1e-6)
    column = torch.randn(2, 5, 1, 1)  # equal directions, whatever their length and grid
    found = distance(column.expand(-1, -1, 4, 6), 7 * column.expand(-1, -1, 3, 3))
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-5)
    weights = [weight_at(0.5, 0.1, step=step, num_steps=5) for step in (0, 1, 2, 4, 9)]
    assert weights == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])


def test_features_are_those_of_the_model_at_whole_patches(vision, tmp_path):
    images, own = torch.rand(2, 3, 28, 21) * 2 - 1, shutil.copytree(vision, tmp_path / "own")
    constants = '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    (own / "preprocessor_config.json").write_text(constants)
    model = transformers.AutoModel.from_pretrained(vision).eval()
    for folder, mean, std in (
        (own, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (vision, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        features = load_features(str(folder), torch.device("cpu"))
        found = features(images)
        assert found.shape == (2, 16, 4, 3) and not found.requires_grad
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        with torch.no_grad():
            tokens = model(pixel_values=((images + 1) / 2 - mean) / std).last_hidden_state
        torch.testing.assert_close(found[:, :, 1, 2], tokens[:, 1 + 1 * 3 + 2])
    assert features(images[:, :1, :26, :18]).shape == (2, 16, 4, 3)  # 26 -> 28, 18 -> 21
    (tmp_path / "config.json").write_bytes((vision / "config.json").read_bytes())
    # the width is known without the weights, which a pickle does not hold for us
    assert feature_width(str(tmp_path)) == 16
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no vision model can be loaded"):
        load_features(str(tmp_path), torch.device("cpu"))
    bert = '{"model_type": "bert"}'
    for content, fragment in (("{}", "no vision model"), (bert, "no features of square patches")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=fragment):
            feature_width(str(tmp_path))
