"""The W&B sink against a stand-in for the wandb module; the real one in test_wandb_online.py."""

import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
from PIL import Image
from wandb.sdk.wandb_run import Run

from vae_dist.config.errors import ConfigError
from vae_dist.config.schema import TrainConfig
from vae_dist.tracking import wandb as sink_module
from vae_dist.tracking.images import save_png
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.tracking.wandb import WandbSink


@pytest.fixture
def fake(monkeypatch):
    """What WandbSink uses of wandb, without a login; `runs` are those that were begun, `summary`
    what the server has of a resumed one, `on_log` is what log() raises or does."""
    set_by_the_sink = ["WANDB_SILENT", "WANDB_ERROR_REPORTING"]
    for name in [name for name in os.environ if name.startswith("WANDB_")] + set_by_the_sink:
        monkeypatch.setenv(name, "")  # lets monkeypatch take back what the sink sets
        monkeypatch.delenv(name)
    fake = MagicMock(runs=[], summary={}, refuses=False, on_log=None, Settings=SimpleNamespace)
    fake.setup.return_value.settings.mode = "online"
    fake.login.return_value = False
    fake.Image = lambda path, *, caption: ("image", path, caption)
    fake.Histogram = lambda values: ("histogram", values)

    def init(**asked):
        if fake.refuses and asked["mode"] == "online":
            raise ConnectionError("no way\nsecond line")
        summary = dict(fake.summary)
        run = MagicMock(Run, asked=asked, id=asked["id"], summary=summary, resumed=bool(summary))
        part = Path(asked["dir"]) / "wandb" / f"offline-run-{time.monotonic_ns()}-{run.id}"
        part.mkdir()
        run.settings.sync_dir, run.log.side_effect = str(part), fake.on_log
        fake.runs.append(run)
        return run

    fake.init.side_effect = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def rows(run):
    return [call.args[0] for call in run.log.call_args_list]


def sent(run):
    """(step, key) of each value that is not a step."""
    return [(row["trainer/step"], key) for row in rows(run) for key in row if "step" not in key]


def start(folder, mode="auto", **more):
    config, said = TrainConfig(), list[str]()
    config.wandb.mode = mode
    config.data.train = ["https://me:s3cret@host/{0..9}.tar", "pipe:aws s3 cp x -"]
    return WandbSink(config, folder, say=said.append, **more), said


def lived(folder, steps, status="finished", **more):
    """What a session says whose rows are those of `steps`."""
    sink, said = start(folder, **more)
    for step in steps:
        sink.log(step, {"train/loss": 1.0})
    sink.close(status)
    return said


def test_offline_without_login_says_once_how_to_upload(fake, tmp_path):
    sink, said = start(tmp_path, environment={"command": "train token=s3cret"})
    nan, inf = math.nan, math.inf  # wandb.Histogram raises on them
    kl = [[nan, inf], [None, 2.0, nan]]  # null stands for them in log.jsonl
    sink.log(50, {"train/loss": 1.5, "train/nll": nan, "latent/kl": kl[0], "latent/b": kl[1]})
    sink.image(50, "images/samples", tmp_path / "s.png", "step 50")
    for _ in range(2):
        sink.close("finished")
    (run,) = fake.runs
    assert (sink.mode, len(said)) == ("offline", 1)
    assert "there is no login: run `wandb login`" in said[0]
    assert said[0].endswith(f"wandb sync {run.settings.sync_dir}")
    keys = ["train/loss", "train/nll", "latent/b", "images/samples"]
    assert sent(run) == [(50, key) for key in keys]
    assert rows(run)[0]["latent/b"] == ("histogram", [2.0])
    assert rows(run)[1]["images/samples"] == ("image", str(tmp_path / "s.png"), "step 50")
    run.finish.assert_called_once_with(exit_code=0)
    run.define_metric.assert_called_with("*", step_metric="trainer/step")
    assert fake.teardown.call_count == 1
    assert (run.asked["dir"], run.asked["resume"]) == (str(tmp_path), "allow")
    assert run.asked["config"]["optimizer.lr"] == TrainConfig().optimizer.lr
    assert run.asked["config"]["data.train"] == ["https://...@host/{0..9}.tar", "pipe:..."]
    assert "s3cret" not in str(run.asked)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize(
    ("obstacle", "says"),
    [
        ("login", "offline: there is no login"),
        ("init", "offline: W&B could not start a run (ConnectionError: no way); upload"),
        ("folder", "off: W&B cannot be used with"),
        ("import", "off: W&B cannot be used with"),
    ],
)
def test_where_no_run_can_be_online(fake, tmp_path, monkeypatch, obstacle, says):
    """auto goes offline or off; online, asked for by name, is refused before training."""
    fake.login.return_value, fake.refuses = obstacle != "login", obstacle == "init"
    folder = tmp_path / "file" if obstacle == "folder" else tmp_path
    (tmp_path / "file").write_text("in the way")
    if obstacle == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    (said,) = lived(folder, range(1, 2))
    assert said.startswith(f"W&B is {says}")
    with pytest.raises(ConfigError, match=r"wandb\.mode=online .* but .*set offline or auto"):
        start(folder, "online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE"):
        start(folder, "disabled")


