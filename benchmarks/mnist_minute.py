"""How good is a model of digits after one minute on this machine?

    python -m benchmarks.mnist_minute [seconds=60] [steps=0] [config=mnist] [key=value ...]

config=mnist, with another decay of Adam's second moment (SCHEDULE), or another config, on the 9,000
digits that ship with the package. 220 steps of another run measure the speed of this machine;
`training.steps` is set to what fits into the seconds (or given), so that the schedule ends with
them. The clock runs from the request of the first batch to the end of the last step; the evaluation
of the 1,000 held-out digits (binarised, -ELBO of the averaged weights in float32) comes after it.
Out: a table; the last line is a JSON object.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.report import finish, head, show, split_options
from benchmarks.setting import QUIET, make_setting, train, with_data
from vae_dist.data.loader import Batch, EvaluationStream
from vae_dist.evaluation.run import evaluate
from vae_dist.training.loop import Trainer

GOAL_NATS = 97.0
# Adam's second moment follows faster than at its default of 0.999: 1 nat lower after 2,080 steps
SCHEDULE = "optimizer.betas=[0.9,0.99]"
TRIAL_STEPS = 220
FIRST_EPOCH_STEPS = 141  # which are slower: images are decoded once
SAFETY = 0.96  # of the seconds that the trial promises


class Clock:
    """Goes around the stream: when each batch was asked for, and when the last step ended."""

    def __init__(self) -> None:
        self.at_s: list[float] = []  # since the first batch was asked for
        self.took_s = 0.0
        self.num_parameters = 0

    def around(self, trainer: Trainer, stream: Iterator[Batch]) -> Iterator[Batch]:
        self.num_parameters = sum(p.numel() for p in trainer.training_step.vae.parameters())
        began = time.perf_counter()

        def at_the_end(*_: object) -> dict[str, float]:
            self.took_s = time.perf_counter() - began
            return {}

        trainer.evaluator = at_the_end  # type: ignore[assignment]
        while True:
            self.at_s.append(time.perf_counter() - began)
            yield next(stream)


def run(folder: Path, words: list[str], steps: int) -> tuple[Clock, dict[str, float], int]:
    """The clock, what the averaged model is worth on the held-out digits, and the batch size."""
    setting = make_setting([*words, f"training.steps={steps}", f"run={folder}"])
    clock = Clock()
    trainer = train(setting, folder, clock.around)
    data = setting.data
    held_out = EvaluationStream(data.validation, data.evaluation_settings, batch_size=250)
    model = trainer.training_step.ema.module
    result = evaluate(model, held_out, runtime=setting.runtime, seed=setting.config.seed)  # type: ignore[arg-type]
    assert result is not None
    return clock, result.figures, setting.config.training.batch_size


def steps_within(seconds: float, trial: Clock) -> int:
    """Steps of a run that ends just before `seconds` are over, by the clock of a trial."""
    first_epoch_s = trial.at_s[FIRST_EPOCH_STEPS]
    later = len(trial.at_s) - 1 - FIRST_EPOCH_STEPS
    step_s = (trial.at_s[-1] - first_epoch_s) / later
    return max(1, FIRST_EPOCH_STEPS + int((seconds * SAFETY - first_epoch_s) / step_s))


def main(arguments: list[str]) -> int:
    options, keys = split_options(arguments, {"seconds": "60", "steps": "0"})
    seconds, steps = float(options["seconds"]), int(options["steps"])
    facts = head("digits after a minute")
    with tempfile.TemporaryDirectory(prefix="minute.") as temporary:
        out = Path(temporary)
        named = any(key.startswith("config=") for key in keys)
        words = [] if named else ["config=mnist", SCHEDULE]
        words = with_data([*words, *QUIET, *keys], "", out / "data")
        if not steps:
            trial, _, _ = run(out / "trial", words, TRIAL_STEPS)
            steps = steps_within(seconds, trial)
        clock, found, batch = run(out / "run", words, steps)
    figures = {
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds": clock.took_s,
        "images_per_second": steps * batch / clock.took_s,
        **{key: found[key] for key in ("neg_elbo_nats", "neg_elbo_se_nats", "rate_nats")},
        "num_images": found["num_images"],
    }
    show([figures])
    reached = clock.took_s <= seconds and found["neg_elbo_nats"] <= GOAL_NATS
    finish(facts, {**figures, "goal_nats": GOAL_NATS, "goal_s": seconds, "reached": reached})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
