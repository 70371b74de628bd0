"""The report of runs as training leaves them, and of folders from anywhere."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.support.tiny_run import tiny_config
from vae_dist.report import main
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.images import save_png
from vae_dist.tracking.report import MAX_POINTS, Run, _tag, evenly, thinned, write_report
from vae_dist.tracking.sinks import JsonlSink

EVALUATED = (100, 200, 300, 400)


def write_run(path, *, level=90.0):
    """400 steps, a row each 4, evaluated at 100, 200, 300 and 400; `level` is the final -ELBO."""
    folder = RunFolder(path)
    folder.create()
    config = tiny_config()
    config.run, config.optimizer.lr, config.training.steps = str(path), 1e-3, 400
    folder.write_config(config)
    log = JsonlSink(folder.log_path, resume_step=0)
    for step in range(4, 401, 4):
        loss = level + 300 * math.exp(-step / 50)
        row = {"train/neg_elbo_nats": loss, "train/beta": 1.0, "optim/lr": 1e-3}
        if step in EVALUATED:
            row |= {"eval/neg_elbo_nats": loss + 1, "eval/bits_per_dim": loss / 543}
            row |= {"latent/kl_nats_per_unit": [3.0, step / 400, 0.01], "latent/active_units": 2}
            for name in ("samples", "reconstructions"):
                save_png(
                    Image.new("L", (8, 8), step // 4), folder.images / f"{name}_{step:08d}.png"
                )
        log.log(step, row)
    folder.write_status("finished", step=400, reason="all steps are done")
    results = {"step": 400, "weights": "ema", "data": "shards", "figures": {"neg_elbo_nats": level}}
    (path / "results.json").write_text(json.dumps(results))
    return folder


class Page(HTMLParser):
    """(tag, attributes) of each element of a page; every one that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_a_run_in_one_file_without_links(tmp_path, capsys):
    folder, out = write_run(tmp_path / "a"), tmp_path / "a" / "report.html"
    with folder.log_path.open("a") as log:
        log.write('{"step": 404, "eval/neg_elbo_nats": Infinity}\n')
    (tmp_path / "a" / "results_x.json").write_text('{"step": 4, "figures": {"x": NaN, "y": 1.0}}')
    assert main([f"run={tmp_path / 'a'}"]) == 0 and str(out) in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "") and "default-src 'none'" in text
    samples = page.all("img")[: len(EVALUATED)]
    assert [int(image["data-step"]) for image in samples] == list(EVALUATED)
    assert samples[-1]["alt"].startswith("step 400 | 91.1 nats | ")
    assert json.loads(page.all("input")[0]["data-steps"]) == list(EVALUATED)
    for part in (
        "<title>a eval/neg_elbo_nats, step 400: 91.1</title>",
        "<title>a latent/kl_nats_per_unit, unit 3: 0.01</title>",
        "<td>optimizer.lr</td><td>0.001</td>",
        "<td>neg_elbo_nats</td><td>90</td>",
        "<td>x</td><td>-</td>",
    ):
        assert part in text
    assert "eval/neg_elbo_nats, step 404" not in text
    keys = re.findall(r"<small style=[^>]*>(\w+/neg_elbo_nats)</small>", text)
    assert keys == ["train/neg_elbo_nats", "eval/neg_elbo_nats"]
    titles = re.findall(r"<h3>(.*?) <small>", text)
    assert titles == ["-ELBO", "Bits/dim", "Rate per unit"]  # what is constant is left out


def test_several_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, level in (("a/seed_0", 95.0), ("b/seed_0", 90.0), ("b/seed_1", 92.0)):
        write_run(tmp_path / name, level=level)
    assert main(["run=a/seed_0,b/seed_0,b/seed_1"]) == 0
    text = Path("report.html").read_text(encoding="utf-8")
    assert "<title>a/seed_0, b/seed_0, b/seed_1 - " in text
    names = re.findall(r"</span>(\w/seed_\d)</span>", text.partition("<h2>")[0])
    assert names == ["b/seed_0", "b/seed_1", "a/seed_0"]  # the best first
    assert len(Page(text).all("figure")) == 3 * 2
    for wrong in ("run=nothing", "run=,"):
        assert main([wrong]) == 2
        assert wrong.removesuffix(",") in capsys.readouterr().err


