"""Our spatial towers have the layout of diffusers' AutoencoderKL, as the package makes it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from vae_dist.config.schema import TrainConfig
from vae_dist.models.build import build_vae
from vae_dist.models.diffusers import diffusers_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test asks the Hub
diffusers = pytest.importorskip("diffusers")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict().items()
    return {name: tuple(t.shape) for name, t in state if not name.startswith("likelihood.")}


@pytest.mark.parametrize("attention", [True, False])
def test_names_and_shapes_are_those_of_autoencoder_kl(attention: bool) -> None:
    config = TrainConfig(config="test")
    config.model.attention = attention
    theirs = diffusers_config(config, (64, 64))
    with torch.device("meta"):
        ours = shapes(build_vae(config, (64, 64)))
        assert ours == shapes(diffusers.AutoencoderKL.from_config(theirs))
    assert len(ours) > 150
