"""What a W&B run is known to hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vae_dist.tracking import wandb_record
from vae_dist.tracking.wandb_record import ROW, Recorded, address, find_parts, mark_synced

PICTURE = "images/samples"


def held(recorded: Recorded, kind: str) -> list[int]:
    return [step for step in range(13) if recorded.has(step, kind)]


def test_the_server_holds_all_up_to_its_last_record() -> None:
    recorded = Recorded()
    summary = address(6, PICTURE) | address(9, ROW)
    recorded.add_server(summary, address(9, ROW))
    assert held(recorded, ROW) == list(range(10))
    assert held(recorded, PICTURE) == list(range(7))
    assert held(recorded, "images/worst") == []


@pytest.mark.parametrize("kind", [ROW, PICTURE])
def test_a_summary_may_run_ahead_of_the_history(kind: str) -> None:
    recorded = Recorded()
    summary = address(6, PICTURE) | address(9, ROW) | address(9, kind)
    recorded.add_server(summary, address(9, ROW) if kind == PICTURE else address(8, ROW))
    lost = {ROW: recorded.has(9, ROW), PICTURE: recorded.has(9, PICTURE)}
    assert not lost[kind]
    assert recorded.has(8, ROW)
    assert recorded.has(6, PICTURE)
    assert recorded.has(9, ROW) == (kind == PICTURE)


def test_a_run_without_records_holds_nothing() -> None:
    recorded = Recorded()
    recorded.add_server({}, {})
    assert held(recorded, ROW) == []


def test_without_an_answer_the_summary_counts() -> None:
    recorded = Recorded()
    recorded.add_server(address(9, ROW), None)
    assert held(recorded, ROW) == list(range(10))


READER = """
import sys
for step, kind in ((1, "row"), (2, "row"), (2, "images/samples"), (5, "row")):
    item = '{"trainer/step": %d, "trainer/record": "%s"}' % (step, kind)
    print('{"type": "history", "history": {"item": ' + item + "}}")
print('{"type": "summary", "summary": {"trainer/step": 6}}')
print('{"type": "history", "history": {"item": {"_step": 9}}}')
sys.exit(int(sys.argv[-1].endswith("damaged")))
"""


@pytest.mark.parametrize("name", ["whole", "damaged"])
def test_a_part_holds_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    script = tmp_path / "wandb.py"
    script.write_text(READER)
    monkeypatch.setattr(wandb_record, "_READER", (sys.executable, str(script)))
    recorded = Recorded()
    assert recorded.add_part(tmp_path / name) == (name == "whole")
    assert held(recorded, ROW) == [1, 2, 5]  # 6 is in the summary alone
    assert held(recorded, PICTURE) == [2]


def test_parts_in_order_and_their_mark(tmp_path: Path) -> None:
    names = ["offline-run-20260102_000000-abc", "run-20260101_000000-abc", "run-2-other"]
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-abc.wandb").touch()
    found = find_parts(tmp_path, "abc")
    assert [part.name for part in found] == [names[1], names[0]]
    mark_synced(found[1])
    assert (found[1] / "run-abc.wandb.synced").exists()  # as `wandb sync` itself leaves it
