"""The documents are short enough and current, and every link leads somewhere; constraints.txt picks
every version: a package without one would be whatever is current."""

import contextlib
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from vae_dist import train

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/*.md")})
LINK = re.compile(r"\]\(([^)\s]+)\)")
OF_ONE_PLATFORM = ("nvidia-", "cuda-", "triton")  # torch picks them


def headings(page):
    """The anchors that a page's headings get."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def test_links_lead_somewhere():
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not link.startswith(("http://", "https://")):
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in headings(target), f"{page.name}: {link}"


def test_the_page_of_keys_is_current_and_the_readme_fits_two_screens(capsys):
    assert train.main(["--help"]) == 0
    page = (ROOT / "docs" / "config.md").read_text().partition("```text\n")[2]
    assert page == f"{capsys.readouterr().out}```\n", "paste what train --help prints"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_every_package_that_an_installation_brings_is_pinned_for_every_platform():
    """As far as it is installed here in the version that is pinned, for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    pinned = dict(pairs)
    assert len(pinned) == len(pairs)
    for name, number in pairs:
        assert name == canonicalize_name(name) and not name.startswith(OF_ONE_PLATFORM)
        assert Version(number).local is None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    todo, seen = [(Requirement(line), "") for line in wanted], set[tuple[str, str]]()
    while todo:
        requirement, extra = todo.pop()
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if name.startswith(OF_ONE_PLATFORM) or (marker and not marker.evaluate({"extra": extra})):
            continue
        for own_extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, own_extra))
            with contextlib.suppress(PackageNotFoundError):
                if version(name).partition("+")[0] == pinned.get(name):
                    todo += [(Requirement(more), own_extra) for more in requires(name) or []]
    assert {name for name, _ in seen} <= pinned.keys()
