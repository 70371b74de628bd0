"""What `auto` stands for, given the facts; the result is read-only."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.errors import ConfigError
from vae_dist.config.load import from_yaml, to_yaml
from vae_dist.config.resolve import Facts, default_slots, resolve, world_size_problem
from vae_dist.config.schema import TrainConfig

BUCKETS = {"area": 65536, "multiple": 16, "max_aspect": 2.0}
CPU, GPU = Facts(mean_sample_bytes=300), Facts(True, True, mean_sample_bytes=300)


def config(**values: Any) -> TrainConfig:
    """A sound config with `section__key=value` changes."""
    made = TrainConfig(config="plain", run="runs/plain")
    made.data.train, made.data.validation = "shards/train", "shards/validation"
    for name, value in values.items():
        section, _, leaf = name.partition("__")
        assert hasattr(getattr(made, section), leaf)
        setattr(getattr(made, section), leaf, value)
    return made


@given(st.integers(1, 4096))
def test_default_slots_is_the_largest_divisor_up_to_64(batch_size: int) -> None:
    slots = default_slots(batch_size)
    assert batch_size % slots == 0 and slots <= 64
    assert not any(batch_size % other == 0 for other in range(slots + 1, 65))


def test_slots_of_aspect_buckets_have_four_images_where_the_batch_has_as_many() -> None:
    sizes = (1, 6, 8, 64, 256, 1024)
    assert [default_slots(n, buckets=True) for n in sizes] == [1, 1, 2, 16, 64, 64]


@given(st.integers(1, 256), st.integers(1, 300))
def test_a_refused_world_size_lists_the_counts_that_work(slots: int, world: int) -> None:
    problem = world_size_problem(config(data__slots=slots), world)
    assert (problem is None) == (slots % world == 0)
    if problem is not None:
        listed = problem.split("work are ")[1].split(".")[0]
        fitting = [count for count in range(1, slots + 1) if slots % count == 0]
        assert [int(count) for count in listed.split(", ")] == fitting
        assert f"data.slots={slots}" in problem and f"multiple of {world}" in problem


@pytest.mark.parametrize(
    ("num_bytes", "window", "bucket_window"),
    # 2 * 256 * bytes * window <= 4 GiB  <=>  window <= 2**23 / bytes; of 64 slots of 4 images
    [(None, "auto", "auto"), (300, 32, 128), (2**18 + 1, 16, 64), (2**20, 8, 32), (2**23, 1, None)],
)
def test_the_window_fits_into_window_bytes(
    num_bytes: float | None, window: int | str, bucket_window: int | str | None
) -> None:
    facts, buckets = Facts(mean_sample_bytes=num_bytes), config(data__resolution=BUCKETS)
    assert resolve(config(), facts).data.window == window
    if bucket_window is not None:
        assert resolve(buckets, facts).data.window == bucket_window
        return
    with pytest.raises(
        ConfigError, match=r"too small for two windows of each lane; .* at least 17179869"
    ):
        resolve(buckets, facts)


def test_a_window_that_cannot_fit_is_refused_and_a_given_one_is_kept() -> None:
    large = Facts(mean_sample_bytes=2**23 + 1)
    assert resolve(config(data__window=7), large).data.window == 7
    with pytest.raises(ConfigError, match=r"data\.window_bytes=4294967296 .* at least 4294967808"):
        resolve(config(), large)


@pytest.mark.parametrize(
    ("values", "facts", "expected"),
    [
        ({}, CPU, {"training__precision": "no", "data__slots": 64}),
        ({}, GPU, {"training__precision": "bf16"}),
        ({}, replace(CPU, has_bf16=True), {"training__precision": "bf16"}),
        ({"training__precision": "fp16"}, GPU, {"training__precision": "fp16"}),
        ({"training__precision": "bf16"}, CPU, {"training__precision": "bf16"}),
        ({"training__microbatch_size": "auto"}, GPU, {"training__microbatch_size": "auto"}),
        ({"perceptual__kind": "auto"}, CPU, {"perceptual__kind": "structure"}),
        (
            {"perceptual__kind": "auto"},
            replace(CPU, has_lpips=True),
            {"perceptual__kind": "lpips"},
        ),
        # 64 slots of 256 native images hold several: these share a size, and are compiled
        ({}, CPU, {"runtime__compile": "false", "runtime__channels_last": "false"}),
        ({}, GPU, {"runtime__compile": "true", "runtime__channels_last": "true"}),
        ({"training__precision": "no"}, GPU, {"runtime__channels_last": "false"}),
        ({"runtime__parallel": "fsdp"}, GPU, {"runtime__compile": "false"}),
        ({"runtime__compile": "false"}, GPU, {"runtime__channels_last": "false"}),
        ({"training__batch_size": 64}, GPU, {"runtime__compile": "false"}),  # of any size
        ({"training__batch_size": 64, "data__resolution": 8}, GPU, {"runtime__compile": "true"}),
        ({}, replace(GPU, compiler_problem="no compiler"), {"runtime__compile": "false"}),
        ({"runtime__compile": "blocks"}, GPU, {"runtime__channels_last": "true"}),
        # one number of images for each bucket
        (
            {"data__resolution": BUCKETS, "runtime__compile": "true"},
            CPU,
            {"training__microbatch_size": 4},
        ),
    ],
)
def test_auto_is_decided_by_the_facts(
    values: dict[str, Any], facts: Facts, expected: dict[str, Any]
) -> None:
    asked = config(**values)
    before = copy.deepcopy(asked)
    found = resolve(asked, facts)
    assert asked == before
    for name, value in expected.items():
        section, _, leaf = name.partition("__")
        assert getattr(getattr(found, section), leaf) == value
    assert resolve(found, GPU if facts is CPU else facts) == found


@pytest.mark.parametrize(
    ("values", "facts", "message"),
    [
        ({"training__precision": "fp16"}, CPU, r"training\.precision=fp16 needs an accelerator"),
        (
            {"runtime__compile": "blocks"},
            replace(GPU, compiler_problem="no compiler"),
            r"runtime\.compile=blocks: no compiler; set runtime\.compile=false",
        ),
        (
            {"runtime__compile": "true"},
            replace(CPU, has_bf16=True),
            r"runtime\.compile=true: torch 2\.13 gets gradients of bfloat16 wrong",
        ),
    ],
)
def test_what_the_machines_cannot_do_is_refused(
    values: dict[str, Any], facts: Facts, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(**values), facts)


def test_a_resolved_config_is_read_only_and_its_copies_are_not() -> None:
    found = resolve(config(), CPU)
    with pytest.raises(AttributeError, match="steps: the config is read-only"):
        found.training.steps = 3
    for mine in (copy.deepcopy(found), from_yaml(to_yaml(found))):
        assert mine == found
        mine.training.steps = 3
