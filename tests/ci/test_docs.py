"""The documents are short enough and current, and every link leads somewhere."""

import re
from pathlib import Path

from vae_dist import train

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/*.md")})
LINK = re.compile(r"\]\(([^)\s]+)\)")


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
    assert max(map(len, page.splitlines())) <= 100
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
