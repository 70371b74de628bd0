"""Rules of perceptual and adversarial terms, latent noise, half size, decoder-only runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_checks import config
from vae_dist.config.checks import problems

ON = {"adversarial__weight": 0.5}
DECODER = {"training__train_only": "decoder", "init_from": "runs/first"}

GOOD: list[dict[str, Any]] = [
    ON | {"perceptual__kind": "auto", "perceptual__weights": "weights"},
    ON | {"adversarial__r1": 1.0, "adversarial__r1_every": 4, "likelihood__kind": "laplace"},
    ON | {"runtime__parallel": "fsdp"},
    {"perceptual__kind": "structure", "data__channels": 5, "perceptual__weight": 0.1},
    {"likelihood__kind": "laplace", "likelihood__variance": "per_pixel"},
    {"likelihood__kind": "laplace", "data__dequantize": False},
    {"likelihood__kind": "laplace", "data__bits": 32},
    {"objective__scale_equivariance": 0.25, "objective__latent_noise": 0.5},
    DECODER | ON | {"objective__beta": 1e-6},
]


@pytest.mark.parametrize("values", GOOD)
def test_sound_configs_pass(values: dict[str, Any]) -> None:
    assert problems(config(**values)) == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"perceptual__weight": 2.0}, "perceptual.weight=2 has no effect with perceptual.kind=none"),
    ({"perceptual__weights": "w"}, "perceptual.weights=w has no effect with perceptual.kind=none"),
    (
        {"perceptual__kind": "structure", "perceptual__weights": "w"},
        "perceptual.weights=w has no effect with perceptual.kind=structure",
    ),
    (
        {"perceptual__kind": "structure", "perceptual__weight": 0.0},
        "perceptual.weight=0 must be more than 0",
    ),
    ({"perceptual__kind": "lpips", "data__channels": 4}, "data.channels=4; use perceptual.kind="),
    ({"perceptual__kind": "structure", "data__mask": "random"}, "and data.mask=random says that"),
    (
        {"perceptual__kind": "structure", "objective__importance_samples": 4},
        "objective.importance_samples=4 must be 1",
    ),
    (
        {"adversarial__channels": 32},
        "adversarial.channels=32 has no effect with adversarial.weight=0",
    ),
    ({"adversarial__betas": [0.5, 0.5]}, "adversarial.betas=[0.5, 0.5] has no effect with"),
    (ON | {"adversarial__betas": [0.5, 1.0]}, "adversarial.betas=[0.5, 1] must be two numbers in"),
    (
        ON | {"adversarial__r1_every": 8},
        "adversarial.r1_every=8 has no effect with adversarial.r1=0",
    ),
    (ON | {"adversarial__layers": 0}, "adversarial.layers=0 must be at least 1"),
    (ON | {"adversarial__lr": 0.0}, "adversarial.lr=0 must be more than 0"),
    (ON | {"adversarial__start_step": 9000}, "leave no step of training.steps=10000"),
    (
        ON | {"model__arch": "dense", "model__latent": "vector"},
        "adversarial.weight=0.5 needs convolutional towers",
    ),
    (ON | {"data__mask": "half"}, "adversarial.weight compares whole pictures, and data.mask=half"),
    (
        {"objective__scale_equivariance": 0.2, "model__latent": "vector"},
        "objective.scale_equivariance=0.2 needs model.latent=spatial",
    ),
    (
        {"objective__scale_equivariance": 0.2, "likelihood__kind": "discretized_gaussian"},
        "likelihood.kind must be one of gaussian, laplace",
    ),
    ({"objective__latent_noise": -0.1}, "objective.latent_noise=-0.1 must be at least 0"),
    (
        {"objective__latent_noise": 0.1, "objective__importance_samples": 2},
        "objective.latent_noise is for one draw of z",
    ),
    ({"training__train_only": "decoder"}, "an encoder of random weights; give init_from=RUN"),
    (
        DECODER | {"objective__free_bits": 0.5},
        "objective.free_bits=0.5 has no effect with training.train_only=decoder",
    ),
    (
        {"likelihood__kind": "laplace", "likelihood__mixtures": 3},
        "likelihood.mixtures=3 has no effect with likelihood.kind=laplace",
    ),
]


@pytest.mark.parametrize(("values", "words"), BAD)
def test_a_broken_rule_names_its_keys(values: dict[str, Any], words: str) -> None:
    found = problems(config(**values))
    assert len(found) == 1 and words in found[0], found
