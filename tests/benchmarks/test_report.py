import importlib
import json
import pkgutil
import sys

import pytest

import benchmarks
from benchmarks.mnist_minute import FIRST_EPOCH_STEPS, SAFETY, Clock, steps_within
from benchmarks.turns import Arm, take_turns


def test_each_benchmark_can_be_imported():
    for module in pkgutil.iter_modules(benchmarks.__path__):
        importlib.import_module(f"benchmarks.{module.name}")


def test_steps_that_fit_into_the_seconds():
    clock = Clock()
    # the first epoch takes 3 s, each later step 0.02 s
    clock.at_s = [3.0 * step / FIRST_EPOCH_STEPS for step in range(FIRST_EPOCH_STEPS + 1)]
    clock.at_s += [3.0 + 0.02 * step for step in range(1, 80)]
    steps = steps_within(60.0, clock)
    assert 3.0 + 0.02 * (steps - FIRST_EPOCH_STEPS) == pytest.approx(60 * SAFETY, abs=0.02)


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


def make_arm(folder, name, code=ARM):
    return Arm(name, [sys.executable, "-c", code], threads=1, log=folder / f"{name}.log")


def test_arms_train_in_turn_and_say_what_they_did(tmp_path):
    arms = [make_arm(tmp_path, name) for name in ("a", "b")]
    try:
        turns = list(take_turns(arms, seconds=0.05, turn_s=0.02))
        assert turns == pytest.approx([0.02, 0.04, 0.05])
        for arm in arms:
            assert arm.options == {"speed": 1} and len(arm.rates) == 3
            assert arm.images == 2 * arm.steps and arm.seconds >= 0.05
            arm.finish(tmp_path / "steps")
            assert json.loads((tmp_path / "steps").read_text()) == arm.steps
    finally:
        for arm in arms:
            arm.close()
    with pytest.raises(SystemExit, match=r"a ended early[\s\S]*no such network"):
        make_arm(tmp_path, "a", "raise SystemExit('no such network')")
