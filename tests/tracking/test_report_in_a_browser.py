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


def test_the_slider_shows_the_images_of_its_step(tmp_path: Path) -> None:
    write_report_run(tmp_path / "a", lr=1e-3, level=95.0)
    write_report_run(tmp_path / "b", lr=1e-4, level=90.0)
    out = tmp_path / "report.html"
    assert main([f"run={tmp_path / 'a'},{tmp_path / 'b'}", f"out={out}"]) == 0
    visible = "[...document.querySelectorAll('img')].filter((image) => image.offsetWidth)"
    steps = f"{visible}.map((image) => image.dataset.step).join(' ')"
    with Page(out, tmp_path / "profile") as page:
        assert page.value(steps) == "400 400 400 400"
        slider = "document.getElementById('time')"
        page.value(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")
        assert page.value(steps) == "100 100 100 100"
        caption = "document.querySelector('figcaption').textContent"
        assert page.value(caption).startswith("step 100 ")
        assert page.value("document.querySelectorAll('svg polyline').length") >= 4
        assert (page.errors, page.requests) == ([], [])
