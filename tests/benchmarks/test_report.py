import importlib
import json
import pkgutil
import sys

import pytest

import benchmarks
from benchmarks.turns import Arm, take_turns


def test_each_benchmark_can_be_imported():
    for module in pkgutil.iter_modules(benchmarks.__path__):
        importlib.import_module(f"benchmarks.{module.name}")


# an arm of 2 images a step
ARM = """
import json
from benchmarks.turns import Finished, Turn
turn = Turn(num_images_per_step=2)
print("not part of the protocol")
turn.ready(speed=1)
steps = 0
try:
    while True:
        turn.before_step()
        steps += 1
except Finished as finished:
    open(finished.path, "w").write(json.dumps(steps))
"""


def test_arms_train_in_turn_and_say_what_they_did(tmp_path):
    def make_arm(name, code=ARM):
        return Arm(name, [sys.executable, "-c", code], threads=1, log=tmp_path / f"{name}.log")

    arms = [make_arm("a"), make_arm("b")]
    assert list(take_turns(arms, seconds=0.05, turn_s=0.02)) == pytest.approx([0.02, 0.04, 0.05])
    for arm in arms:
        assert arm.options == {"speed": 1} and len(arm.rates) == 3
        assert arm.images == 2 * arm.steps and arm.seconds >= 0.05
        arm.finish(tmp_path / "steps")
        assert json.loads((tmp_path / "steps").read_text()) == arm.steps
    with pytest.raises(SystemExit, match=r"a ended early[\s\S]*no such network"):
        make_arm("a", "raise SystemExit('no such network')")
