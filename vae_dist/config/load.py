"""From the command line and YAML files to a filled config dataclass, and back to YAML.

In: arguments `key=value`, among them `config=NAME|PATH`. Later ones win:

    schema defaults < base of the file < file < command line

What switches something off takes along what earlier ones tuned of it: adversarial.weight=0 on the
command line is enough over a file with an adversarial recipe.
Out: an instance of the schema's dataclass, or one ConfigError that lists every problem found. No
torch is imported. Values follow YAML 1.2: `[1, 2]` is a list, `3e-4` and `010` are numbers, `null`
is nothing, and `on`, `no`, `1:30` and `1_000` are words. Keys that take text take it as it stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_dist.config import checks
from vae_dist.config.errors import ConfigError
from vae_dist.config.keys import MISSING, Key, keys, sections, shown
from vae_dist.config.schema import TrainConfig

T = TypeVar("T")
TEXT = (str, str | None)
EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    list[int]: "a list of whole numbers, as in [1, 2]",
    list[float]: "a list of numbers, as in [0.5, 1]",
    list[str]: "a list of words, as in [a, b]",
    Any: "a value",
}
PACKAGE = Path(__file__).resolve().parents[1]


class _Yaml(yaml.BaseLoader):
    """Every scalar as text; each key once, no anchors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"anchors are not read{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"found {', '.join(twice)} twice{node.start_mark}")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class _Setting:
    """One value that was given, its scalars as text. `origin` is the file, or empty."""

    name: str
    text: Any
    origin: str = ""

    def problem(self, sentence: str) -> str:
        return f"{self.origin}: {sentence}" if self.origin else sentence


def load_train_config(argv: list[str]) -> TrainConfig:
    """The config that `argv` asks for. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    given = _parse_arguments(TrainConfig, argv, problems)
    chosen = [str(setting.text) for setting in given if setting.name == "config"]
    try:
        if not chosen:
            raise ConfigError("config is missing; for example config=mnist" + _there_are())
        inherited = _file_settings(_find(chosen[-1], key="config"), chain=())
    except ConfigError as error:
        problems += error.problems
        required = [key.name for key in keys(TrainConfig).values() if key.default == MISSING]
        _fill(TrainConfig, [*(_Setting(name, "-") for name in required), *given], problems)
        raise ConfigError(problems) from None
    settings = [*inherited, *given]
    config, wrong = _fill(TrainConfig, settings, problems)
    if off := _switched_off(settings, config):
        config, _ = _fill(TrainConfig, [s for s in settings if s.name not in off], [])
    config.run = config.run or f"runs/{Path(chosen[-1]).stem}"
    return _checked(config, wrong, problems)


def load_command(cls: type[T], argv: list[str]) -> T:
    """The keys of another command. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    command, wrong = _fill(cls, _parse_arguments(cls, argv, problems), problems)
    return _checked(command, wrong, problems)


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, *, origin: str = "config.yaml") -> TrainConfig:
    """The config that `to_yaml` wrote. Keys and types are checked, rules between keys are not."""
    problems: list[str] = []
    settings = _flat(_file_values(text, origin), "", origin)
    config, _ = _fill(TrainConfig, settings, problems)
    if problems:
        raise ConfigError(f"{origin}: {line.removeprefix(f'{origin}: ')}" for line in problems)
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
        path = Path(name).expanduser() if beside is None else beside / name
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
    values = _file_values(_text(path), str(path))
    base = values.pop("base", None)
    inherited: list[_Setting] = []
    if isinstance(base, str):
        found = _find(base, key=f"{path}: base", beside=path.parent)
        inherited = _file_settings(found, chain=chain)
    elif base is not None:
        raise ConfigError(f"{path}: base={shown(base)} is not the name or path of one config")
    return [*inherited, *_flat(values, "", str(path))]


# ---- reading ----


def _text(path: Path) -> str:
    """Of a file in UTF-8, or in UTF-16 as its first two bytes then say."""
    try:
        data = path.read_bytes()
        is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text ({error.reason}); save it as UTF-8") from None


