"""Every refusal of a value or of values together: (overrides, key, fragment of the sentence)."""

from __future__ import annotations

import pytest

from tests.config.test_resolve import config as sound
from vae_dist.config.checks import CONFLICTS, problems, violations
from vae_dist.config.commands import EncodeCommand, EvaluateCommand, ImputeCommand, SampleCommand
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import conditions, keys, shown, value_of
from vae_dist.config.load import load_command, load_train_config
from vae_dist.config.schema import TrainConfig

BUCKETS = (
    "data.resolution={area:·65536,·multiple:·16,·max_aspect:·2.0}"  # a dot in the middle: a space
)
ON = "adversarial.weight=0.5"
DECODER = "training.train_only=decoder init_from=runs/first"
DENSE = "model.arch=dense model.latent=vector"
FSDP = "runtime.parallel=fsdp"


def put(config: TrainConfig, name: str, value: object) -> None:
    section, _, leaf = name.rpartition(".")
    setattr(value_of(config, section) if section else config, leaf, value)


def words(overrides: str) -> list[str]:
    return [word.replace("·", " ") for word in overrides.split()]


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "data.resolution=64 data.crop=random",
        "data.resolution=[178,218]",
        f"{BUCKETS} data.crop=random",
        f"{BUCKETS} data.slots=32 data.window=64",
        f"{BUCKETS} {FSDP} training.microbatch_size=4",
        "data.channels=2 data.bits=16",
        "data.window=4",
        "data.train=[a,b-{0..3}.tar]",
        "data.train=[{path:·a,·weight:·2},{path:·b}]",
        "data.train={path:·2024,·index:·i}",
        "data.mask=nan data.bits=32 data.dequantize=true",
        "likelihood.kind=bernoulli data.channels=1 likelihood.binarization=static",
        "likelihood.variance=fixed likelihood.sigma=0.3",
        "likelihood.variance=per_pixel likelihood.min_sigma=0.01",
        "likelihood.kind=discretized_gaussian likelihood.variance=per_pixel",
        "likelihood.kind=discretized_logistic_mixture likelihood.mixtures=5",
        "likelihood.kind=laplace likelihood.variance=per_pixel data.dequantize=false",
        "likelihood.kind=laplace data.bits=32",
        "objective.importance_samples=5 objective.gradient=doubly_reparameterized",
        "objective.free_bits=0.5 objective.beta_warmup_steps=100 objective.beta_cycles=4",
        "objective.scale_equivariance=0.25 objective.latent_noise=0.5",
        "model.latent=vector data.resolution=32",
        "data.bundled=digits",
        "training.microbatch_size=12 data.slots=64",
        "optimizer.final_lr_fraction=0.1",
        f"{ON} perceptual.kind=auto perceptual.weights=weights",
        f"{ON} adversarial.r1=1 adversarial.r1_every=4 {FSDP}",
        "perceptual.kind=structure data.channels=5 perceptual.weight=0.1",
        f"{DECODER} {ON} objective.beta=1e-6",
    ],
)
def test_a_sound_config_passes(overrides: str) -> None:
    assert load_train_config(["config=plain", *words(overrides)])