def test_what_the_environment_says(fake, tmp_path, monkeypatch):
    for name, value in (("PROJECT", "mine"), ("NAME", "first"), ("DIR", str(tmp_path / "w"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = TrainConfig()
    for project, given in ((config.wandb.project, ""), ("own", ""), ("own", "sweep123")):
        config.wandb.project = project  # the default gives way
        monkeypatch.setenv("WANDB_RUN_ID", given)  # by a sweep's agent
        WandbSink(config, tmp_path).close("failed")
    asked = [(run.asked["project"], run.asked["name"], run.asked["dir"]) for run in fake.runs]
    assert asked == [(project, "first", str(tmp_path / "w")) for project in ("mine", "own", "own")]
    ids = [run.id for run in fake.runs]
    assert len(set(ids)) == 3 and ids[2] == "sweep123"  # a run from the start is another one
    fake.runs[2].finish.assert_called_once_with(exit_code=1)
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="WANDB_MODE=ofline is none of"):
        start(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    for name, value in (("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv(name, value)
        assert lived(tmp_path / "none", range(1, 2), mode="online") == []
        assert not (tmp_path / "none").exists()


def test_a_dead_or_hanging_core_ends_tracking_and_nothing_else(fake, tmp_path, monkeypatch):
    fake.on_log = ConnectionResetError("gone")
    said = lived(tmp_path, range(100))
    assert said[1].startswith("W&B stopped working (ConnectionResetError: gone); training goes on")
    assert len(said) == 3 and said[2].endswith(f"wandb sync {fake.runs[0].settings.sync_dir}")
    monkeypatch.setattr(sink_module, "_INTERRUPTED_SECONDS", 0.05)
    monkeypatch.setattr(sink_module, "_QUEUED_TASKS", 10)
    let_go = threading.Event()
    fake.on_log = lambda row: let_go.wait(600)
    said = lived(tmp_path, range(100), "interrupted")
    let_go.set()
    assert "it hangs" in said[1] and "did not get everything" in said[2]
    assert fake.teardown.call_count == 2  # takes wandb's exit hook away


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_newest_offline_part_replaces_the_others_once_it_is_whole(fake, tmp_path, is_whole):
    lived(tmp_path, range(0), "interrupted")
    log = JsonlSink(tmp_path / "log.jsonl", resume_step=0)
    for step in range(1, 21):
        log.log(step, {"train/loss": step / 2})
    save_png(Image.new("L", (8, 8)), tmp_path / "images" / "samples_00000010.png")
    sink, said = start(tmp_path, resume_step=20)
    first, second = fake.runs
    second.finish.side_effect = None if is_whole else OSError("No space left on device")
    sink.close("finished")
    part = second.settings.sync_dir
    assert said[0].endswith(f"wandb sync {part}")
    assert sent(second) == [(s, "train/loss") for s in range(1, 21)] + [(10, "images/samples")]
    assert len(list((tmp_path / "wandb").iterdir())) == 2 - is_whole and Path(part).exists()
    assert first.id == second.id == (tmp_path / "wandb_id").read_text()


def test_a_preempted_trial_goes_back_to_its_sweep(fake, tmp_path, monkeypatch):
    fake.login.return_value = True
    for status, sweep, stopped, goes_back in (
        ("interrupted", None, "", False),
        ("interrupted", "s1", "", True),
        ("interrupted", "s1", "button", False),
        ("interrupted", "s1", "sweep", False),  # its agent sends SIGTERM; the server knows why
        ("finished", "s1", "", False),
    ):
        if sweep:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        answer = {"project": {"run": {"stopped": stopped == "sweep"}}}
        fake.Api.return_value._service_api.execute_graphql.return_value = answer
        pressed = Mock()
        sink, _ = start(tmp_path, on_stop=pressed)
        if stopped == "button":
            fake.runs[-1].asked["settings"].stop_fn()
        sink.close(status)
        assert pressed.called == (stopped == "button")
        assert fake.runs[-1].mark_preempting.called == goes_back, (status, sweep, stopped)
