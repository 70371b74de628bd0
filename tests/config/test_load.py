"""What a person types, and what comes out: values, precedence, and what is said of wrong files."""

from pathlib import Path

import pytest

from tests.config.conftest import DATA, load, write
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import flatten
from vae_dist.config.load import from_yaml, to_yaml
from vae_dist.config.schema import TrainConfig


def refused(*words):
    with pytest.raises(ConfigError) as caught:
        load(*words)
    return caught.value.problems


VALUES = {
    "optimizer.lr=3e-4": 3e-4,
    "optimizer.lr=1": 1.0,
    "training.steps=1e5": 100_000,
    "runtime.compile=true": "true",
    "run=007": "007",
    "run='a b'": "a b",
    "run=~/a": str(Path.home() / "a"),
    "run=~a": "~a",
    "seed=010": 10,
    'data.resolution="64"': 64,
    "data.resolution=[178, 218]": [178, 218],
    "data.train=2024": "2024",
    "data.train=[010, on]": ["010", "on"],
    "data.train=x-{000..009}.tar": "x-{000..009}.tar",
    "wandb.entity=null": None,
}


@pytest.mark.parametrize("argument", VALUES)
def test_values_follow_yaml_except_where_text_is_wanted(argument):
    found = flatten(load(argument))[argument.partition("=")[0]]
    assert found == VALUES[argument] and type(found) is type(VALUES[argument])


def test_arguments_win_over_file_over_base_over_defaults():
    """Own configs come first, and a base lies beside the file that names it."""
    write("installed/configs/plain.yaml", DATA + "seed: 5\n")
    write("installed/configs/shipped.yaml", DATA + "seed: 6\n")
    write("mine/common.yaml", DATA + "seed: 7\ntraining: {steps: 500, batch_size: 32}\n")
    write("mine/faces.yaml", "base: common\ntraining: {steps: 600}\nlog:\n")
    write("mine/deeper/eyes.yaml", "base: ../faces.yaml\n")
    names = ("plain", "shipped", "mine/faces.yaml", "mine/deeper/eyes.yaml")
    configs = [load(f"config={name}") for name in names]
    assert [config.seed for config in configs] == [0, 6, 7, 7]
    training = configs[-1].training
    assert (training.steps, training.batch_size, training.ema_decay) == (600, 32, 0.999)
    last = load("config=mine/faces.yaml", "seed=4", "seed=3")
    assert (last.seed, last.run) == (3, "runs/faces")


def test_what_is_switched_off_takes_along_what_was_tuned_before():
    write("configs/recipe.yaml", DATA + "adversarial: {weight: 0.5, channels: 32}\n")
    write("configs/plainer.yaml", "base: recipe\nadversarial: {weight: 0}\n")
    write("configs/useless.yaml", DATA + "adversarial: {channels: 32}\n")
    off = ("config=recipe", "adversarial.weight=0")
    for words, channels in ((off[:1], 32), (off, 64), (("config=plainer",), 64)):
        assert load(*words).adversarial.channels == channels
    for words, value in (((*off, "adversarial.channels=16"), 16), (("config=useless",), 32)):
        assert f"adversarial.channels={value} has no effect" in refused(*words)[0]


def test_all_problems_come_at_once():
    write("configs/bad.yaml", "sede: 1\ntraining: {steps: many, batch_size: 100}\ndata: {slots: 7}")
    problems = refused("config=bad", "optimizer.lr=-1", "data.validation=v", "oops")
    starts = (
        "configs/bad.yaml: sede: there is no such key; did you mean seed?",
        "configs/bad.yaml: training.steps=many is not a whole number",
        "optimizer.lr=-1 must be more than 0",
        "'oops' is not key=value",
        "data.train is missing",
        "training.batch_size=100 is not a multiple of data.slots=7",
    )
    assert all(said.startswith(start) for said, start in zip(problems, starts, strict=True))
    assert str(ConfigError(problems)) == "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: other", "configs/odd.yaml: base leads back to the file itself"),
        ("base: [nobody]", "configs/odd.yaml: base=['nobody']: there is no such config"),
        ("seed: 1\nlog: every: 2\n", "mapping values are not allowed here at line 2"),
        ("seed: 1\nseed: 2\n", "configs/odd.yaml: not readable as YAML: found seed twice"),
        ("- seed\n", "configs/odd.yaml: holds no keys"),
        ("seed: " + "[" * 500, "configs/odd.yaml: not readable as YAML"),
        (f"data: {{train: {'[' * 150}x{']' * 150}}}", "odd.yaml: data.train=[[["),
        ("seed: " + "9" * 400, "is not a whole number"),
        ("seed: ${oc.env:HOME}\n", "configs/odd.yaml: seed: ${...} is not evaluated"),
        ("seed: &a 1\nrun: *a\n", "odd.yaml: not readable as YAML: aliases"),
        pytest.param("#" * 2**20 + "\n", "odd.yaml: larger than the 1048576 bytes", id="large"),
        ("seed: !!python/object/apply:os.getcwd []\n", "odd.yaml: seed=[] is not a whole number"),
        ("run: gr\udcf6\udcdfe\n", "odd.yaml: not readable as YAML: 'utf-8' codec"),
    ],
)
def test_a_damaged_file_is_named(text, expected):
    write("configs/odd.yaml", text)
    write("configs/other.yaml", "base: odd")
    assert any(expected in problem for problem in refused("config=odd"))


def test_yaml_gives_back_the_same_config_and_is_checked():
    config = TrainConfig(config="plain", run="1:30")
    config.data.train = ["0", "010", "1e3", "on", "a: b", "x #y", "größe", "'q'", "[a]"]
    config.data.validation, config.wandb.tags = "{a}.tar", [" left", "1_000", ""]
    config.data.resolution, config.training.precision, config.optimizer.lr = [8, 9], "no", 3e-4
    assert from_yaml(to_yaml(config)) == config
    said = r"old: colour: there is no .*\nold: model\.patch=0 must be at.*\ndata\.train is missing"
    with pytest.raises(ConfigError, match=said):
        from_yaml(b"config: a\ncolour: blue\nmodel: {patch: 0}\n", origin="old")
