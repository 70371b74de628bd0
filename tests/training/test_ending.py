"""How a session ends in status.json; tests/distributed has those of several ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.run.folder import RunFolder
from vae_dist.training.ending import Ending


@pytest.fixture
def ending(tmp_path: Path) -> Ending:
    folder = RunFolder(tmp_path)
    folder.session = folder.write_token()
    alone: Any = SimpleNamespace(rank=0, world=1, is_main=True, broadcast=lambda value: value)
    return Ending(alone, folder, timeout_s=60)


@pytest.mark.parametrize(
    ("recorded", "expected"), [("running", "failed"), ("finished", "finished")]
)
def test_what_fails_after_a_good_end_does_not_change_it(
    ending: Ending, recorded: str, expected: str
) -> None:
    """A tracker that cannot be closed, a farewell that cannot be printed."""
    ending.record(recorded, step=5, reason="all steps are done")
    with pytest.raises(ValueError), ending.told():
        raise ValueError("no more")
    assert ending.folder.status()["status"] == expected


def test_who_is_lost_is_said_before_the_disk_is_asked(
    ending: Ending, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def hangs() -> dict[str, Any]:
        said.append(capsys.readouterr().err)
        return {}

    monkeypatch.setattr(ending.folder, "status", hangs)
    ending._on_lost("frozen or gone: rank 1", [0])
    assert said[0] == "frozen or gone: rank 1\n"
