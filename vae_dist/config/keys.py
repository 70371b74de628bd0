"""The keys of a config class: their dotted names, types, defaults and descriptions.

In: a dataclass of `vae_dist.config.schema`. Out: one `Key` per knob, and what is made of these:
the text of `--help`, the nearest names of a misspelt key, and the flat view of a filled config.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

MISSING = "???"  # OmegaConf's mark of a value that must be given
HELP_WIDTH = 100
HELP_COLUMN = 40


@dataclasses.dataclass(frozen=True)
class Key:
    """One knob. `default` is MISSING where a value must be given."""

    name: str
    type: Any
    default: Any
    help: str
    neutral: bool

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()


def keys(cls: type) -> dict[str, Key]:
    """All knobs of `cls` by dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(cls, "")}


def sections(cls: type) -> set[str]:
    """The dotted names that hold keys rather than a value."""
    return {name.rpartition(".")[0] for name in keys(cls)} - {""}


def _walk(cls: type, prefix: str) -> Iterator[Key]:
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, types[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _walk(kind, name + ".")
            continue
        # A default is a value, or is made by a factory so that instances do not share a list.
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        yield Key(name, kind, default, field.metadata["help"], field.metadata.get("neutral", False))


def nearest(cls: type, name: str) -> list[str]:
    """Known keys that `name` may have meant, best first; those with the same last part win."""
    known = list(keys(cls))
    last = name.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == last]
    if same_leaf:
        return same_leaf[:3]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close
    leaves = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in known], n=1)
    return [key for key in known if key.rpartition(".")[2] in leaves][:3]


def flatten(config: Any) -> dict[str, Any]:
    """The values of a filled config by dotted name."""
    values = {}
    for name in keys(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values


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
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)


def help_text(cls: type, *, usage: str, intro: str) -> str:
    """What `--help` prints: `usage`, `intro`, then every key with default and description."""
    lines = [f"usage: {usage}", "", textwrap.fill(intro, HELP_WIDTH)]
    section = None
    for key in keys(cls).values():
        name = key.name.rpartition(".")[0]
        if name != section:
            lines += ["", name or "keys"]
            section = name
        lines += _help_lines(key)
    return "\n".join(lines)


def _help_lines(key: Key) -> list[str]:
    if key.default == MISSING:
        left, note = f"  {key.name}=...", "required: "
    else:
        left, note = f"  {key.name}={shown(key.default)}", ""
    text = note + key.help
    if key.choices:
        text += f" [{' | '.join(str(choice) for choice in key.choices)}]"
    indent = " " * HELP_COLUMN
    lines = textwrap.wrap(
        text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    if len(left) < HELP_COLUMN:
        lines[0] = left.ljust(HELP_COLUMN) + lines[0].lstrip()
        return lines
    return [left, *lines]
