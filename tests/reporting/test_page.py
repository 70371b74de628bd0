from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.report_run import EVALUATED, write_report_run
from vae_dist.report import main
from vae_dist.reporting.collect import MAX_POINTS, read_story, short_names
from vae_dist.reporting.frames import chosen, encode_frames
from vae_dist.tracking.images import save_png


def embedded(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match is not None
    return dict(json.loads(match[1]))


def test_a_run_in_one_file_without_links(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_report_run(tmp_path / "a")
    assert main([f"run={tmp_path / 'a'}"]) == 0
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "a" / "report.html") in capsys.readouterr().out
    # namespaces of SVG are names, not places
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    (run,) = embedded(page)["runs"]
    assert run["name"] == "a" and run["status"]["status"] == "finished"
    assert [frame["step"] for frame in run["pictures"]["samples"]] == list(EVALUATED)
    assert run["pictures"]["samples"][-1]["caption"].startswith("step 400 | 91.1 nats | ")
    assert run["curves"]["eval/neg_elbo_nats"][-1][0] == 400
    assert run["distributions"]["latent/kl_nats_per_unit"][-1] == [400, [3.0, 1.0, 0.01]]
    assert run["config"]["optimizer.lr"] == ["0.001", False]
    assert [one["figures"] for one in run["results"]] == [{"neg_elbo_nats": 90.0}]
    titles = [panel["title"] for panel in embedded(page)["sections"]["Latents"]]
    assert titles == ["Active units"]  # beta is constant, posterior variance is not there


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["a/seed_0", "b/seed_0", "b/seed_1"], ["a/seed_0", "b/seed_0", "seed_1"]),
        (["x/a/seed_0", "y/a/seed_0"], ["x/a/seed_0", "y/a/seed_0"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert short_names([Path("/runs") / path for path in paths]) == names


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/seed_0", "b/seed_0"):
        write_report_run(tmp_path / name)
    assert main(["run=a/seed_0,b/seed_0"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<title>a/seed_0, b/seed_0 - " in page
    assert [run["name"] for run in embedded(page)["runs"]] == ["a/seed_0", "b/seed_0"]


def test_figures_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "a")
    (tmp_path / "a" / "results.json").write_text('{"step": 4, "figures": {"x": NaN, "y": 1.0}}')
    with folder.log_path.open("a") as log:
        log.write('{"step": 404, "eval/neg_elbo_nats": Infinity}\n')
    assert main([f"run={tmp_path / 'a'}"]) == 0
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    (run,) = embedded(page)["runs"]
    assert run["results"] == [{"step": 4, "figures": {"x": None, "y": 1.0}}]
    assert run["curves"]["eval/neg_elbo_nats"][-1][0] == 400


def test_a_value_cannot_leave_its_script_element(tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "a")
    folder.write_status("failed", step=3, reason="</script><script>alert(1)</script>")
    assert main([f"run={tmp_path / 'a'}"]) == 0
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page
    assert embedded(page)["runs"][0]["status"]["reason"].startswith("</script>")


@pytest.mark.parametrize("given", ["run=nothing", "run=,", "run=a picture_megabytes=0"])
def test_what_is_no_run_is_refused(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(given.split(" ")) == 2
    assert given.split(" ")[-1].split(",")[0] in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "a")
    for path in (folder.log_path, folder.status_path, tmp_path / "a" / "results.json"):
        path.unlink()
    (tmp_path / "a" / "environment.json").write_text('{"sessions": [{"first')
    story = read_story(tmp_path / "a", picture_bytes=10**6)
    assert (story.curves, story.status, story.sessions, story.results) == ({}, {}, [], [])


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "a")
    rows = [json.dumps({"step": step, "x": step % 2}) for step in range(1, 10 * MAX_POINTS + 1)]
    folder.log_path.write_text("\n".join(rows) + "\n")
    points = read_story(tmp_path / "a", picture_bytes=10**6).curves["x"]
    assert len(points) == MAX_POINTS
    assert points[-1] == (10 * MAX_POINTS, 0.5)


@pytest.mark.parametrize(
    ("count", "expected"), [(9, [1, 2, 3, 4, 5]), (3, [1, 3, 5]), (2, [1, 5]), (1, [5])]
)
def test_which_points_in_time_are_kept(count: int, expected: list[int]) -> None:
    assert chosen([1, 2, 3, 4, 5], count) == expected


def test_pictures_keep_to_their_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    paths = {step: save_png(Image.fromarray(noise), tmp_path / f"{step}.png") for step in range(9)}
    for budget in (10**6, 200_000, 30_000):
        frames = encode_frames({"noise": paths}, captions=str, max_bytes=budget)["noise"]
        assert sum(len(frame.uri) for frame in frames) <= budget
        assert frames[-1].step == 8
    everything = encode_frames({"noise": paths}, captions=str, max_bytes=10**6)["noise"]
    assert [frame.step for frame in everything] == list(range(9))
