"""From the command line and YAML files to a filled config dataclass, and back to YAML.

In: arguments `key=value`, among them `config=NAME|PATH`. Later ones win:

    schema defaults < base of the file < file < command line

What switches something off takes along what earlier ones tuned of it: adversarial.weight=0 on the
command line is enough over a file with an adversarial recipe.
Out: an instance of the schema's dataclass, or one ConfigError that lists every problem found. No
torch is imported. Values follow YAML's rules: `[1, 2]` is a list, `3e-4` a number, `null` nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_dist.config import checks, command_checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import (
    Key,
    changed_numbers,
    flatten,
    help_text,
    keys,
    nearest,
    sections,
    shown,
)
from vae_dist.config.schema import TrainConfig

__all__ = [
    "changed_numbers",
    "config_names",
    "flatten",
    "from_yaml",
    "help_text",
    "load_command",
    "load_train_config",
    "to_yaml",
    "wants_help",
]

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One value that somebody gave. `text` is what was typed; `origin` is the file, or empty."""

    name: str
    value: Any
    text: str
    origin: str = ""

    def problem(self, sentence: str) -> str:
        return f"{self.origin}: {sentence}" if self.origin else sentence


def wants_help(argv: list[str]) -> bool:
    return any(argument in ("-h", "--help", "help") for argument in argv)


def load_train_config(argv: list[str]) -> TrainConfig:
    """The config that `argv` asks for. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    given = _parse_arguments(TrainConfig, argv, problems)
    chosen = [setting.text for setting in given if setting.name == "config"]
    inherited: list[_Setting] = []
    try:
        if not chosen:
            raise ConfigError("config is missing; for example config=mnist" + _there_are())
        inherited = _file_settings(_find(chosen[-1], key="config"), chain=())
        file_was_read = True
    except ConfigError as error:
        problems += error.problems
        file_was_read = False
    settings = [*inherited, *given]
    config, missing, wrong = _fill(TrainConfig, settings, problems)
    if file_was_read:
        if off := _switched_off(settings, config):
            config = _fill(TrainConfig, [s for s in settings if s.name not in off], [])[0]
        config.run = config.run or f"runs/{Path(chosen[-1]).stem}"
        problems += missing
        # A rule between keys says nothing useful while one of its keys has no good value.
        problems += [rule.text for rule in checks.violations(config) if not wrong & set(rule.keys)]
    if problems:
        raise ConfigError(problems)
    return config


def load_command(cls: type[T], argv: list[str]) -> T:
    """The keys of another command. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    command, missing, wrong = _fill(cls, _parse_arguments(cls, argv, problems), problems)
    rules = command_checks.command_violations(command)
    problems += missing + [rule.text for rule in rules if not wrong & set(rule.keys)]
    if problems:
        raise ConfigError(problems)
    return command


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, *, origin: str = "config.yaml") -> TrainConfig:
    """The config that `to_yaml` wrote. Keys and types are checked, rules between keys are not."""
    problems: list[str] = []
    settings = _flat(_parse_yaml(text, origin), "", origin)
    config, missing, _ = _fill(TrainConfig, settings, problems)
    problems += [f"{origin}: {line}" for line in missing]
    if problems:
        raise ConfigError(problems)
    return config


# ---- where configs lie ----


def _folders() -> list[Path]:
    """Where names are looked up: ./configs, then those that ship with vae_dist."""
    # A wheel carries configs/ inside the package; in a checkout it lies beside the package.
    shipped = PACKAGE / "configs"
    return [Path("configs"), shipped if shipped.is_dir() else PACKAGE.parent / "configs"]


