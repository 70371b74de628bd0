"""From the command line and YAML files to a filled config dataclass, and back to YAML.

In: arguments `key=value`, among them `config=NAME|PATH`. Later ones win:

    schema defaults < base of the file < file < command line

A key that a later one leaves without effect goes back to its default: adversarial.weight=0 on the
command line is enough over a file with an adversarial recipe. Out: an instance of the schema's
dataclass, or one ConfigError that lists every problem found. Values follow YAML 1.2: `[1, 2]` is a
list, `3e-4` and `010` are numbers, `null` is nothing, `on` and `1_000` are words; keys that take
text take it as it stands. Files are read with bounds: a run folder may come from somebody else.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_dist.config.checks import broken_rules, problem_of, without_effect
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import MISSING, Key, keys, set_value, shown
from vae_dist.config.schema import TrainConfig
from vae_dist.files import read_bounded

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]  # a file's path (empty: command line); its settings, as text
EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of whole numbers, as in [1, 2]",
    list[float]: "a list of numbers, as in [0.5, 1]",
    list[str]: "a list of words, as in [a, b]",
}
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
MAX_FILE_BYTES, MAX_DEPTH, MAX_VALUES = 2**20, 16, 100_000  # of a YAML file, aliases written out
PACKAGE = Path(__file__).resolve().parents[1]


class _Yaml(yaml.BaseLoader):
    """Every scalar as text; each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"found {names.most_common(1)[0][0]} twice{node.start_mark}")
        return mapping


def load_train_config(argv: list[str]) -> TrainConfig:
    """The config that `argv` asks for. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    arguments = _arguments(argv, problems)
    name = str(arguments.get("config", ""))
    try:
        if not name:
            raise ConfigError("config is missing; give a name or a path, as in config=mnist")
        files = _layers(_find(name, key="config"))
    except ConfigError as error:
        problems += error.problems
        required = {name: "-" for name, key in keys(TrainConfig).items() if key.default == MISSING}
        _fill(TrainConfig, [("", {**required, **arguments})], problems)
        raise ConfigError(problems) from None
    config = _checked(TrainConfig, [*files, ("", arguments)], problems)
    config.run = config.run or f"runs/{Path(name).stem}"
    return config


def load_command(cls: type[T], argv: list[str]) -> T:
    """The keys of another command. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    return _checked(cls, [("", _arguments(argv, problems))], problems)


def to_yaml(config: TrainConfig) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.structured(config)).encode()


def from_yaml(data: bytes, *, origin: str = "config.yaml") -> TrainConfig:
    """The config that `to_yaml` wrote. Each value is checked, rules between keys are not."""
    problems: list[str] = []
    config, _ = _fill(TrainConfig, [(origin, dict(_flat(_parsed(data, origin))))], problems)
    if problems:
        raise ConfigError(problems)
    return config


# ---- where configs lie ----


def _folders() -> list[Path]:
    """Where names are looked up: ./configs, then those that ship with vae_dist."""
    # A wheel carries configs/ inside the package; in a checkout it lies beside the package.
    shipped = PACKAGE / "configs"
    return [Path("configs"), shipped if shipped.is_dir() else PACKAGE.parent / "configs"]


def _find(name: str, *, key: str, beside: Path | None = None) -> Path:
    """The file of a name or a path; `beside` is the folder of the file that has the `base`."""
    places = [folder / f"{name}.yaml" for folder in ([beside] if beside else []) + _folders()]
    if "/" in name or name.endswith((".yaml", ".yml")):
        places = [(beside or Path()) / Path(name).expanduser()]
    for path in places:
        if path.is_file():
            return path
    names = sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})
    problem = f"no such file: {places[0]}" if len(places) == 1 else "no config has this name"
    raise ConfigError(
        f"{key}={name}: {problem}{_did_you_mean(*get_close_matches(Path(name).stem, names, n=1))} "
        f"(there are: {', '.join(names) or 'none here'}; or give a YAML file's path)"
    )


