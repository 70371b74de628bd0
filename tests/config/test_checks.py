"""Every refusal of a value or of values together."""

import pytest

from tests.config.conftest import load
from vae_dist.config.checks import CONFLICTS, broken_rules, problem_of, without_effect
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import conditions, keys, set_value, shown
from vae_dist.config.schema import TrainConfig

BUCKETS = "data.resolution={'area':65536,'multiple':16,'max_aspect':2.0}"
LADDER = "model.arch=ladder model.groups=[1,1,1]"
ON, FSDP = "adversarial.weight=0.5", "runtime.parallel=fsdp"


SOUND = f"""
{BUCKETS} data.crop=random data.slots=32 data.window=64
{BUCKETS} {FSDP} training.microbatch_size=4
data.train=[a,b-{{0..3}}.tar] data.resolution=[178,218] data.channels=2 data.bits=16
data.train=[{{'path':2024,'weight':2}},{{'path':b}}] data.validation={{'path':a,'index':i}}
likelihood.kind=bernoulli data.channels=1 likelihood.binarization=static
likelihood.kind=laplace likelihood.variance=per_pixel data.dequantize=false
objective.free_bits=0.5 objective.beta_warmup_steps=100 objective.beta_cycles=4
objective.scale_equivariance=0.25 objective.latent_noise=0.5 data.bundled=digits
{ON} adversarial.betas=[0,0.99] {FSDP}
training.train_only=decoder init_from=runs/first {ON} objective.beta=1e-6
sample run=r temperature=[1,0.5] prior=gmm:10:full label=3 checkpoint=1000 resolution=[8,9]
"""


@pytest.mark.parametrize("overrides", SOUND.strip().splitlines())
def test_a_sound_config_passes(overrides):
    assert load(*overrides.split())


REFUSED = {
    # keys and arguments
    "model.chanels=[1]": "model.chanels: there is no such key; did you mean model.channels?",
    "steps=5": "steps: there is no such key; did you mean training.steps?",
    "data=3": "data is a section; set its keys, for example data.train",
    "config": "config is missing; give a name or a path, as in config=mnist",
    "config=plan": "config=plan: there is no such config; did you mean plain? (there are: plain;",
    "sample": "run is missing: run folder, for example runs/mnist; give run=...",
    # types
    "training.steps=1.5": "training.steps=1.5 is not a whole number",
    "model.norm_groups=x model.channels=[64,80]": "model.norm_groups=x is not a whole number",
    "optimizer.lr=.nan": "optimizer.lr=.nan is not a number",
    "data.flip=on": "data.flip=on is not true or false",
    "model.channels=3": "model.channels=3 is not a list, as in [1, 2]",
    "training.precision=bf17": "is not one of auto, no, bf16, fp16; did you mean bf16?",
    # numbers and forms
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] is none of two numbers",
    "data.validation=[null]": "data.validation=[null] is none of a path",
    "data.train=[{'path':a,'weight':-1}]": "weight: -1}] is none of a path",
    "data.resolution=28.0": "data.resolution=28.0 is none of native, N or [H, W] in pixels, aspect",
    BUCKETS.replace("16", "300"): "area >= multiple^2",
    BUCKETS.replace("2.0", "0.5"): "max_aspect >= 1",
    "sample run=r checkpoint=new": "checkpoint=new is none of latest, best, a number 0, 1, ...",
    "model.blocks=[1,0,1]": "model.blocks=[1, 0, 1] is none of a count",
    "sample run=r prior=gmm": "prior=gmm is none of normal, gmm:K, gmm:K:full, gmm:K:diagonal; try",
    "sample run=r temperature=-1": "temperature=-1 is none of a number of at least 0, a list of",
    "evaluate run=r metrics=psnr,fidd": "metrics=psnr,fidd is none of one or several of",
    # without effect
    "impute run=r method=single samples=9": "samples=9 has no effect with method=single",
    "encode data=d out=o": "run= is missing; give the run's folder, or features=MODEL",
    "encode data=d out=o features=m tile=64": "tile=64 has no effect with features=m; remove it",
    # counts and widths
    "data.bundled=digits data.train=mine": "writes FOLDER/train, and data.train=mine",
    "data.slots=60": "training.batch_size=256 is not a multiple of data.slots=60; try training",
    "training.microbatch_size=6": "training.microbatch_size=6 is not a multiple of the 4 images",
    f"{BUCKETS} model.latent=vector": "makes images of several sizes; use model.latent=spatial",
    f"{BUCKETS} {FSDP}": "fsdp with aspect buckets needs training.microbatch_size=4",
    f"{BUCKETS} data.slots=32 data.window=20": "data.window=20 is not a multiple of the 8 images",
    "model.channels=[64,80]": "model.norm_groups=32 does not divide every width of",
    f"{LADDER} model.factors=[2]": "model.factors=[2] must be 2 counts for the 3 levels",
    "model.blocks=[1]": "model.blocks=[1] must be 3 counts for the 3 levels",
    "model.dc_shortcuts=true model.channels=[32,160]": "has no shortcut from 32 to 160 channels",
    "model.dc_shortcuts=true model.latent_channels=3": "does not divide the last width, 256",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_is_wrong_is_refused_with_its_key(overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides.split())
    (problem,) = caught.value.problems
    assert REFUSED[overrides] in problem


def test_a_number_outside_its_range_is_refused():
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for key in keys(TrainConfig).values():
        for rule, step in {"ge": -1, "gt": 0, "le": 1, "lt": 0}.items():
            if (bound := getattr(key, rule)) is not None:
                wrong = [bound, bound + step] if "list" in str(key.type) else bound + step
                assert problem_of(key, wrong) == f"must be {words[rule]} {shown(bound)}"


def put_where(config, condition, *, holds):
    """Give a key of a condition a value with which it holds, or does not."""
    name, is_not, values = condition
    key = keys(TrainConfig)[name]
    choices = key.choices or (key.default, 4, 1, 0)
    set_value(config, name, next(c for c in choices if ((shown(c) in values) != is_not) == holds))


def said_of(config, name):
    (found,) = [text for text in broken_rules(config) if text.startswith(f"{name}=")]
    return found


def test_a_knob_without_effect_is_refused():
    others = {int: 7, float: 0.03125, str: "elsewhere", list[float]: [0.25, 0.75]}
    for key in keys(TrainConfig).values():
        for condition in conditions(key.when):
            config = load()
            put_where(config, condition, holds=False)
            mine = [not key.default] if key.type is bool else key.choices
            mine = [*mine, others.get(key.type, 3)]
            set_value(config, key.name, next(one for one in mine if one != key.default))
            assert key.name in [mine.name for mine, _ in without_effect(config)]
            assert "; remove it (default" in said_of(config, key.name)


@pytest.mark.parametrize("rules", [rules for rules in CONFLICTS if "features" not in rules])
def test_what_may_not_come_together_is_refused(rules):
    firsts, _, other = rules.partition(" & ")
    for first in firsts.split():
        config, parts = load(), conditions(f"{first} {other}")
        if "model.arch=dense" in rules and "model.latent" not in rules:
            config.model.latent = "vector"  # else that is wrong already
        for condition in parts:
            put_where(config, condition, holds=True)
        assert CONFLICTS[rules].partition("{")[0] in said_of(config, parts[0][0])