def config_names() -> list[str]:
    """The names that `config=` takes here."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def _there_are() -> str:
    return f" (there are: {', '.join(config_names()) or 'none here'}; or give a YAML file's path)"


def _find(name: str, *, key: str, beside: Path | None = None) -> Path:
    """The file of a name or a path; `beside` is the folder of the file that has the `base`."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name) if beside is None else beside / name
        if path.is_file():
            return path
        hint = f"; did you mean {path.stem}?" if path.stem in config_names() else ""
        raise ConfigError(f"{key}={name}: no such file: {path}{hint}")
    for folder in ([beside] if beside else []) + _folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    close = difflib.get_close_matches(name, config_names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{key}={name}: no config has this name{hint}" + _there_are())


def _file_settings(path: Path, *, chain: tuple[Path, ...]) -> list[_Setting]:
    """The settings of a file after those of its bases."""
    chain = (*chain, path.resolve())
    if path.resolve() in chain[:-1]:
        names = " -> ".join(link.name for link in chain)
        raise ConfigError(f"{path}: base leads back to the file itself: {names}; remove one base")
    values = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    base = values.pop("base", None)
    inherited: list[_Setting] = []
    if isinstance(base, str):
        found = _find(base, key=f"{path}: base", beside=path.parent)
        inherited = _file_settings(found, chain=chain)
    elif base is not None:
        raise ConfigError(f"{path}: base={shown(base)} is not the name or path of one config")
    return [*inherited, *_flat(values, "", str(path))]


# ---- reading ----


def _parse_yaml(text: str, origin: str) -> dict[str, Any]:
    # OmegaConf's loader reads 3e-4 as a number and refuses a key that is given twice.
    try:
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        values = OmegaConf.to_container(tree, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{origin}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no keys; write one `key: value` per line")
    return {str(key): value for key, value in values.items()}


def _flat(values: dict[str, Any], prefix: str, origin: str) -> Iterator[_Setting]:
    for name, value in values.items():
        if prefix + name in sections(TrainConfig) and (value is None or isinstance(value, dict)):
            yield from _flat(
                {str(key): item for key, item in (value or {}).items()}, f"{prefix}{name}.", origin
            )
        else:
            yield _Setting(prefix + name, value, shown(value), origin)


def _parse_arguments(cls: type, argv: Iterable[str], problems: list[str]) -> list[_Setting]:
    settings = []
    known = keys(cls)
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals or not name or name != name.strip():
            problems.append(
                f"{argument!r} is not key=value (no spaces around =; --help lists keys)"
            )
            continue
        if name.startswith("-"):
            problems.append(f"{argument}: keys take no dashes; write {argument.lstrip('-')}")
            continue
        value = _parse_value(text, known.get(name))
        settings.append(_Setting(name, value, text))
    return settings


def _parse_value(text: str, key: Key | None) -> Any:
    """YAML's reading of `text`, or `text` itself where the key wants text (run=007)."""
    wants_text = key is not None and key.type in (str, str | None)
    try:
        tree = OmegaConf.from_dotlist([f"value={text}"])
        value = OmegaConf.to_container(tree, resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException):
        return text  # a brace or star pattern at the start; other types refuse it below
    if wants_text and not isinstance(value, str) and not (value is None and text):
        return text
    return value


# ---- filling ----


def _fill(
    cls: type[T], settings: Iterable[_Setting], problems: list[str]
) -> tuple[T, list[str], set[str]]:
    """A `cls` with every good setting, a line for each missing key, and the keys without a value.

    Appends what is wrong with the settings to `problems`; then the result is for checks only.
    """
    tree = OmegaConf.structured(cls)
    known = keys(cls)
    wrong: set[str] = set()
    for setting in settings:
        key = known.get(setting.name)
        if key is None:
            problems.append(setting.problem(_unknown(cls, setting.name)))
        elif "${" in str(setting.value):
            # OmegaConf would evaluate it (environment, other keys, resolvers).
            problems.append(
                setting.problem(f"{key.name}: ${{...}} is not evaluated; write the value")
            )
            wrong.add(key.name)
        else:
            try:
                OmegaConf.update(tree, key.name, _choice(key, setting), merge=False)
            except OmegaConfBaseException:
                problems.append(setting.problem(_wrong_value(key, setting)))
                wrong.add(key.name)
    missing = []
    for name, key in known.items():
        if OmegaConf.is_missing(_parent(tree, name), name.rpartition(".")[2]):
            if name not in wrong:
                missing.append(f"{name} is missing: {key.help}; give {name}=...")
            wrong.add(name)
            OmegaConf.update(tree, name, "")  # lets the other keys be checked
    config: Any = OmegaConf.to_object(tree)
    return config, missing, wrong


def _switched_off(settings: list[_Setting], config: TrainConfig) -> set[str]:
    """The keys that had an effect in the file that set them, until what came later took it."""
    off = set()
    for name in _without_effect(config):
        origin = [setting.origin for setting in settings if setting.name == name][-1]
        of_origin = [place for place, setting in enumerate(settings) if setting.origin == origin]
        earlier = _fill(TrainConfig, settings[: of_origin[-1] + 1], [])[0]
        if name not in _without_effect(earlier):
            off.add(name)
    return off


def _without_effect(config: TrainConfig) -> list[str]:
    return [rule.keys[0] for rule in checks.violations(config) if rule.is_without_effect]


def _parent(tree: Any, name: str) -> Any:
    section = name.rpartition(".")[0]
    return OmegaConf.select(tree, section) if section else tree


def _choice(key: Key, setting: _Setting) -> Any:
    """The value to set; YAML reads the choice `no` as false, so the word is put back."""
    if isinstance(setting.value, bool) and key.choices:
        words = ("yes", "on", "true") if setting.value else ("no", "off", "false")
        return next((word for word in words if word in key.choices), setting.text)
    return setting.value


def _unknown(cls: type, name: str) -> str:
    if name in sections(cls):
        inside = [key for key in keys(cls) if key.startswith(name + ".")]
        return f"{name} is a section; set its keys, for example {inside[0]}"
    parents = [key for key in keys(cls) if name.startswith((key + ".", key + "["))]
    if parents:
        return f"{name}: {parents[0]} is one value; give it whole, as {parents[0]}=..."
    if name == "base":
        return "base belongs in a YAML file; on the command line give config=..."
    guesses = nearest(cls, name)
    hint = f"; did you mean {' or '.join(guesses)}?" if guesses else ""
    return f"{name}: there is no such key{hint} (--help lists all)"


def _wrong_value(key: Key, setting: _Setting) -> str:
    given = f"{key.name}={setting.text}"
    if setting.value is None:
        return f"{given} gives no value; it takes {_expected(key.type)}"
    if key.type is int and isinstance(setting.value, float) and setting.value.is_integer():
        return f"{given} is not a whole number; write {key.name}={int(setting.value)}"
    sentence = f"{given} is not {_expected(key.type)}"
    close = difflib.get_close_matches(setting.text, [str(choice) for choice in key.choices], n=1)
    return f"{sentence}; did you mean {close[0]}?" if close else sentence


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_expected(part) for part in get_args(kind))
    if get_origin(kind) is list:
        items = {int: "whole numbers, as in [1, 2]", float: "numbers, as in [0.5, 1]"}
        return "a list of " + items.get(get_args(kind)[0], "words, as in [a, b]")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "null" if kind is type(None) else "a value")
