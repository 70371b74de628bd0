"""The policy against a stand-in for the wandb module; the real one in the slow tests below."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking import wandb_modes, wandb_sink
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb_sink import WandbSink


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.asked = settings
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[tuple[str, str, list[str]]] = []
        self.exit_code: int | None = None
        self.on_log: Callable[[], None] = lambda: None
        self.settings = SimpleNamespace(sync_dir="runs/a/wandb/offline-run-1")
        self.id, self.entity, self.project, self.url = settings["id"], "e", "p", "https://w.test/r"
        self.on_finish: Callable[[], None] = lambda: None
        self.is_preempting = False
        self.resumed = settings["resume"] == "allow" and settings["mode"] == "online"
        # what the server has: of step 100 the row, but not the picture
        self.summary: dict[str, Any] = {
            "trainer/step": 100,
            "trainer/record": "row",
            "trainer/step_of/images/samples": 90,
        }

    def define_metric(
        self, name: str, step_metric: str | None = None, hidden: bool = False
    ) -> None:
        assert step_metric == ("trainer/step" if name == "*" else None)

    def log(self, row: dict[str, Any], *, commit: bool) -> None:
        self.on_log()
        assert commit
        self.rows.append(row)

    def log_artifact(self, artifact: FakeArtifact) -> None:
        self.artifacts.append((artifact.name, artifact.type, artifact.files))

    def mark_preempting(self) -> None:
        assert self.exit_code is None
        self.is_preempting = True

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code
        self.on_finish()


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type
        self.files: list[str] = []

    def add_file(self, path: str, *, name: str) -> None:
        assert path.endswith(name)
        self.files.append(name)


class FakeWandb:
    """What WandbSink uses of wandb; `fails` are the modes whose init raises."""

    def __init__(self) -> None:
        fields = {"model_fields": {"silent": None, "stop_fn": None, "finish_timeout_raises": 0}}
        self.Settings = type("Settings", (SimpleNamespace,), fields)
        self.Artifact = FakeArtifact
        self.logged_in = self.is_stopped = False
        self.last_record: dict[str, Any] = {"trainer/step": 100, "trainer/record": "row"}
        self.fails: set[str] = set()
        self.runs: list[FakeRun] = []
        self.num_teardowns = 0

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode="online", base_url="https://w.test"))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, **settings: Any) -> FakeRun:
        if settings["mode"] in self.fails:
            raise ConnectionError("no way\nsecond line")
        self.runs.append(FakeRun(settings))
        return self.runs[-1]

    def Api(self, *, timeout: int) -> SimpleNamespace:
        def answer(query: str, *, variables: dict[str, str], timeout: float) -> dict[str, Any]:
            assert variables["name"] == self.runs[-1].id
            if "stopped" in query:
                return {"project": {"run": {"stopped": self.is_stopped}}}
            tail = json.dumps([json.dumps(self.last_record)])
            return {"model": {"bucket": {"historyTail": tail}}}

        return SimpleNamespace(_service_api=SimpleNamespace(execute_graphql=answer))

    def Image(self, path: str, *, caption: str) -> tuple[str, str, str]:
        return ("image", path, caption)

    def Histogram(self, values: list[float]) -> tuple[str, list[float]]:
        return ("histogram", values)

    def teardown(self, exit_code: int | None = None) -> None:
        self.num_teardowns += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    # setdefault in the sink writes to os.environ: have monkeypatch take that back
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_modes, "_no_service", lambda url: "")
    return fake


def config(mode: str = "auto") -> TrainConfig:
    config = TrainConfig()
    config.wandb.mode = mode  # type: ignore[assignment]
    return config


def start(folder: Path, mode: str = "auto", *, resume_step: int = 0) -> tuple[WandbSink, list[str]]:
    said: list[str] = []
    return WandbSink(config(mode), folder, resume_step=resume_step, say=said.append), said


def test_offline_without_login_says_once_how_to_upload(fake: FakeWandb, tmp_path: Path) -> None:
    sink, said = start(tmp_path)
    sink.log(50, {"train/loss": 1.5})
    sink.image(50, "images/samples", tmp_path / "s.png", "step 50")
    sink.close("finished")
    sink.close("finished")
    assert sink.mode == "offline"
    assert len(said) == 1
    assert "nobody is logged in" in said[0]
    assert said[0].endswith("wandb sync runs/a/wandb/offline-run-1")
    (run,) = fake.runs
    assert run.rows == [
        {"trainer/step": 50, "trainer/record": "row", "train/loss": 1.5},
        {
            "trainer/step": 50,
            "trainer/record": "images/samples",
            "trainer/step_of/images/samples": 50,
            "images/samples": ("image", str(tmp_path / "s.png"), "step 50"),
        },
    ]
    assert (run.exit_code, fake.num_teardowns) == (0, 1)
    assert run.asked["dir"] == str(tmp_path)
    assert run.asked["config"]["optimizer.lr"] == TrainConfig().optimizer.lr


def test_online_when_logged_in(fake: FakeWandb, tmp_path: Path) -> None:
    fake.logged_in = True
    sink, said = start(tmp_path)
    sink.close("failed")
    assert (sink.mode, said, fake.runs[0].exit_code) == ("online", [], 1)


def test_auto_goes_offline_when_the_server_does_not_answer(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.logged_in = True
    monkeypatch.setattr(wandb_modes, "_no_service", lambda url: "does not answer")
    sink, said = start(tmp_path)
    assert sink.mode == "offline"
    assert "https://w.test does not answer" in said[0]
    sink.close("finished")


def test_auto_goes_offline_when_the_server_refuses(fake: FakeWandb, tmp_path: Path) -> None:
    fake.logged_in, fake.fails = True, {"online"}
    sink, said = start(tmp_path)
    assert sink.mode == "offline"
    assert "(ConnectionError: no way); upload" in said[0]
    sink.close("finished")


@pytest.mark.parametrize("obstacle", ["no login", "init fails", "folder"])
def test_online_asked_for_by_name_is_a_promise(
    fake: FakeWandb, tmp_path: Path, obstacle: str
) -> None:
    folder = tmp_path
    fake.logged_in = obstacle != "no login"
    if obstacle == "init fails":
        fake.fails = {"online"}
    if obstacle == "folder":
        folder = tmp_path / "file"
        folder.write_text("in the way")
    with pytest.raises(ConfigError, match=r"wandb\.mode=online but .*wandb\.mode=offline"):
        start(folder, "online")


def test_an_unwritable_folder_turns_tracking_off(fake: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sink, said = start(tmp_path / "file")
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    assert (sink.mode, fake.runs) == ("disabled", [])
    assert "cannot be written" in said[0]


def test_disabled_does_not_touch_wandb(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sink, said = start(tmp_path, "online")  # WANDB_MODE wins
    sink.log(1, {"train/loss": 1.0})
    sink.image(1, "images/samples", tmp_path / "s.png", "")
    sink.close("finished")
    assert (said, list(tmp_path.iterdir())) == ([], [])


def test_wandb_mode_online_names_itself(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE=online but nobody is logged in"):
        start(tmp_path, "disabled")


def test_wandb_mode_with_a_typing_error(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="WANDB_MODE=ofline is none of"):
        start(tmp_path)


def test_a_broken_installation_turns_tracking_off(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink, said = start(tmp_path)
    assert sink.mode == "disabled"
    assert "wandb cannot be imported" in said[0]


def test_a_dead_core_ends_tracking_and_nothing_else(fake: FakeWandb, tmp_path: Path) -> None:
    sink, said = start(tmp_path)

    def die() -> None:
        raise ConnectionResetError("gone")

    fake.runs[0].on_log = die
    for step in range(5):
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    stopped = [line for line in said if "stopped working" in line]
    assert len(stopped) == 1
    assert "ConnectionResetError: gone" in stopped[0]
    assert said[-1].endswith("wandb sync runs/a/wandb/offline-run-1")
    assert fake.num_teardowns == 1  # takes wandb's exit hook away


def test_a_hanging_core_blocks_neither_log_nor_close(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "_CLOSE_OFFLINE_SECONDS", 0.05)
    monkeypatch.setattr(wandb_sink, "_QUEUED_RECORDS", 10)
    sink, said = start(tmp_path)
    let_go = threading.Event()
    fake.runs[0].on_log = lambda: let_go.wait(10) and None
    began = time.monotonic()
    for step in range(100):
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    let_go.set()
    assert time.monotonic() - began < 2
    assert sum("gets some later" in line for line in said) == 1
    assert "did not get everything" in said[-1]


def test_what_a_full_queue_does_not_take_comes_from_the_disk_once_and_in_order(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "_QUEUED_RECORDS", 10)
    sink, said = start(tmp_path)
    log = JsonlSink(tmp_path / "log.jsonl", resume_step=0)
    let_go = threading.Event()
    fake.runs[0].on_log = lambda: let_go.wait(10) and None
    (tmp_path / "images").mkdir()
    for step in range(1, 201):
        if step == 150:  # slow until here
            let_go.set()
            while sink._queue.qsize() > 2:
                time.sleep(0.001)
        log.log(step, {"train/loss": step / 2})
        sink.log(step, {"train/loss": step / 2})
        if step % 50 == 0:
            png = tmp_path / "images" / f"samples_{step:08d}.png"
            png.touch()
            sink.image(step, "images/samples", png, f"step {step}")
    sink.close("finished")
    found = [(row["trainer/step"], row["trainer/record"]) for row in fake.runs[0].rows]
    of_rows = [(step, "row") for step in range(1, 201)]
    pictures = [(step, "images/samples") for step in (50, 100, 150, 200)]
    assert sorted(found) == sorted(of_rows + pictures)
    assert [place for place in found if place[1] == "row"] == of_rows
    assert not sink.lacks_points
    assert sum("gets some later" in line for line in said) == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(fake: FakeWandb, tmp_path: Path) -> None:
    fake.logged_in = True
    for resume_step in (0, 60):
        sink, _ = start(tmp_path, resume_step=resume_step)
        for step in (90, 100, 110):
            sink.log(step, {"train/loss": 1.0})
            sink.image(step, "images/samples", tmp_path / "s.png", "")
        sink.close("interrupted")
    first, second = fake.runs
    assert first.asked["id"] == second.asked["id"] == (tmp_path / "wandb_id").read_text()
    assert (first.asked["resume"], second.asked["resume"]) == (None, "allow")
    assert len(first.rows) == 6
    sent = [(row["trainer/step"], "images/samples" in row) for row in second.rows]
    assert sent == [(100, True), (110, False), (110, True)]


def test_a_record_that_only_the_summary_has_is_sent_again(fake: FakeWandb, tmp_path: Path) -> None:
    fake.logged_in = True
    fake.last_record = {"trainer/step": 90, "trainer/record": "images/samples"}
    start(tmp_path)[0].close("interrupted")
    sink, _ = start(tmp_path, resume_step=60)
    for step in (90, 100):
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    assert [row["trainer/step"] for row in fake.runs[1].rows] == [100]


@pytest.mark.parametrize(
    ("status", "sweep", "stopped", "expected"),
    [
        ("interrupted", "s1", "", True),
        ("interrupted", "s1", "button", False),
        ("interrupted", "s1", "sweep", False),  # its agent sends SIGTERM; the server knows why
        ("interrupted", "", "", False),
        ("finished", "s1", "", False),
    ],
)
def test_a_preempted_trial_goes_back_to_its_sweep(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    sweep: str,
    stopped: str,
    expected: bool,
) -> None:
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    fake.logged_in = True
    sink, _ = start(tmp_path)
    fake.is_stopped = stopped == "sweep"
    if stopped == "button":
        fake.runs[0].asked["settings"].stop_fn()
    sink.close(status)
    assert fake.runs[0].is_preempting == expected
    assert fake.runs[0].exit_code == (0 if status == "finished" else 1)


@pytest.mark.parametrize("trouble", ["timeout", "refused"])
def test_what_did_not_arrive_is_said(fake: FakeWandb, tmp_path: Path, trouble: str) -> None:
    fake.logged_in = True
    sink, said = start(tmp_path)

    def give_up() -> None:
        raise TimeoutError("finish_timeout")

    if trouble == "timeout":
        fake.runs[0].on_finish = give_up
    else:
        log = Path(fake.runs[0].settings.sync_dir) / "logs" / "debug-internal.log"
        sink._sync_dir = str(tmp_path / log.parts[0])
        log = tmp_path / log.parts[0] / "logs" / "debug-internal.log"
        log.parent.mkdir(parents=True)
        log.write_text('{"level":"ERROR+4","msg":"filestream: fatal error: 403 Forbidden"}\n')
    sink.close("finished")
    assert said == [
        "W&B did not get everything; upload the rest with: "
        f"python -m vae_dist.upload run={tmp_path}"
    ]
    assert sink.lacks_points


def test_the_stop_button_is_passed_on(fake: FakeWandb, tmp_path: Path) -> None:
    pressed: list[int] = []
    sink = WandbSink(config(), tmp_path, say=lambda line: None, on_stop=lambda: pressed.append(1))
    assert (sink.stop_requested, pressed) == (False, [])
    fake.runs[0].asked["settings"].stop_fn()
    assert (sink.stop_requested, pressed) == (True, [1])
    sink.close("interrupted")


def test_distributions_and_artifacts(fake: FakeWandb, tmp_path: Path) -> None:
    sink, _ = start(tmp_path)
    sink.log(1, {"latent/kl_nats_per_unit": [0.5, 2.0]})
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / "step_00000010" / "model.safetensors").touch()
    for step in (5, 10):
        (tmp_path / f"samples_{step:08d}.png").touch()
    sink.artifacts(tmp_path / "step_00000010", tmp_path, step=10)
    sink.close("finished")
    (run,) = fake.runs
    (row,) = run.rows
    assert row["latent/kl_nats_per_unit"] == ("histogram", [0.5, 2.0])
    assert run.artifacts == [
        (f"{tmp_path.name}-checkpoint", "model", ["model.safetensors"]),
        (f"{tmp_path.name}-pictures", "pictures", ["samples_00000010.png"]),
    ]


def test_a_run_from_the_start_is_another_wandb_run(fake: FakeWandb, tmp_path: Path) -> None:
    for _ in range(2):
        start(tmp_path)[0].close("failed")
    assert fake.runs[0].asked["id"] != fake.runs[1].asked["id"]


def test_a_sweep_agent_chooses_the_id(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "sweep123")
    start(tmp_path)[0].close("finished")
    assert fake.runs[0].asked["id"] == "sweep123"


@pytest.mark.parametrize(("user", "expected"), [(None, "false"), ("true", "true")])
def test_error_reports_are_off_unless_the_user_wants_them(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: str | None,
    expected: str,
) -> None:
    if user is not None:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", user)
    start(tmp_path)[0].close("finished")
    assert os.environ["WANDB_ERROR_REPORTING"] == expected


REAL = """
import sys, time
from pathlib import Path
import psutil, torch
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking.images import grid, save_png
from vae_dist.tracking.wandb_sink import WandbSink

