from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.turns import Arm, take_turns

# an arm of 2 images a step, whose steps take a millisecond
ARM = """
import json, sys, time
from benchmarks.turns import Finished, Turn
turn = Turn(num_images_per_step=2)
print("not part of the protocol")
turn.ready(speed=1)
steps = 0
try:
    while True:
        turn.before_step()
        time.sleep(0.001)
        steps += 1
except Finished as finished:
    open(finished.path, "w").write(json.dumps(steps))
"""


def make_arm(folder: Path, name: str, code: str = ARM) -> Arm:
    return Arm(name, [sys.executable, "-c", code], threads=1, log=folder / f"{name}.log")


def test_arms_train_in_turn_and_say_what_they_did(tmp_path: Path) -> None:
    arms = [make_arm(tmp_path, name) for name in ("a", "b")]
    try:
        assert list(take_turns(arms, seconds=0.05, turn_s=0.02)) == pytest.approx(
            [0.02, 0.04, 0.05]
        )
        for arm in arms:
            assert arm.options == {"speed": 1}
            assert len(arm.rates) == 3
            assert arm.images == 2 * arm.steps
            assert 0.05 <= arm.seconds < 5.0
            arm.finish(tmp_path / "steps")
            assert json.loads((tmp_path / "steps").read_text()) == arm.steps
    finally:
        for arm in arms:
            arm.close()


def test_an_arm_that_fails_is_shown_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"a ended early[\s\S]*no such network"):
        make_arm(tmp_path, "a", "raise SystemExit('no such network')")
