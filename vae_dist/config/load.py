"""From the command line and YAML files to a filled config dataclass, and back to YAML.

In: arguments `key=value`, among them `config=NAME|PATH`. Later ones win:

    schema defaults < base of the file < file < command line

A key that a later one leaves without effect goes back to its default: adversarial.weight=0 on the
command line is enough over a file with an adversarial recipe. Out: an instance of the schema's
dataclass, or one ConfigError that lists every problem found. Lists and mappings follow YAML; `3e-4`
and `010` are numbers, `null` is nothing, `on` is a word; keys that take text take it as it stands.
Files are read with bounds: a run folder may come from somebody else.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin

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
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
MAX_FILE_BYTES = 2**20
PACKAGE = Path(__file__).resolve().parents[1]


class _Yaml(yaml.BaseLoader):
    """Every scalar as text; each key once; no aliases, which make a small file large."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"found {names.most_common(1)[0][0]} twice{node.start_mark}")
        return mapping


def load_train_config(argv: list[str]) -> TrainConfig:
    """The config that `argv` asks for. Raises ConfigError with all problems at once."""
    arguments = _arguments(argv)
    name = str(arguments.get("config") or "")
    if not name:
        raise ConfigError("config is missing; give a name or a path, as in config=mnist")
    config = _checked(TrainConfig, [*_layers(_find(name, key="config")), ("", arguments)])
    config.run = config.run or f"runs/{Path(name).stem}"
    return config


def load_command(cls: type[T], argv: list[str]) -> T:
    """The keys of another command. Raises ConfigError with all problems at once."""
    return _checked(cls, [("", _arguments(argv))])


def to_yaml(config: TrainConfig) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.structured(config)).encode()


def from_yaml(data: bytes, *, origin: str = "config.yaml") -> TrainConfig:
    """The config that `to_yaml` wrote. Each value is checked, rules between keys are not."""
    config, wrong = _fill(TrainConfig, [(origin, dict(_flat(_parsed(data, origin))))])
    if wrong:
        raise ConfigError(wrong.values())
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
    guesses = get_close_matches(Path(name).stem, names, n=1)
    raise ConfigError(
        f"{key}={name}: there is no such config{_did_you_mean(*guesses)} "
        f"(there are: {', '.join(names) or 'none here'}; or give a YAML file's path)"
    )


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The settings of a file after those of its bases; `above` are the files that it is base of."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: base leads back to the file itself; remove one base")
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config={path}: cannot be read ({error})") from None
    values = _parsed(data, str(path))
    base = values.pop("base", None)
    own = (str(path), dict(_flat(values)))
    if base is None:
        return [own]
    found = _find(str(base), key=f"{path}: base", beside=path.parent)
    return [*_layers(found, (*above, path.resolve())), own]


# ---- reading ----


def _parsed(data: bytes, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Yaml) or {}
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
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


def _arguments(argv: Iterable[str]) -> dict[str, Any]:
    """The settings of the command line: lists, mappings and quoted words as YAML has them, None
    for what is no setting."""
    settings: dict[str, Any] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        settings[name] = text if equals else None
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
    if text.startswith("~/"):  # what a shell leaves after the = of key=~/...
        return os.path.expanduser(text)
    takes_text = key.type in (str, str | None, list[str]) or "PATHS" in key.form
    takes_text = takes_text or any(isinstance(choice, str) for choice in key.choices)
    is_null = text in ("null", "~") or (not text and key.type == str | None)
    if takes_text and not is_null:
        return text
    value = _scalar(text)
    is_count = key.type is int and isinstance(value, float) and value.is_integer()  # 1e5
    return int(value) if is_count else value


def _scalar(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float) if "_" not in text else ():  # Python's 1_000 is a word in YAML
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(text)):
                return number
    return text


# ---- filling ----


def _fill(cls: type[T], layers: list[Layer]) -> tuple[T, dict[str, str]]:
    """A `cls` with every good setting, and what is said of the others, by key."""
    tree, known = OmegaConf.structured(cls), keys(cls)
    given = {name: (origin, text) for origin, values in layers for name, text in values.items()}
    wrong: dict[str, str] = {}
    for name, (origin, text) in given.items():
        if text is None:
            sentence = f"{name!r} is not key=value (no spaces around =; see --help)"
        else:
            sentence = _set(tree, known[name], text) if name in known else _unknown(cls, name)
        if sentence:
            wrong[name] = f"{origin}: {sentence}" if origin else sentence
    required = [name for name, key in known.items() if key.default == MISSING]
    for name in required:
        if name not in given:
            wrong[name] = f"{name} is missing: {known[name].help}; give {name}=..."
        if name in wrong:
            OmegaConf.update(tree, name, "")  # lets the other keys be checked
    config: Any = OmegaConf.to_object(tree)
    return config, wrong


def _set(tree: Any, key: Key, text: Any) -> str:
    """Set the value, if its field's type takes it as it is; what is wrong with it otherwise."""
    if "${" in str(text):  # OmegaConf would evaluate it: environment, other keys, resolvers
        return f"{key.name}: ${{...}} is not evaluated; write the value"
    value, is_taken = _value(key, text), False
    with contextlib.suppress(OmegaConfBaseException, RecursionError):
        OmegaConf.update(tree, key.name, value, merge=False)
        is_taken = OmegaConf.select(tree, key.name) == value  # not converted, as "on" would be
    if not is_taken:
        choices = [str(choice) for choice in key.choices]
        is_list = get_origin(key.type) is list
        words = EXPECTED.get(key.type, "a list, as in [1, 2]" if is_list else "text")
        words = f"one of {', '.join(choices)}" if choices else words
        guess = _did_you_mean(*get_close_matches(str(text), choices, n=1))
        return f"{key.name}={shown(text)} is not {words}{guess}"
    if sentence := problem_of(key, value):
        OmegaConf.update(tree, key.name, key.default, merge=False)  # a good one, for other checks
        return f"{key.name}={shown(text)} {sentence}"
    return ""


def _checked(cls: type[T], layers: list[Layer]) -> T:
    """The filled config. Raises ConfigError with what is wrong and the rules that are broken."""
    config, wrong = _fill(cls, layers)
    level = {name: number for number, (_, values) in enumerate(layers) for name in values}
    for key, other in without_effect(config):
        if level.get(key.name, 0) < level.get(other, 0):  # what came later switched it off
            set_value(config, key.name, copy.copy(key.default))
    if problems := [*wrong.values(), *broken_rules(config, wrong)]:
        raise ConfigError(problems)
    return config


def _unknown(cls: type, name: str) -> str:
    """What is said of a key that is none, with the likely ones."""
    leaves = {key: key.rpartition(".")[2] for key in keys(cls)}
    if inside := [key for key in leaves if key.startswith(name + ".")]:
        return f"{name} is a section; set its keys, for example {inside[0]}"
    last = name.rpartition(".")[2]
    close = [] if last in leaves.values() else get_close_matches(name, leaves, n=1)
    likely = get_close_matches(last, leaves.values(), n=1)
    guesses = close or [key for key, leaf in leaves.items() if leaf in likely][:3]
    return f"{name}: there is no such key{_did_you_mean(*guesses)} (--help lists all)"


def _did_you_mean(*guesses: str) -> str:
    return f"; did you mean {' or '.join(guesses)}?" if guesses else ""