folder, damage = Path(sys.argv[1]), sys.argv[2]
sink = WandbSink(TrainConfig(), folder)
png = save_png(grid(torch.zeros(4, 1, 8, 8)), folder / "grid.png")
for step in range(200):
    if step == 100 and damage == "kill":
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
    sink.log(step, {"train/loss": 1 / (step + 1)})
    sink.image(step, "images/samples", png, f"step {step}") if step % 50 == 0 else None
    time.sleep(0.002)
began = time.monotonic()
sink.close("finished")
print("mode", sink.mode, "closed", time.monotonic() - began)
"""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["none", "kill"])
def test_real_wandb_offline_is_quiet_and_quick_to_leave(tmp_path: Path, damage: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    process = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path), damage],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = process.stdout.splitlines()
    assert (process.returncode, process.stderr) == (0, "")
    closed = re.fullmatch(r"mode offline closed ([\d.]+)", lines[-1])
    assert closed is not None
    assert float(closed[1]) < 2
    assert len(lines) == (2 if damage == "none" else 4)
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert lines[0].endswith(f"wandb sync {offline}")
    assert list(offline.glob("*.wandb"))


def test_a_distribution_that_is_not_finite_does_not_end_tracking(
    fake: FakeWandb, tmp_path: Path
) -> None:
    """wandb.Histogram raises on NaN, and on the null by which log.jsonl stands for it."""
    said: list[str] = []
    sink = WandbSink(config(), tmp_path, say=said.append)
    values: list[Any] = [[math.nan, math.inf], [1.0, math.nan], [None, 2.0]]
    for step, value in enumerate(values, start=1):
        sink.log(step, {"train/loss": 1.0, "latent/kl": value})
    sink.close("finished")
    assert len(said) == 1  # that it is offline
    kept = [row.get("latent/kl") for row in fake.runs[0].rows]
    assert kept == [None, ("histogram", [1.0]), ("histogram", [2.0])]
