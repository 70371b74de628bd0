"""From the command line and YAML files to a filled config dataclass, and back to YAML.

In: arguments `key=value`, among them `config=NAME|PATH`. Later ones win:

    schema defaults < base of the file < file < command line

A key that a later one leaves without effect goes back to its default: adversarial.weight=0 on the
command line is enough over a file with an adversarial recipe. Out: an instance of the schema's
dataclass, or one ConfigError that lists every problem found. Values follow YAML 1.2: `[1, 2]` is a
list, `3e-4` and `010` are numbers, `null` is nothing, `on` and `1_000` are words; keys that take
text take it as it stands. No torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_dist.config import checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import MISSING, Key, keys, set_default, shown
from vae_dist.config.schema import TrainConfig

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]  # a file's path (empty: command line); its settings, as text
TEXT = (str, str | None)
EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of whole numbers, as in [1, 2]",
    list[float]: "a list of numbers, as in [0.5, 1]",
    list[str]: "a list of words, as in [a, b]",
}
PACKAGE = Path(__file__).resolve().parents[1]


class _Yaml(yaml.BaseLoader):
    """Every scalar as text; each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"found {', '.join(twice)} twice{node.start_mark}")
        return super().construct_mapping(node, deep)


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


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, *, origin: str = "config.yaml") -> TrainConfig:
    """The config that `to_yaml` wrote. Keys and types are checked, rules between keys are not."""
    problems: list[str] = []
    layer = (origin, dict(_flat(_parsed(text, origin))))
    config, _ = _fill(TrainConfig, [layer], problems)
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
        values = _parsed(path.read_text("utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    base = values.pop("base", None)
    own = (str(path), dict(_flat(values)))
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={shown(base)} is not the name or path of one config")
    return [*_layers(_find(base, key=f"{path}: base", beside=path.parent), chain), own]


# ---- reading ----


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Yaml) or {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{origin}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no keys; write one `key: value` per line")
    return values


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
        return {
            name: _scalar(t) if name == "weight" else _value(key, t) for name, t in text.items()
        }
    if isinstance(text, list):
        return [_value(key, item) for item in text]
    if text and re.match("~[^/]*/", text):  # what a shell leaves after the = of key=~/...
        return os.path.expanduser(text)
    takes_text = key.is_text or key.type in (*TEXT, list[str])
    takes_text = takes_text or any(isinstance(choice, str) for choice in key.choices)
    is_null = text in ("null", "~") or (not text and key.type == str | None)
    return text if takes_text and not is_null else _scalar(text)


def _scalar(text: Any) -> Any:
    """YAML 1.2's reading (its core schema, but for infinity and NaN)."""
    if not isinstance(text, str):
        return text
    words = {"": None, "~": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch("[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


# ---- filling ----


def _fill(cls: type[T], layers: list[Layer], problems: list[str]) -> tuple[T, set[str]]:
    """A `cls` with every good setting, and the keys that have no good value.

    Appends what is wrong or missing to `problems`.
    """
    tree, known = OmegaConf.structured(cls), keys(cls)
    given = {name: (origin, text) for origin, values in layers for name, text in values.items()}
    wrong: set[str] = set()
    for name, (origin, text) in given.items():
        sentence = _set(tree, known[name], text) if name in known else _unknown(cls, name)
        if sentence:
            problems.append(_from(origin, sentence))
            wrong.add(name)
    for name, key in known.items():
        if key.default == MISSING and (name not in given or name in wrong):
            OmegaConf.update(tree, name, "")  # lets the other keys be checked
            sentence = f"{name} is missing: {key.help}; give {name}=..."
            problems += [] if name in wrong else [_from(layers[-1][0], sentence)]
            wrong.add(name)
    config: Any = OmegaConf.to_object(tree)
    return config, wrong


def _from(origin: str, sentence: str) -> str:
    return f"{origin}: {sentence}" if origin else sentence


def _set(tree: Any, key: Key, text: Any) -> str:
    """Set the value; what is wrong with it otherwise."""
    value = _value(key, text)
    if "${" in str(value):  # OmegaConf would evaluate it: environment, other keys, resolvers
        return f"{key.name}: ${{...}} is not evaluated; write the value"
    try:
        OmegaConf.update(tree, key.name, value, merge=False)
        is_kept = OmegaConf.select(tree, key.name) == value  # not converted, as "on" would be
    except OmegaConfBaseException:
        is_kept = False
    return "" if is_kept else _wrong_value(key, text)


def _checked(cls: type[T], layers: list[Layer], problems: list[str]) -> T:
    """The filled config. Raises ConfigError with `problems`, its own and the rules it breaks."""
    config, wrong = _fill(cls, layers, problems)
    level = {name: number for number, (_, values) in enumerate(layers) for name in values}
    for name, other in list(checks.without_effect(config)):
        if level.get(name, 0) < level.get(other, 0):  # what came later switched it off
            set_default(config, name)
    problems += checks.problems(config, wrong)
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


def _wrong_value(key: Key, text: Any) -> str:
    value, choices = _value(key, text), [str(choice) for choice in key.choices]
    words = f"one of {', '.join(choices)}" if choices else EXPECTED.get(key.type, "text")
    sentence = f"{key.name}={shown(text)} is not {words}"
    if key.type is int and isinstance(value, float) and value.is_integer():  # 1e5
        return f"{sentence}; write {key.name}={int(value)}"
    return sentence + _did_you_mean(*get_close_matches(str(value), choices, n=1))


def _did_you_mean(*guesses: str) -> str:
    return f"; did you mean {' or '.join(guesses)}?" if guesses else ""
