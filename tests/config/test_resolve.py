"""What `auto` stands for, given the facts; the result is read-only."""

import copy
from dataclasses import replace

import pytest

from tests.config.conftest import load
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import shown, value_of
from vae_dist.config.load import from_yaml, to_yaml
from vae_dist.config.resolve import Facts, resolve

BUCKETS = "data.resolution={'area':65536,'multiple':16,'max_aspect':2.0}"
CPU, GPU = Facts(mean_sample_bytes=300), Facts(True, True, mean_sample_bytes=300)
BROKEN = replace(GPU, compiler_problem="no compiler")


def test_automatic_windows_hold_so_many_bytes():
    # 2 * 256 * bytes * window <= 4 GiB  <=>  window <= 2**23 / bytes; of 64 slots of 4 images
    for num_bytes, window, bucket_window in (
        (None, "auto", "auto"),
        (300, 32, 128),
        (2**18 + 1, 16, 64),
        (2**23 + 1, 1, 16),  # the smallest, however large it is
    ):
        facts = Facts(mean_sample_bytes=num_bytes)
        assert resolve(load(), facts).data.window == window
        assert resolve(load(BUCKETS), facts).data.window == bucket_window
        assert resolve(load("data.window=7"), facts).data.window == 7


@pytest.mark.parametrize(
    ("asked", "facts", "decided"),
    [
        ("", CPU, "training.precision=no data.slots=64 runtime.compile=false "
                  "runtime.channels_last=false evaluation.batch_size=256"),
        ("training.batch_size=100", CPU, "data.slots=50"),  # the largest divisor up to 64
        ("training.batch_size=97", CPU, "data.slots=1"),
        (f"{BUCKETS} training.batch_size=36", CPU, "data.slots=9"),  # of 4 images
        ("", GPU, "training.precision=bf16 runtime.compile=true runtime.channels_last=true"),
        ("", replace(CPU, has_bf16=True), "training.precision=bf16"),
        ("", replace(CPU, world=4), "evaluation.batch_size=64"),
        ("", BROKEN, "runtime.compile=false"),
        ("training.precision=bf16", CPU, "training.precision=bf16"),
        ("training.precision=no", GPU, "runtime.channels_last=false"),
        ("training.microbatch_size=8", CPU, "evaluation.batch_size=8"),
        ("training.microbatch_size=auto", GPU, "evaluation.batch_size=32"),
        ("perceptual.kind=auto", CPU, "perceptual.kind=structure"),
        ("perceptual.kind=auto", replace(CPU, has_lpips=True), "perceptual.kind=lpips"),
        ("runtime.parallel=fsdp", GPU, "runtime.compile=false"),
        ("runtime.compile=false", GPU, "runtime.channels_last=false"),
        ("runtime.compile=blocks", GPU, "runtime.channels_last=true"),
        ("training.batch_size=64", GPU, "runtime.compile=false"),  # images of any size
        ("training.batch_size=64 data.resolution=8", GPU, "runtime.compile=true"),
        # one number of images for each bucket
        (f"{BUCKETS} runtime.compile=true", CPU, "training.microbatch_size=4"),
    ],
)  # fmt: skip
def test_auto_is_decided_by_the_facts(asked, facts, decided):
    config = load(*asked.split())
    before = copy.deepcopy(config)
    found = resolve(config, facts)
    assert config == before
    for word in decided.split():
        name, _, value = word.partition("=")
        assert shown(value_of(found, name)) == value
    assert resolve(found, GPU if facts is CPU else facts) == found


@pytest.mark.parametrize(
    ("asked", "facts", "problem"),
    [
        ("training.precision=fp16", CPU, "training.precision=fp16 needs an accelerator"),
        ("runtime.compile=blocks", BROKEN, "runtime.compile=blocks: no compiler; use false"),
        ("runtime.compile=true", replace(CPU, has_bf16=True), "gets gradients of bfloat16 wrong"),
    ],
)
def test_what_the_machines_cannot_do_is_refused(asked, facts, problem):
    with pytest.raises(ConfigError, match=problem):
        resolve(load(asked), facts)


def test_a_resolved_config_is_read_only_and_its_copies_are_not():
    found = resolve(load(), CPU)
    with pytest.raises(AttributeError, match="steps: the config is read-only"):
        found.training.steps = 3
    for mine in (copy.deepcopy(found), from_yaml(to_yaml(found))):
        assert mine == found
        mine.training.steps = 3