REFUSED = [
    # keys and arguments
    ("model.chanels=[1]", "model.chanels", "there is no such key; did you mean model.channels?"),
    ("steps=5", "steps", "there is no such key; did you mean training.steps?"),
    ("batch_size=5", "batch_size", "did you mean training.batch_size or evaluation.batch_size?"),
    ("lerning_rate=5", "lerning_rate", "there is no such key"),
    ("data=3", "data", "is a section; set its keys, for example data.train"),
    ("model.channels.0=3", "model.channels", "is one value; give it whole"),
    ("model.channels[0]=3", "model.channels", "is one value; give it whole"),
    ("base=plain", "base", "belongs in a YAML file"),
    ("seed", "seed", "'seed' is not key=value"),
    ("--seed=3", "--seed=3", "keys take no dashes; write seed=3"),
    ("data.train=${oc.env:HOME}", "data.train", "${...} is not evaluated"),
    ("data.train=[a,'${seed}']", "data.train", "${...} is not evaluated"),
    # types
    ("training.steps=abc", "training.steps", "is not a whole number"),
    ("training.steps=1e5", "training.steps=1e5", "whole number; write training.steps=100000"),
    ("training.steps=2.5", "training.steps", "is not a whole number"),
    ("seed=true", "seed=true", "is not a whole number"),
    ("seed=", "seed=", "gives no value; it takes a whole number"),
    ("seed=1_000", "seed=1_000", "is not a whole number; write seed=1000"),
    ("optimizer.lr=1:30", "optimizer.lr=1:30", "is not a number"),
    ("optimizer.lr=fast", "optimizer.lr=fast", "is not a number"),
    ("data.flip=maybe", "data.flip", "is not true or false"),
    ("data.flip=on", "data.flip", "is not true or false; write data.flip=true"),
    ("training.precision=bf17", "training.precision", "no, bf16, fp16; did you mean bf16?"),
    ("training.precision=yes", "training.precision=yes", "is not one of auto, no, bf16, fp16"),
    ("model.channels=64", "model.channels=64", "is not a list of whole numbers, as in"),
    ("model.channels=[a]", "model.channels=[a]", "is not a list of whole numbers, as in"),
    ("data.bits=12", "data.bits=12", "is not one of 5, 8, 16, 32"),
    # numbers
    ("optimizer.lr=.nan", "optimizer.lr=nan", "is not a finite number"),
    ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9, 1]", "must be less than 1"),
    ("model.channels=[32,-32]", "model.channels=[32, -32]", "must be at least 1"),
    # forms
    ("data.train=''", "data.train=", "is no folder"),
    ("data.validation=[null]", "data.validation=[null]", "is no folder"),
    ("data.validation=[{path:·a}]", "data.validation", "is no folder"),
    ("data.train=[{path:·a,·weight:·-1}]", "data.train", "is no folder"),
    ("data.resolution=big", "data.resolution=big", "is none of N, [H, W], native and aspect"),
    ("data.resolution=[64]", "data.resolution=[64]", "is none of"),
    ("data.resolution=true", "data.resolution=true", "is none of"),
    ("data.resolution={area:·64}", "data.resolution={area: 64}", "is none of"),
    (BUCKETS.replace("16", "300"), "data.resolution", "area >= multiple^2"),
    (BUCKETS.replace("2.0", "0.5"), "data.resolution", "max_aspect >= 1"),
    ("data.window=0", "data.window=0", "is neither auto nor a count"),
    ("training.microbatch_size=some", "training.microbatch_size=some", "is neither auto, nor 0"),
    ("model.blocks=[1,0,1]", "model.blocks=[1, 0, 1]", "must be a positive count"),
    # without effect
    (
        "data.crop=random",
        "data.crop=random",
        "has no effect with data.resolution=native; remove it",
    ),
    ("perceptual.kind=structure perceptual.weights=w", "perceptual.weights", "kind=structure"),
    (
        f"{ON} adversarial.r1_every=8",
        "adversarial.r1_every=8",
        "has no effect with adversarial.r1=0",
    ),
    (f"{DECODER} objective.free_bits=1", "objective.free_bits=1", "training.train_only=decoder"),
    # not together
    (f"{BUCKETS} model.latent=vector", "data.resolution", "model.latent=vector works at one"),
    (
        f"{BUCKETS} data.slots=32 data.window=20",
        "data.window=20",
        "is not a multiple of the 8 images of a slot (training.batch_size / data.slots); try 16",
    ),
    (f"{BUCKETS} {FSDP}", "runtime.parallel=fsdp", "set training.microbatch_size=4, the images"),
    (f"runtime.compile=blocks {FSDP}", "runtime.compile=blocks", "needs runtime.parallel=ddp"),
    (f"runtime.channels_last=true {FSDP}", "runtime.channels_last", "needs runtime.parallel=ddp"),
    (f"runtime.compile=blocks {DENSE}", "runtime.compile", "finds none in model.arch=dense"),
    ("model.arch=dense", "model.arch=dense", "set model.latent=vector"),
    ("data.mask=nan", "data.mask=nan", "needs float images: set data.bits=32 (it is 8)"),
    ("model.num_classes=1", "model.num_classes=1", "tells nothing; use 0"),
    ("data.bundled=digits data.train=mine", "data.bundled", "data.train=mine and data.validation="),
    ("data.slots=60", "training.batch_size=256", "is not a multiple of data.slots=60; try "),
    ("data.slots=512", "training.batch_size=256", "is not a multiple of data.slots=512"),
    ("training.microbatch_size=6", "training.microbatch_size=6", "not a multiple of the 4 images"),
    ("training.microbatch_size=512", "training.microbatch_size", "more than training.batch_size"),
    ("model.channels=[]", "model.channels=[]", "must be one positive width"),
    ("model.channels=[64,80]", "model.norm_groups=32", "does not divide every width of"),
    ("model.blocks=[1]", "model.blocks=[1]", "must be one count for each of the 3 levels"),
    (
        "model.dc_shortcuts=true model.channels=[32,160]",
        "model.channels",
        "has no shortcut from 32 to 160 channels",
    ),
    (
        "model.dc_shortcuts=true model.latent_channels=3",
        "model.latent_channels=3",
        "does not divide the last width, 256",
    ),
    ("likelihood.kind=bernoulli", "likelihood.kind", "set data.channels=1 (it is 3)"),
    (
        "likelihood.kind=discretized_gaussian data.bits=32",
        "likelihood.kind=discretized_gaussian",
        "gives probabilities of levels, and float images (data.bits=32) have none; use",
    ),
    (
        "objective.beta_warmup_steps=4000 objective.beta_cycles=3",
        "objective.beta_cycles=3",
        "take 20000 steps, more than training.steps=10000; try objective.beta_warmup_steps=1666",
    ),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "must be two numbers"),
    ("perceptual.kind=lpips data.channels=4", "perceptual.kind", "data.channels=4; use perceptual"),
    ("perceptual.kind=structure data.mask=random", "perceptual.kind", "data.mask=random says that"),
    (
        "perceptual.kind=structure objective.importance_samples=4",
        "perceptual.kind",
        "is for one draw of z: objective.importance_samples=4",
    ),
    ("objective.latent_noise=1 objective.importance_samples=2", "objective.latent_noise", "one dr"),
    (f"{ON} adversarial.start_step=9000", "adversarial.start_step", "leave no step of"),
    (f"{ON} {DENSE}", "adversarial.weight=0.5", "needs a convolutional model"),
    (f"{ON} data.mask=half", "adversarial.weight", "and data.mask=half"),
    (
        "objective.scale_equivariance=0.2 model.latent=vector",
        "objective.scale_equivariance=0.2",
        "needs model.latent=spatial",
    ),
    (
        "objective.scale_equivariance=0.2 likelihood.kind=discretized_gaussian",
        "objective.scale_equivariance",
        "likelihood.kind must be one of gaussian, laplace",
    ),
    ("training.train_only=decoder", "training.train_only", "of random weights; give init_from=RUN"),
]


