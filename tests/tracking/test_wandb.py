"""The W&B sink against a stand-in for the wandb module; the real one in test_wandb_online.py."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking import wandb as sink_module
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb import WandbSink


class FakeRun:
    def __init__(self, asked: dict[str, Any], summary: dict[str, Any]) -> None:
        self.asked, self.id, self.entity, self.project = asked, asked["id"], "e", "p"
        self.rows: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.on_log = self.on_finish = lambda: None
        part = Path(asked["dir"]) / "wandb" / f"offline-run-{time.monotonic_ns()}-{self.id}"
        part.mkdir()
        self.settings, self.is_preempting = SimpleNamespace(sync_dir=str(part)), False
        self.summary, self.resumed = summary, bool(summary)

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False):
        assert step_metric == ("trainer/step" if name == "*" else None)

    def log(self, row: dict[str, Any]) -> None:
        self.on_log()
        self.rows.append(row)

    def mark_preempting(self) -> None:
        self.is_preempting = True

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code
        self.on_finish()

    def sent(self) -> list[tuple[int, str]]:
        """(step, key) of each value that is not a step."""
        return [(row["trainer/step"], key) for row in self.rows for key in row if "step" not in key]


class FakeWandb:
    """What WandbSink uses of wandb; `fails` are the modes whose init raises."""

    Settings = SimpleNamespace
    Image = staticmethod(lambda path, *, caption: ("image", path, caption))
    Histogram = staticmethod(lambda values: ("histogram", values))
    setup = staticmethod(lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))

    def __init__(self) -> None:
        self.logged_in = self.is_stopped = False
        self.fails: tuple[str, ...] = ()
        self.runs: list[FakeRun] = []
        self.summary: dict[str, Any] = {}  # what the server has of a resumed run
        self.num_teardowns = 0

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, **asked: Any) -> FakeRun:
        if asked["mode"] in self.fails:
            raise ConnectionError("no way\nsecond line")
        self.runs.append(FakeRun(asked, self.summary))
        return self.runs[-1]

    def Api(self, *, timeout: int) -> SimpleNamespace:
        def answer(query: str, *, variables: dict[str, str], timeout: float) -> dict[str, Any]:
            assert variables["id"] == self.runs[-1].id
            return {"project": {"run": {"stopped": self.is_stopped}}}

        return SimpleNamespace(_service_api=SimpleNamespace(execute_graphql=answer))

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
    return fake


def start(folder: Path, mode: str = "auto", **more: Any) -> tuple[WandbSink, list[str]]:
    config, said = TrainConfig(), list[str]()
    config.wandb.mode = mode  # type: ignore[assignment]
    config.data.train = ["https://me:s3cret@host/{0..9}.tar", "pipe:aws s3 cp x -"]
    return WandbSink(config, folder, say=said.append, **more), said


def raise_(error: Exception) -> None:
    raise error


def test_offline_without_login_says_once_how_to_upload(fake: FakeWandb, tmp_path: Path) -> None:
    sink, said = start(tmp_path, environment={"command": "train token=s3cret"})
    nan, inf = math.nan, math.inf  # wandb.Histogram raises on them
    kl: list[Any] = [[nan, inf], [None, 2.0, nan]]  # null stands for them in log.jsonl
    sink.log(50, {"train/loss": 1.5, "train/nll": nan, "latent/kl": kl[0], "latent/b": kl[1]})
    sink.image(50, "images/samples", tmp_path / "s.png", "step 50")
    for _ in range(2):
        sink.close("finished")
    (run,) = fake.runs
    assert (sink.mode, len(said)) == ("offline", 1)
    assert "there is no login: run `wandb login`" in said[0]
    assert said[0].endswith(f"wandb sync {run.settings.sync_dir}")
    keys = ["train/loss", "train/nll", "latent/b", "images/samples"]
    assert run.sent() == [(50, key) for key in keys]
    assert run.rows[0]["latent/b"] == ("histogram", [2.0])
    assert run.rows[1]["images/samples"] == ("image", str(tmp_path / "s.png"), "step 50")
    assert (run.exit_code, fake.num_teardowns) == (0, 1)
    assert (run.asked["dir"], run.asked["resume"]) == (str(tmp_path), "allow")
    assert run.asked["config"]["optimizer.lr"] == TrainConfig().optimizer.lr
    assert run.asked["config"]["data.train"] == ["https://...@host/{0..9}.tar", "pipe:..."]
    assert "s3cret" not in str(run.asked)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize(
    ("obstacle", "says"),
    [
        ("login", "W&B is offline: there is no login"),
        ("init", "W&B is offline: W&B could not start a run (ConnectionError: no way); upload"),
        ("folder", "W&B is off: W&B cannot be used with"),
        ("import", "W&B is off: W&B cannot be used with"),
    ],
)
def test_where_no_run_can_be_online(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str, says: str
) -> None:
    """auto goes offline or off; online, asked for by name, is refused before training."""
    folder = tmp_path / "file" if obstacle == "folder" else tmp_path
    (tmp_path / "file").write_text("in the way")
    fake.logged_in, fake.fails = obstacle != "login", ("online",) * (obstacle == "init")
    if obstacle == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    sink, said = start(folder)
    sink.log(1, {"train/loss": 1.0})
    sink.close("finished")
    assert len(said) == 1 and said[0].startswith(says)
    with pytest.raises(ConfigError, match=r"wandb\.mode=online .* but .*set offline or auto"):
        start(folder, "online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE"):
        start(folder, "disabled")


def test_what_the_environment_says(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PROJECT", "mine"), ("NAME", "first"), ("DIR", str(tmp_path / "w"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = TrainConfig()
    for project in (config.wandb.project, "own"):  # the default gives way
        config.wandb.project = project
        WandbSink(config, tmp_path, say=lambda text: None).close("finished")
    asked = [(run.asked["project"], run.asked["name"], run.asked["dir"]) for run in fake.runs]
    assert asked == [(project, "first", str(tmp_path / "w")) for project in ("mine", "own")]
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="WANDB_MODE=ofline is none of"):
        start(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    for name, value in (("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv(name, value)
        sink, said = start(tmp_path / "none", "online")
        sink.log(1, {"train/loss": 1.0})
        sink.close("finished")
        assert (sink.mode, said, (tmp_path / "none").exists()) == ("disabled", [], False)


def test_a_dead_core_ends_tracking_and_nothing_else(fake: FakeWandb, tmp_path: Path) -> None:
    sink, said = start(tmp_path)
    fake.runs[0].on_log = lambda: raise_(ConnectionResetError("gone"))
    for step in range(5):
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    assert [line for line in said if "stopped working" in line] == [
        "W&B stopped working (ConnectionResetError: gone); training goes on without it and "
        "log.jsonl has every metric."
    ]
    assert said[-1].endswith(f"wandb sync {fake.runs[0].settings.sync_dir}")
    assert fake.num_teardowns == 1  # takes wandb's exit hook away


def test_a_hanging_core_blocks_neither_log_nor_close(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "_INTERRUPTED_SECONDS", 0.05)
    monkeypatch.setattr(sink_module, "_QUEUED_TASKS", 10)
    sink, said = start(tmp_path)
    let_go = threading.Event()
    fake.runs[0].on_log = lambda: let_go.wait(10)
    began = time.monotonic()
    for step in range(100):
        sink.log(step, {"train/loss": 1.0})
    sink.close("interrupted")
    let_go.set()
    assert time.monotonic() - began < 2
    assert "stopped working" in said[1] and "did not get everything" in said[2]


def record(folder: Path, steps: range, *, resume_step: int = 0) -> None:
    """As training leaves it: rows, and an image at each tenth step."""
    log = JsonlSink(folder / "log.jsonl", resume_step=resume_step)
    (folder / "images").mkdir(exist_ok=True)
    for step in steps:
        log.log(step, {"train/loss": step / 2})
        if step % 10 == 0:
            (folder / "images" / f"samples_{step:08d}.png").touch()


def test_a_resumed_online_run_sends_what_the_server_lacks(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.logged_in = True
    start(tmp_path)[0].close("interrupted")
    record(tmp_path, range(1, 41))
    fake.summary = {"trainer/step": 39}
    monkeypatch.setattr(sink_module, "_IMAGES_SENT_AGAIN", 2)
    sink, said = start(tmp_path, resume_step=40)
    sink.log(41, {"train/loss": 1.0})
    sink.close("finished")
    first, second = fake.runs
    assert (sink.mode, said) == ("online", [])
    assert first.id == second.id == (tmp_path / "wandb_id").read_text()
    rows, images = [39, 40], [20, 30, 40]  # two that the server may have without their files
    expected = [(step, "train/loss") for step in rows] + [(s, "images/samples") for s in images]
    assert second.sent() == [*expected, (41, "train/loss")]
    assert second.rows[2]["images/samples"][2] == "step 20"
    fake.summary = {"trainer/step": 61}  # beyond the checkpoint
    sink, said = start(tmp_path, resume_step=41)
    fake.runs[2].on_finish = lambda: raise_(TimeoutError("finish_timeout"))
    for step in range(42, 63):
        sink.log(step, {"train/loss": 1.0})
    sink.close("finished")
    assert [step for step, key in fake.runs[2].sent() if key == "train/loss"] == [61, 62]
    command = f"wandb sync --include-online {fake.runs[2].settings.sync_dir}"
    assert said == [f"W&B did not get everything; upload the rest with: {command}"]


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_newest_offline_part_replaces_the_others_once_it_is_whole(
    fake: FakeWandb, tmp_path: Path, is_whole: bool
) -> None:
    start(tmp_path)[0].close("interrupted")
    record(tmp_path, range(1, 21))
    sink, said = start(tmp_path, resume_step=20)
    if not is_whole:
        fake.runs[1].on_finish = lambda: raise_(OSError("No space left on device"))
    sink.log(21, {"train/loss": 1.0})
    sink.close("finished")
    part = fake.runs[1].settings.sync_dir
    assert said[0].endswith(f"wandb sync {part}")
    assert [step for step, _ in fake.runs[1].sent()] == [*range(1, 21), 10, 20, 21]
    assert len(list((tmp_path / "wandb").iterdir())) == (1 if is_whole else 2)
    assert Path(part).exists()


def test_a_run_from_the_start_is_another_wandb_run(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("", "", "sweep123"):  # by a sweep's agent
        monkeypatch.setenv("WANDB_RUN_ID", given)
        start(tmp_path)[0].close("failed")
    ids = [run.id for run in fake.runs]
    assert len(set(ids)) == 3 and ids[2] == "sweep123" and fake.runs[2].exit_code == 1


@pytest.mark.parametrize(
    ("status", "sweep", "stopped"),
    [
        ("interrupted", "s1", ""),
        ("interrupted", "s1", "button"),
        ("interrupted", "s1", "sweep"),  # its agent sends SIGTERM; the server knows why
        ("interrupted", "", ""),
        ("finished", "s1", ""),
    ],
)
def test_a_preempted_trial_goes_back_to_its_sweep(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    sweep: str,
    stopped: str,
) -> None:
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    fake.logged_in, fake.is_stopped = True, stopped == "sweep"
    pressed: list[int] = []
    sink, _ = start(tmp_path, on_stop=lambda: pressed.append(1))
    if stopped == "button":
        fake.runs[0].asked["settings"].stop_fn()
    sink.close(status)
    assert pressed == [1] * (stopped == "button")
    assert fake.runs[0].is_preempting == ((status, sweep, stopped) == ("interrupted", "s1", ""))