HOSTILE = "</script><script>alert(1)</script><img src=x onerror='a()'>\" onerror=\"&\x1b[31m\u202e"


def test_a_folder_from_anywhere(tmp_path):
    """Texts are escaped; pictures and files of other forms and sizes are left out."""
    folder = write_run(tmp_path / 'a<b>" onerror="x')
    session = {"host": HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    for name, content in {
        "results": {"data": HOSTILE, "at": "https://me:s3cret@host/x", "figures": {HOSTILE: 1.0}},
        "results_y": {"figures": 3},
        "environment": {"sessions": [session]},
        "status": {"status": HOSTILE, "step": "x"},
    }.items():
        (folder.path / f"{name}.json").write_text(json.dumps(content))
    (folder.path / "results_x.json").write_text("[" * 10**5)
    os.mkfifo(folder.path / "results_z.json")
    with folder.log_path.open("a") as log:
        for value in ("1e999", "1" + "0" * 400, "5e-324", '[1, "x", null, {}]', '{"a": 1}', '"x"'):
            log.write('{"step": 404, "eval/neg_elbo_nats": ' + value + "}\n")
        log.write('{"step": 1' + "0" * 400 + ', "optim/lr": 1}\n')
    save_png(Image.new("L", (8, 8)), folder.images / "<i>\"'_00000100.png")
    Image.new("L", (8, 8)).save(folder.images / "tiff_00000100.png", "TIFF")
    Image.new("1", (20_000, 20_000)).save(folder.images / "bomb_00000100.png", "PNG")
    os.mkfifo(folder.images / "fifo_00000100.png")
    text = write_report([folder.path])
    page = Page(text + _tag("p", title=HOSTILE))
    assert len(page.all("script")) == 1 and not page.all("b") and not page.all("i")
    assert all("onerror" not in attributes for _, attributes in page.found)
    assert {str(image["src"])[:10] for image in page.all("img")} == {"data:image"}
    assert len(page.all("figure")) == 3 and "s3cret" not in text
    assert not set(text) & {"\x1b", "\u202e"} and r"\x1b[31m\u202e" in text


def test_a_run_that_has_only_begun(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    folder.write_config(tiny_config())
    run = Run(tmp_path, "a")
    assert (run.curves, run.status, run.sessions, run.results) == ({}, {}, [], [])
    Page(write_report([tmp_path]))


def test_long_curves_are_thinned_to_means_and_few_steps_of_many_are_shown():
    points = thinned([(float(step), float(step % 2)) for step in range(1, 10 * MAX_POINTS + 1)])
    assert len(points) == MAX_POINTS and points[-1] == (10 * MAX_POINTS, 0.5)
    assert thinned(points) == points and thinned([]) == []
    assert evenly([1, 2, 3, 4, 5], 9) == [1, 2, 3, 4, 5]
    assert evenly(list(range(1, 8)), 3) == [1, 4, 7]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs headless Chromium")
def test_the_slider_shows_the_images_of_its_step(tmp_path):
    """In Chromium, without a warning of its content security policy."""
    text = write_report([write_run(tmp_path / name).path for name in "ab"])
    move = "<script>slider.value = 1; slider.oninput();</script></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", move))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", tmp_path / "page.html"]
    answer = subprocess.run(browser, capture_output=True, text=True, timeout=60)
    images = Page(answer.stdout).all("img")
    assert [image["data-step"] for image in images if "hidden" not in image] == ["200"] * 4
    assert len(re.findall("<figcaption>step 200 ", answer.stdout)) == 4
    assert "CONSOLE" not in answer.stderr