@pytest.mark.parametrize(("overrides", "key", "fragment"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_wrong_is_refused_with_its_key(overrides: str, key: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(["config=plain", *words(overrides)])
    (problem,) = caught.value.problems
    assert problem.lstrip("'").startswith(key) and fragment in problem


@pytest.mark.parametrize(
    ("cls", "overrides", "key", "fragment"),
    [
        (SampleCommand, "checkpoint=newest", "checkpoint=newest", "is none of latest, best and"),
        (SampleCommand, "batch_size=0", "batch_size=0", "must be at least 1"),
        (SampleCommand, "label=true", "label=true", "is none of auto"),
        (SampleCommand, "resolution=[8]", "resolution=[8]", "is none of trained, N and [H, W]"),
        (SampleCommand, "prior=gmm", "prior=gmm", "try prior=gmm:10"),
        (SampleCommand, "prior_images=9", "prior_images=9", "has no effect with prior=normal"),
        (SampleCommand, "compare=true", "compare=true", "has no effect with prior=normal"),
        (SampleCommand, "prior=gmm:10 prior_images=9", "prior_images=9", "are fewer images than"),
        (EvaluateCommand, "chunk=8", "chunk=8", "has no effect with samples=0"),
        (EvaluateCommand, "metrics=psnr,fidd", "metrics=psnr,fidd", "is not one or several of"),
        (EvaluateCommand, "metric_weights=w", "metric_weights=w", "has no effect without lpips"),
        (ImputeCommand, "samples=1", "samples=1", "must be at least 2"),
        (ImputeCommand, "method=single samples=9", "samples=9", "has no effect with method=single"),
        (ImputeCommand, "mask_fraction=0.1", "mask_fraction", "has no effect with mask=auto"),
        (EncodeCommand, "data=d out=o resolution=all", "resolution=all", "native, N and [H, W]"),
    ],
)
def test_commands_are_checked_alike(cls: type, overrides: str, key: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_command(cls, ["run=runs/mnist", *words(overrides)])
    (problem,) = caught.value.problems
    assert problem.startswith(key) and fragment in problem


def test_a_number_outside_its_range_is_refused() -> None:
    for key in keys(TrainConfig).values():
        for bound, step, words in (
            (key.ge, -1, "at least"),
            (key.gt, 0, "more than"),
            (key.le, 1, "at most"),
            (key.lt, 0, "less than"),
        ):
            if bound is not None and not isinstance(key.default, list):
                config = sound()
                put(config, key.name, type(key.default)(bound + step))
                assert f"{key.name}={shown(value_of(config, key.name))} must be {words}" in (
                    "\n".join(problems(config))
                )


def test_a_knob_without_effect_is_refused() -> None:
    others = {int: 7, float: 0.03125, str: "elsewhere", list[float]: [0.25, 0.75]}
    for key in keys(TrainConfig).values():
        for name, is_not, values in conditions(key.when):
            config, other = sound(), keys(TrainConfig)[name]
            choices = other.choices or (other.default, 0, 1, 4)
            idle = [choice for choice in choices if (shown(choice) in values) == is_not]
            put(config, name, idle[0])
            mine = [not key.default] if key.type is bool else [*key.choices]
            mine = [choice for choice in mine if choice != key.default]
            put(config, key.name, mine[0] if mine else others.get(key.type, 3))
            found = [v for v in violations(config) if v.is_without_effect]
            assert any(v.keys[0] == key.name and "; remove it (default" in v.text for v in found)


def test_conditions_name_keys_and_values_that_there_are() -> None:
    known = keys(TrainConfig)
    for rule in [*CONFLICTS, *(key.when for key in known.values())]:
        for name, _, values in conditions(rule):
            if choices := known[name].choices:
                assert set(values) <= {str(choice) for choice in choices}, rule
