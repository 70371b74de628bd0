"""The report as a person opens it: in Chromium, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import Page, find_chromium
from tests.support.report_run import write_report_run
from vae_dist.report import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs headless Chromium"),
]

SLIDER = "document.querySelector('#picture-samples input[type=range]')"
IMAGE = "document.querySelector('#picture-samples img')"


def test_one_run(tmp_path: Path) -> None:
    write_report_run(tmp_path / "a")
    assert main([f"run={tmp_path / 'a'}"]) == 0
    with Page(tmp_path / "a" / "report.html", tmp_path / "profile") as page:
        assert page.value("document.querySelector('h1').textContent") == "afinished"
        assert page.value("document.querySelectorAll('.panel svg path').length") >= 5
        assert page.value(f"{SLIDER}.value + ' of ' + {SLIDER}.max") == "3 of 3"
        latest = page.value(f"{IMAGE}.src")
        page.value(f"{SLIDER}.value = 0; {SLIDER}.dispatchEvent(new Event('input'))")
        assert page.value(f"{IMAGE}.src") != latest
        caption = "document.querySelector('#picture-samples figcaption').textContent"
        assert page.value(caption).startswith("step 100 ")
        hover = "new PointerEvent('pointermove', {clientX: 200, clientY: 300, bubbles: true})"
        page.value(f"document.querySelector('.panel svg').dispatchEvent({hover})")
        assert " at " in page.value("document.querySelector('.panel .legend').textContent")
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        assert (page.errors, page.requests) == ([], [])


def test_runs_side_by_side(tmp_path: Path) -> None:
    write_report_run(tmp_path / "a", lr=1e-3, level=95.0)
    write_report_run(tmp_path / "b", lr=1e-4, level=90.0)
    out = tmp_path / "report.html"
    assert main([f"run={tmp_path / 'a'},{tmp_path / 'b'}", f"out={out}"]) == 0
    with Page(out, tmp_path / "profile") as page:
        first = "document.querySelector('header tbody tr td').textContent"
        assert page.value(first) == "bfinished"  # the lower -ELBO
        assert page.value("document.querySelectorAll('#picture-samples img').length") == 2
        differing = "[...document.querySelectorAll('tr.differs td.key')].map(td => td.textContent)"
        assert page.value(differing) is not None
        assert "optimizer.lr" in page.value(f"{differing}.join(' ')")
        assert (page.errors, page.requests) == ([], [])