def _file_values(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Yaml) or {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{origin}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no keys; write one `key: value` per line")
    return values


def _flat(values: dict[str, Any], prefix: str, origin: str) -> Iterator[_Setting]:
    for name, text in values.items():
        if prefix + name in sections(TrainConfig) and (not text or isinstance(text, dict)):
            yield from _flat(text or {}, f"{prefix}{name}.", origin)
        else:
            yield _Setting(prefix + name, text, origin)


def _parse_arguments(cls: type, argv: Iterable[str], problems: list[str]) -> list[_Setting]:
    settings = []
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals or not name or name != name.strip():
            problems.append(
                f"{argument!r} is not key=value (no spaces around =; --help lists keys)"
            )
        elif name.startswith("-"):
            problems.append(f"{argument}: keys take no dashes; write {argument.lstrip('-')}")
        else:
            key = keys(cls).get(name)
            is_one = key is not None and (key.type in TEXT or bool(key.choices))
            settings.append(_Setting(name, _argument(text, is_one=is_one)))
    return settings


def _argument(text: str, *, is_one: bool) -> Any:
    """A list or mapping as YAML has it, or the text itself; `is_one`: the key takes no list."""
    try:
        value = yaml.load(text, _Yaml)
    except (yaml.YAMLError, RecursionError):  # a brace or star pattern at the start
        return text
    if isinstance(value, str):
        return value if text.strip()[0] in "'\"" else text
    return text if is_one or value is None else value


def _value(key: Key, text: Any) -> Any:
    """What the text says to the key: numbers where it takes them, otherwise text as it stands."""
    if isinstance(text, dict):  # the weight of a data set in a mixture is a number
        weighed = replace(key, is_text=False)
        return {name: _value(weighed if name == "weight" else key, t) for name, t in text.items()}
    if isinstance(text, list):
        return [_value(key, item) for item in text]
    takes_text = key.is_text or key.type in (*TEXT, list[str])
    takes_text = takes_text or any(isinstance(choice, str) for choice in key.choices)
    is_null = text in ("null", "~") or (not text and key.type == str | None)
    return text if takes_text and not is_null else _scalar(text)


def _scalar(text: str) -> Any:
    """YAML 1.2's reading (its core schema)."""
    if re.fullmatch("null|Null|NULL|~|", text):
        return None
    if re.fullmatch("true|True|TRUE|false|False|FALSE", text):
        return text[0] in "tT"
    if re.fullmatch("[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


# ---- filling ----


def _checked(config: T, wrong: set[str], problems: list[str]) -> T:
    """The config. Raises ConfigError with `problems` and the rules that it breaks."""
    # A rule between keys says nothing useful while one of its keys has no good value.
    problems += [v.text for v in checks.violations(config) if not wrong & set(v.keys)]
    if problems:
        raise ConfigError(problems)
    return config


def _fill(cls: type[T], settings: Iterable[_Setting], problems: list[str]) -> tuple[T, set[str]]:
    """A `cls` with every good setting, and the keys that have no good value.

    Appends what is wrong and what is missing to `problems`; then the result is for checks only.
    """
    tree = OmegaConf.structured(cls)
    known = keys(cls)
    missing = {key.name for key in known.values() if key.default == MISSING}
    wrong: set[str] = set()
    for setting in settings:
        key = known.get(setting.name)
        if key is None:
            problems.append(setting.problem(_unknown(cls, setting.name)))
        elif sentence := _set(tree, key, setting):
            problems.append(setting.problem(sentence))
            wrong.add(key.name)
        else:
            missing.discard(key.name)
    for name in missing:
        OmegaConf.update(tree, name, "")  # lets the other keys be checked
    problems += [
        f"{key.name} is missing: {key.help}; give {key.name}=..."
        for key in known.values()
        if key.name in missing - wrong
    ]
    config: Any = OmegaConf.to_object(tree)
    return config, wrong | missing


def _set(tree: Any, key: Key, setting: _Setting) -> str:
    """Set the value; what is wrong with it otherwise."""
    value = _value(key, setting.text)
    if "${" in str(value):  # OmegaConf would evaluate it: environment, other keys, resolvers
        return f"{key.name}: ${{...}} is not evaluated; write the value"
    if not _fits(key.type, value) or value == MISSING:
        return _wrong_value(key, setting.text)
    try:
        OmegaConf.update(tree, key.name, value, merge=False)
    except OmegaConfBaseException:
        return _wrong_value(key, setting.text)
    return ""


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


def _fits(kind: Any, value: Any) -> bool:
    """Whether a number, truth value or list is of the type: OmegaConf would convert text."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(get_args(kind)[0], item) for item in value)
    numbers = {int: (int,), float: (int, float), bool: (bool,)}
    return type(value) in numbers[kind] if kind in numbers else True


# ---- what is said of wrong settings ----


def _unknown(cls: type, name: str) -> str:
    known = list(keys(cls))
    inside = [key for key in known if key.startswith(name + ".")]
    around = [key for key in known if name.startswith((key + ".", key + "["))]
    if inside:
        return f"{name} is a section; set its keys, for example {inside[0]}"
    if around:
        return f"{name}: {around[0]} is one value; give it whole, as {around[0]}=..."
    if name == "base":
        return "base belongs in a YAML file; on the command line give config=..."
    leaves = [key.rpartition(".")[2] for key in known]
    last = name.rpartition(".")[2]  # keys with the same last part win
    close = [] if last in leaves else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    likely = difflib.get_close_matches(last, leaves, n=1)
    guesses = close or [key for key, leaf in zip(known, leaves, strict=True) if leaf in likely][:3]
    hint = f"; did you mean {' or '.join(guesses)}?" if guesses else ""
    return f"{name}: there is no such key{hint} (--help lists all)"


def _wrong_value(key: Key, text: Any) -> str:
    value = _value(key, text)
    words = "one of " + ", ".join(map(str, key.choices)) if key.choices else EXPECTED[key.type]
    if value is None:
        return f"{key.name}= gives no value; it takes {words}"
    meant: Any = int(value) if isinstance(value, float) and value.is_integer() else None
    if isinstance(value, str) and not key.choices:
        truths = {"yes": True, "on": True, "no": False, "off": False}
        meant = truths.get(value.lower(), _scalar(value.replace("_", "")))
    sentence = f"{key.name}={shown(text)} is not {words}"
    if meant is not None and _fits(key.type, meant):
        return f"{sentence}; write {key.name}={shown(meant)}"
    close = difflib.get_close_matches(str(value), [str(choice) for choice in key.choices], n=1)
    return f"{sentence}; did you mean {close[0]}?" if close else sentence
