"""constraints.txt picks every version: a package without one would be whatever is current."""

from __future__ import annotations

import contextlib
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
OF_ONE_PLATFORM = ("nvidia-", "cuda-", "triton")  # torch picks them


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def test_every_package_that_an_installation_brings_is_pinned() -> None:
    """As far as it is installed here in the version that is pinned, for this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    pinned = pins()
    todo: list[tuple[str, str]] = [(line, "") for line in lines]
    seen: set[tuple[str, str]] = set()
    while todo:
        line, extra = todo.pop()
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        for own_extra in ("", *wanted.extras):
            if (name, own_extra) in seen or name.startswith(OF_ONE_PLATFORM):
                continue
            seen.add((name, own_extra))
            with contextlib.suppress(PackageNotFoundError):
                if version(name).partition("+")[0] == pinned.get(name):
                    todo += [(more, own_extra) for more in requires(name) or []]
    names = {name for name, _ in seen}
    assert names <= pinned.keys(), sorted(names - pinned.keys())


def test_pins_hold_for_every_platform() -> None:
    for name, number in pins().items():
        assert name == canonicalize_name(name) and not name.startswith(OF_ONE_PLATFORM)
        assert Version(number).local is None
