"""What a knob is: default, description, range and form, and the flat view of a config.

A config class is a dataclass whose fields come from `knob` and `section`. In: such a class, or a
filled instance. Out: one `Key` for each knob, by dotted name, and what is made of these.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

MISSING = "???"  # the default of a knob whose value must be given


@dataclasses.dataclass(frozen=True)
class Key:
    """One knob. `default` is MISSING where a value must be given."""

    name: str
    type: Any
    default: Any
    help: str  # one line, with the unit
    neutral: bool = False  # other values give the same numbers
    when: str = ""  # "data.mask=random|rectangle objective.beta!=0": else it has no effect
    ge: float | None = None  # bounds of a number, or of each number of a list
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    form: str = ""  # words and kinds (vae_dist.config.checks), one of which the value is

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()


def knob(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field with its description and what else a `Key` says of it."""
    metadata = {"help": help, **rules}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, **rules: Any) -> Any:
    """A field that holds keys; its `neutral` and `when` are theirs, but for keys in `when`."""
    return dataclasses.field(default_factory=cls, metadata=rules)


class Section:
    """Base of the config classes. A frozen one is read-only, its copies are not."""

    def freeze(self) -> None:
        for value in [*vars(self).values()]:
            if isinstance(value, Section):
                value.freeze()
        vars(self)["is_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "is_frozen" in vars(self):
            raise AttributeError(f"{name}: the config is read-only once it is resolved")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "is_frozen"}


_KNOWN: dict[type, dict[str, Key]] = {}


def keys(cls: type) -> dict[str, Key]:
    """All knobs of `cls` by dotted name, in the order of the schema."""
    if cls not in _KNOWN:
        _KNOWN[cls] = {key.name: key for key in _walk(cls, "", {})}
    return _KNOWN[cls]


def _walk(cls: type, prefix: str, outer: Mapping[str, Any]) -> Iterator[Key]:
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind, rules = prefix + field.name, types[field.name], field.metadata
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _walk(kind, name + ".", rules)
            continue
        when = [text for text in outer.get("when", "").split() if not text.startswith(name)]
        when += [
            text if "." in text.partition("=")[0] else prefix + text
            for text in rules.get("when", "").split()
        ]
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        yield Key(name, kind, default, **{**outer, **rules, "when": " ".join(when)})


def conditions(text: str) -> list[tuple[str, bool, list[str]]]:
    """(key, whether it must differ, values) for each condition of a Key's `when`."""
    parts = [part.partition("=") for part in text.split()]
    return [(key.rstrip("!"), key[-1] == "!", values.split("|")) for key, _, values in parts]


def value_of(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def set_value(config: Any, name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    setattr(value_of(config, section) if section else config, leaf, value)


def flatten(config: Any) -> dict[str, Any]:
    """The values of a filled config by dotted name."""
    return {name: value_of(config, name) for name in keys(type(config))}


def changed_numbers(old: Any, new: Any) -> list[str]:
    """'key: old -> new' for each key that differs and that changes the numbers of a run."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {shown(before[name])} -> {shown(after[name])}"
        for name, key in keys(type(new)).items()
        if not key.neutral and before[name] != after[name]
    ]


def shown(value: Any) -> str:
    """A value as one would type it on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case list() | tuple():
            return f"[{', '.join(map(shown, value))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    return str(value)


def wants_help(argv: list[str]) -> bool:
    return any(argument in ("-h", "--help", "help") for argument in argv)


def help_text(cls: type, *, usage: str, intro: str) -> str:
    """What `--help` prints: `usage`, `intro`, then every key with default and description."""
    lines = [f"usage: {usage}", "", textwrap.fill(intro, 100)]
    section = None
    for key in keys(cls).values():
        if section != (section := key.name.rpartition(".")[0]):
            lines += ["", section or "keys"]
        text = f"  {key.name}=" + ("..." if key.default == MISSING else shown(key.default))
        text = text.ljust(39) + " " + "required: " * (key.default == MISSING) + key.help
        text += f" (with {key.when})" if key.when else ""
        text += f" [{' | '.join(map(str, key.choices))}]" if key.choices else ""
        lines += textwrap.wrap(text, 100, subsequent_indent=" " * 40, break_on_hyphens=False)
    return "\n".join(lines)