def _layers(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """The settings of a file after those of its bases."""
    chain = (*chain, path.resolve())
    if path.resolve() in chain[:-1]:
        names = " -> ".join(link.name for link in chain)
        raise ConfigError(f"{path}: base leads back to the file itself: {names}; remove one base")
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    values = _parsed(data, str(path))
    base = values.pop("base", None)
    own = (str(path), dict(_flat(values)))
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={shown(base)} is not the name or path of one config")
    return [*_layers(_find(base, key=f"{path}: base", beside=path.parent), chain), own]


# ---- reading ----


def _parsed(data: bytes, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Yaml) or {}
        _check_extent(values)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: cannot be read as UTF-8 text ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{origin}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no keys; write one `key: value` per line")
    return values


def _check_extent(values: Any) -> None:
    """Aliases that repeat each other make a small file large. Raises YAMLError."""
    level = [values]
    for _ in range(MAX_DEPTH):
        parts = (one.values() if isinstance(one, dict) else one for one in level)
        level = list(islice((item for part in parts for item in part), MAX_VALUES))
        if len(level) == MAX_VALUES:
            break
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
    raise yaml.YAMLError(f"more than {MAX_VALUES} values or {MAX_DEPTH} levels")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {name.rpartition(".")[0] for name in keys(TrainConfig)} - {""}
    for name, text in values.items():
        if prefix + name in sections and (not text or isinstance(text, dict)):
            yield from _flat(text or {}, f"{prefix}{name}.")
        else:
            yield prefix + name, text


def _arguments(argv: Iterable[str], problems: list[str]) -> dict[str, Any]:
    """The settings of the command line: lists, mappings and quoted words as YAML has them."""
    settings: dict[str, Any] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals:
            problems.append(f"{argument!r} is not key=value (no spaces around =; see --help)")
            continue
        settings[name] = text
        if text.startswith(("'", '"', "[", "{")):
            # else a pattern of shards that begins with a brace or a bracket
            with contextlib.suppress(yaml.YAMLError, RecursionError):
                settings[name] = yaml.load(text, _Yaml)
    return settings


def _value(key: Key, text: Any) -> Any:
    """What the text says to the key: numbers where it takes them, otherwise text as it stands."""
    if isinstance(text, dict):  # the weight of a data set in a mixture is a number
        return {n: _scalar(str(t)) if n == "weight" else _value(key, t) for n, t in text.items()}
    if isinstance(text, list):
        return [_value(key, item) for item in text]
    if re.match("~[^/]*/", text):  # what a shell leaves after the = of key=~/...
        return os.path.expanduser(text)
    takes_text = key.is_text or key.type in (str, str | None, list[str])
    takes_text = takes_text or any(isinstance(choice, str) for choice in key.choices)
    is_null = text in ("null", "~") or (not text and key.type == str | None)
    return text if takes_text and not is_null else _scalar(text)


def _scalar(text: str) -> Any:
    """YAML 1.2's reading (its core schema, but for infinity and NaN)."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if re.fullmatch("[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text) if math.isfinite(float(text)) else text
    return text


# ---- filling ----


def _fill(cls: type[T], layers: list[Layer], problems: list[str]) -> tuple[T, set[str]]:
    """A `cls` with every good setting, and the keys that have no good value.

    Appends what is wrong or missing to `problems`.
    """
    tree, known = OmegaConf.structured(cls), keys(cls)
    required = {name: MISSING for name, key in known.items() if key.default == MISSING}
    layers = [(layers[-1][0], required), *layers]
    given = {name: (origin, text) for origin, values in layers for name, text in values.items()}
    wrong: set[str] = set()
    for name, (origin, text) in given.items():
        sentence = _set(tree, known[name], text) if name in known else _unknown(cls, name)
        if sentence:
            problems.append(f"{origin}: {sentence}" if origin else sentence)
            wrong.add(name)
    for name in required.keys() & wrong:
        OmegaConf.update(tree, name, "")  # lets the other keys be checked
    config: Any = OmegaConf.to_object(tree)
    return config, wrong


def _set(tree: Any, key: Key, text: Any) -> str:
    """Set the value; what is wrong with it otherwise."""
    if text == MISSING:
        return f"{key.name} is missing: {key.help}; give {key.name}=..."
    if "${" in str(text):  # OmegaConf would evaluate it: environment, other keys, resolvers
        return f"{key.name}: ${{...}} is not evaluated; write the value"
    value = _value(key, text)
    try:
        OmegaConf.update(tree, key.name, value, merge=False)
        is_kept = OmegaConf.select(tree, key.name) == value  # not converted, as "on" would be
    except OmegaConfBaseException:
        is_kept = False
    if not is_kept:
        return _wrong_type(key, text)
    if sentence := problem_of(key, value):
        OmegaConf.update(tree, key.name, key.default, merge=False)  # a good one, for other checks
        return f"{key.name}={shown(text)} {sentence}"
    return ""


def _checked(cls: type[T], layers: list[Layer], problems: list[str]) -> T:
    """The filled config. Raises ConfigError with `problems`, its own and the rules it breaks."""
    config, wrong = _fill(cls, layers, problems)
    level = {name: number for number, (_, values) in enumerate(layers) for name in values}
    for key, other in without_effect(config):
        if level.get(key.name, 0) < level.get(other, 0):  # what came later switched it off
            set_value(config, key.name, copy.copy(key.default))
    problems += broken_rules(config, wrong)
    if problems:
        raise ConfigError(problems)
    return config


# ---- what is said of wrong settings ----


def _unknown(cls: type, name: str) -> str:
    leaves = {key: key.rpartition(".")[2] for key in keys(cls)}
    last = name.rpartition(".")[2]
    if inside := [key for key in leaves if key.startswith(name + ".")]:
        return f"{name} is a section; set its keys, for example {inside[0]}"
    if name == "base":
        return "base belongs in a YAML file; on the command line give config=..."
    close = [] if last in leaves.values() else get_close_matches(name, leaves, n=1)
    likely = get_close_matches(last, leaves.values(), n=1)
    guesses = close or [key for key, leaf in leaves.items() if leaf in likely][:3]
    return f"{name}: there is no such key{_did_you_mean(*guesses)} (--help lists all)"


def _wrong_type(key: Key, text: Any) -> str:
    choices = [str(choice) for choice in key.choices]
    words = f"one of {', '.join(choices)}" if choices else EXPECTED.get(key.type, "text")
    sentence, value = (
        f"{key.name}={shown(text)} is not {words}",
        _scalar(str(text).replace("_", "")),
    )
    if key.type is int and type(value) in (int, float) and value == int(value):  # 1e5, 1_000
        return f"{sentence}; write {key.name}={int(value)}"
    return sentence + _did_you_mean(*get_close_matches(str(text), choices, n=1))


def _did_you_mean(*guesses: str) -> str:
    return f"; did you mean {' or '.join(guesses)}?" if guesses else ""
