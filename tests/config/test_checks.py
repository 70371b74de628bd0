"""Rules between keys: each broken one names its keys; slots, windows and what `auto` stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.automatic import default_slots, resolve, resolve_precision, world_size_problem
from vae_dist.config.checks import problems, violations
from vae_dist.config.commands import (
    EvaluateCommand,
    ImputeCommand,
    PackCommand,
    ReconstructCommand,
    SampleCommand,
)
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import keys
from vae_dist.config.rules import RANGES
from vae_dist.config.schema import TrainConfig


def config(**values: Any) -> TrainConfig:
    """A sound config with `section__key=value` changes."""
    made = TrainConfig(config="plain", run="runs/plain")
    made.data.train, made.data.validation = "shards/train", "shards/validation"
    for name, value in values.items():
        section, _, leaf = name.rpartition("__")
        holder = getattr(made, section) if section else made
        assert hasattr(holder, leaf)
        setattr(holder, leaf, value)
    return made


def test_the_defaults_are_sound() -> None:
    assert problems(config()) == []


BUCKETS = {"area": 65536, "multiple": 16, "max_aspect": 2.0}

GOOD: list[dict[str, Any]] = [
    {"data__resolution": 64, "data__crop": "random"},
    {"data__resolution": [178, 218]},
    {"data__resolution": BUCKETS, "data__crop": "random"},
    {"data__resolution": BUCKETS, "data__slots": 32, "data__window": 64},
    {
        "data__resolution": BUCKETS,
        "runtime__parallel": "fsdp",
        "training__microbatch_size": 4,
    },
    {"data__channels": 2, "data__bits": 16},
    {"data__window": 4},
    {"data__train": ["a", "b-{0..3}.tar"]},
    {"likelihood__kind": "bernoulli", "data__channels": 1},
    {"likelihood__variance": "fixed", "likelihood__sigma": 0.3},
    {"likelihood__variance": "per_pixel", "likelihood__min_sigma": 0.01},
    {"likelihood__variance": "per_channel"},
    {"likelihood__kind": "discretized_gaussian", "likelihood__variance": "per_pixel"},
    {"likelihood__kind": "discretized_logistic_mixture", "likelihood__mixtures": 5},
    {
        "likelihood__kind": "bernoulli",
        "likelihood__binarization": "static",
        "data__channels": 1,
    },
    {"objective__importance_samples": 5, "objective__gradient": "doubly_reparameterized"},
    {"objective__free_bits": 0.5, "objective__beta_warmup_steps": 100, "objective__beta_cycles": 4},
    {"model__latent": "vector", "data__resolution": 32},
    {"data__bundled": "digits"},
    {"training__microbatch_size": 12, "data__slots": 64},
    {"optimizer__schedule": "cosine", "optimizer__final_lr_fraction": 0.1},
]


@pytest.mark.parametrize("values", GOOD)
def test_sound_configs_pass(values: dict[str, Any]) -> None:
    assert problems(config(**values)) == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"data__train": ""}, "data.train= is no folder"),
    ({"data__validation": [1]}, "data.validation=[1] is no folder"),
    ({"data__channels": 0}, "data.channels=0 must be at least 1"),
    ({"data__bits": 12}, "data.bits=12 is none of 5, 8, 16 and 32"),
    ({"data__resolution": "big"}, "data.resolution=big is none of N, [H, W], native and aspect"),
    ({"data__resolution": {"area": 64}}, "data.resolution={area: 64} must have area, multiple and"),
    (
        {"data__resolution": BUCKETS | {"multiple": 300}},
        "has room for no bucket: area must be at least multiple^2 = 90000; for example",
    ),
    ({"data__resolution": BUCKETS | {"max_aspect": 0.5}}, "must have a max_aspect"),
    ({"data__resolution": BUCKETS | {"area": 1.5}}, "must have positive whole numbers of pixels"),
    (
        {"data__resolution": BUCKETS, "model__latent": "vector"},
        "model.latent=vector works at one; use model.latent=spatial",
    ),
    (
        {"data__resolution": BUCKETS, "data__slots": 32, "data__window": 20},
        "data.window=20 is not a multiple of the 8 images of a slot",
    ),
    (
        {"data__resolution": BUCKETS, "runtime__parallel": "fsdp"},
        "set training.microbatch_size=4, the images of one slot, or runtime.parallel=ddp",
    ),
    (
        {"runtime__compile": "blocks", "runtime__parallel": "fsdp"},
        "runtime.compile=blocks needs runtime.parallel=ddp (towers that FSDP cuts",
    ),
    (
        {"runtime__compile": "blocks", "model__arch": "dense", "model__latent": "vector"},
        "runtime.compile=blocks finds none in model.arch=dense; use true",
    ),
    ({"data__resolution": [64]}, "data.resolution=[64] is none of"),
    ({"data__resolution": 0}, "data.resolution=0 is none of"),
    ({"data__resolution": True}, "data.resolution=true is none of"),
    ({"data__crop": "random"}, "data.crop=random has no effect with data.resolution=native"),
    ({"model__label_dropout": 0.1}, "model.label_dropout=0.1 has no effect with model.num_classes"),
    ({"data__mask_fraction": 0.2}, "data.mask_fraction=0.2 has no effect with data.mask=none"),
    (
        {"data__mask": "random", "data__mask_fraction": 1.0},
        "data.mask_fraction=1 leaves no pixel to learn from",
    ),
    ({"data__mask": "nan"}, "data.mask=nan needs float images: set data.bits=32 (it is 8)"),
    ({"model__num_classes": 1}, "model.num_classes=1 tells nothing; use 0"),
    ({"data__window": 0}, "data.window=0 is neither auto nor a count"),
    ({"data__max_skipped_fraction": 1.5}, "data.max_skipped_fraction=1.5 must be at most 1"),
    ({"data__bundled": "digits", "data__train": "mine"}, "data.train=mine and data.validation="),
    ({"data__slots": 60}, "training.batch_size=256 is not a multiple of data.slots=60; try "),
    ({"data__slots": 512}, "training.batch_size=256 is not a multiple of data.slots=512"),
    ({"training__microbatch_size": 6}, "not a multiple of the 4 images of a slot"),
    ({"training__microbatch_size": 512}, "is more than training.batch_size=256"),
    ({"training__batch_size": 0}, "training.batch_size=0 must be at least 1"),
    ({"training__ema_decay": 1.0}, "training.ema_decay=1 must be in [0, 1)"),
    ({"model__channels": []}, "model.channels=[] must be one positive width"),
    ({"model__channels": [64, 80]}, "model.norm_groups=32 does not divide every width"),
    ({"model__channels": [32, -32]}, "model.channels=[32, -32] must be one positive width"),
    ({"likelihood__kind": "bernoulli"}, "set data.channels=1 (it is 3)"),
    ({"likelihood__sigma": 0.2}, "likelihood.sigma=0.2 has no effect with likelihood.variance="),
    ({"likelihood__sigma": 0.0, "likelihood__variance": "fixed"}, "must be more than 0"),
    (
        {"likelihood__min_sigma": 0.1, "likelihood__variance": "fixed"},
        "likelihood.min_sigma=0.1 has no effect with likelihood.variance=fixed",
    ),
    (
        {"likelihood__kind": "bernoulli", "data__channels": 1, "data__dequantize": False},
        "data.dequantize=false has no effect with likelihood.kind=bernoulli",
    ),
    (
        {"likelihood__kind": "discretized_gaussian", "data__dequantize": False},
        "data.dequantize=false has no effect with likelihood.kind=discretized_gaussian",
    ),
    (
        {"likelihood__kind": "discretized_logistic_mixture", "likelihood__variance": "fixed"},
        "likelihood.variance=fixed has no effect with likelihood.kind=discretized_logistic_mixture",
    ),
    ({"likelihood__mixtures": 5}, "likelihood.mixtures=5 has no effect with likelihood.kind="),
    ({"likelihood__mixtures": 0}, "likelihood.mixtures=0 must be at least 1"),
    ({"likelihood__binarization": "soft"}, "likelihood.binarization=soft has no effect with"),
    ({"objective__importance_samples": 0}, "objective.importance_samples=0 must be at least 1"),
    (
        {"objective__gradient": "doubly_reparameterized"},
        "objective.gradient=doubly_reparameterized has no effect with "
        "objective.importance_samples=1",
    ),
    ({"objective__free_bits": -1.0}, "objective.free_bits=-1 must be at least 0"),
    (
        {"objective__free_bits": 1.0, "objective__beta": 0.0},
        "objective.free_bits=1 has no effect with objective.beta=0",
    ),
    ({"objective__beta_warmup": "cosine"}, "has no effect with objective.beta_warmup_steps=0"),
    (
        {"objective__beta_warmup_steps": 4000, "objective__beta_cycles": 3},
        "take 20000 steps, more than training.steps=10000; try objective.beta_warmup_steps=1666",
    ),
    ({"optimizer__lr": float("nan")}, "optimizer.lr=nan is not a finite number"),
    ({"optimizer__lr": 0.0}, "optimizer.lr=0 must be more than 0"),
    ({"optimizer__betas": [0.9]}, "optimizer.betas=[0.9] must be two numbers"),
    ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas=[0.9, 1] must be two numbers"),
    (
        {"optimizer__schedule": "constant", "optimizer__final_lr_fraction": 0.1},
        "optimizer.final_lr_fraction=0.1 has no effect with optimizer.schedule=constant",
    ),
    ({"log__every": 0}, "log.every=0 must be at least 1"),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[text for _, text in BAD])
def test_a_broken_rule_names_its_key(values: dict[str, Any], expected: str) -> None:
    (found,) = violations(config(**values))
    assert expected in found.text
    assert all(name in keys(TrainConfig) for name in found.keys)
    assert found.keys[0] in found.text or found.keys[1] in found.text


def test_each_range_belongs_to_a_key() -> None:
    commands = (SampleCommand, ReconstructCommand, ImputeCommand, EvaluateCommand, PackCommand)
    classes = (TrainConfig, *commands)
    known = {name for cls in classes for name in keys(cls)}
    assert set(RANGES) <= known


@given(st.integers(1, 4096))
def test_default_slots_is_the_largest_divisor_up_to_64(batch_size: int) -> None:
    slots = default_slots(batch_size)
    assert batch_size % slots == 0 and slots <= 64
    assert not any(batch_size % other == 0 for other in range(slots + 1, 65))
    if batch_size <= 64:
        assert slots == batch_size


@given(st.integers(1, 256), st.integers(1, 300))
def test_a_refused_world_size_lists_the_counts_that_work(slots: int, world: int) -> None:
    problem = world_size_problem(config(data__slots=slots), world)
    assert (problem is None) == (slots % world == 0)
    if problem is not None:
        listed = problem.split("work are ")[1].split(".")[0]
        assert [int(count) for count in listed.split(", ")] == [
            count for count in range(1, slots + 1) if slots / count == slots // count
        ]
        assert f"data.slots={slots}" in problem and f"multiple of {world}" in problem


@pytest.mark.parametrize(
    ("mean_sample_bytes", "window"),
    # 2 * 256 * bytes * window <= 4 GiB  <=>  window <= 2**23 / bytes
    [(300, 32), (2**18, 32), (2**18 + 1, 16), (2**20, 8), (2**23, 1)],
)
def test_automatic_window_fits_into_window_bytes(mean_sample_bytes: float, window: int) -> None:
    assert resolve(config(), mean_sample_bytes=mean_sample_bytes).data.window == window


def test_a_window_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.window_bytes=4294967296 .* at least 4294967808"):
        resolve(config(), mean_sample_bytes=2**23 + 1)


def test_resolve_fills_a_copy_and_keeps_what_was_given() -> None:
    given_config = config()
    before = copy.deepcopy(given_config)
    found = resolve(given_config, mean_sample_bytes=300)
    assert given_config == before
    assert (found.data.slots, found.data.window, found.training.precision) == (64, 32, "auto")
    assert resolve(found, mean_sample_bytes=2**23) == found
    assert problems(found) == []


@pytest.mark.parametrize(
    ("given", "has_accelerator", "has_bf16", "expected"),
    [
        ("auto", True, True, "bf16"),
        ("auto", False, True, "bf16"),  # a CPU that has it
        ("auto", False, False, "no"),
        ("fp16", True, True, "fp16"),
        ("bf16", False, False, "bf16"),
    ],
)
def test_the_precision_is_resolved_once(
    given: str, has_accelerator: bool, has_bf16: bool, expected: str
) -> None:
    given_config = config(training__precision=given)
    found = resolve_precision(given_config, has_accelerator=has_accelerator, has_bf16=has_bf16)
    assert found.training.precision == expected and given_config.training.precision == given


def test_fp16_needs_an_accelerator() -> None:
    half = config(training__precision="fp16")
    with pytest.raises(ConfigError, match=r"training\.precision=fp16 needs an accelerator"):
        resolve_precision(half, has_accelerator=False, has_bf16=False)


def test_slots_and_window_of_aspect_buckets() -> None:
    """Slots of at least four images, windows of up to 32 slots."""
    assert [default_slots(n, buckets=True) for n in (1, 6, 8, 64, 256, 1024)] == [
        1,
        1,
        2,
        16,
        64,
        64,
    ]
    bucketed = config(data__resolution=BUCKETS, training__batch_size=64)
    found = resolve(bucketed, mean_sample_bytes=1e5)
    assert (found.data.slots, found.data.window) == (16, 32 * 4)
    bucketed.data.window_bytes = 2 * 5 * 64 * 10**5
    found = resolve(bucketed, mean_sample_bytes=1e5)
    assert found.data.window == 4 * 4
    bucketed.data.window_bytes = 2 * 3 * 64 * 10**5
    with pytest.raises(ConfigError, match=r"less than 8 slots of each lane; .* 51200000"):
        resolve(bucketed, mean_sample_bytes=1e5)
