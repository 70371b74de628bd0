"""`vae_dist.upload`: what it sends and what it refuses; with real wandb in tests/tracking."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_run import tiny_config
from tests.tracking.test_wandb_sink import FakeWandb, fake  # noqa: F401  (a fixture)
from vae_dist.run.folder import RunFolder, RunLock
from vae_dist.upload import main


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_config(tiny_config())
    folder.log_path.write_text(
        '{"step": 60, "train/loss": 2.0}\n{"step": 120, "train/loss": 1.0}\n'
    )
    (folder.images / "samples_00000060.png").touch()
    (folder.images / "samples_00000120.png").touch()
    folder.write_status("finished", step=120, reason="")
    return folder


def test_a_run_without_wandb_is_sent_whole(
    fake: FakeWandb,  # noqa: F811
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.logged_in = True
    assert main([f"run={run.path}"]) == 0
    assert capsys.readouterr().out.endswith("up to step 120: https://w.test/r\n")
    (sent,) = fake.runs
    assert (sent.asked["resume"], sent.exit_code) == (None, 0)
    assert [row["train/loss"] for row in sent.rows if "train/loss" in row] == [2.0, 1.0]
    assert [row["trainer/step"] for row in sent.rows] == [60, 60, 120, 120]


def test_what_is_there_is_not_sent_again(fake: FakeWandb, run: RunFolder) -> None:  # noqa: F811
    fake.logged_in = True
    (run.path / "wandb_id").write_text("abc")  # the server has row 100 and the picture of 90
    assert main([f"run={run.path}"]) == 0
    (sent,) = fake.runs
    assert (sent.asked["id"], sent.asked["resume"]) == ("abc", "allow")
    kinds = [(row["trainer/step"], "train/loss" in row) for row in sent.rows]
    assert kinds == [(120, True), (120, False)]


@pytest.mark.parametrize("case", ["no rows", "offline", "no login", "at work", "incomplete"])
def test_refusals(
    fake: FakeWandb,  # noqa: F811
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    fake.logged_in = case != "no login"
    expected = {
        "at work": "",
        "no rows": "log.jsonl has no rows yet",
        "offline": "WANDB_MODE keeps W&B offline",
        "no login": "nobody is logged in",
        "incomplete": "not everything arrived; the same command goes on",
    }[case]
    if case == "no rows":
        run.log_path.unlink()
    if case == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    if case == "incomplete":

        def give_up(self: object, *, exit_code: int) -> None:
            raise TimeoutError

        monkeypatch.setattr("tests.tracking.test_wandb_sink.FakeRun.finish", give_up)
    if case == "at work":
        with RunLock(run):
            assert main([f"run={run.path}"]) == 2
        assert fake.runs == []
        return
    assert main([f"run={run.path}"]) == 2
    assert expected in capsys.readouterr().err


def test_an_interrupted_run_has_the_whole_time_of_the_command(
    fake: FakeWandb,  # noqa: F811
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.logged_in = True
    run.write_status("interrupted", step=120, reason="")
    monkeypatch.setattr("vae_dist.tracking.wandb_sink._CLOSE_INTERRUPTED_SECONDS", 0.0)
    assert main([f"run={run.path}"]) == 0
