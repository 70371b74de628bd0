"""What W&B costs a training run, working or not: time against `wandb.mode=disabled`.

    python -m benchmarks.wandb_faults [rounds=5] [steps=600] [key=value of vae_dist.train ...]

In: config=mnist, one row per step, and the stand-in server of the tests on loopback. Each round
trains once in each case, in another order: W&B disabled; online; offline; no network (nothing
listens); and faults that begin when the first rows have arrived and stay: the server dead, hanging
(takes connections, never answers), answering 500. Out: per case the median seconds of a step, of
the process before and after its steps and of CPU in all, and the median over rounds of the ratio to
the round's disabled run; every run must do all its steps. The last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.wandb_server import WandbServer
from vae_dist.tracking.sinks import read_rows

CASES = ("disabled", "online", "offline", "no network", "dead", "hang", "500")
FINISH_S = 10


def break_down(server: WandbServer, case: str, process: subprocess.Popen[str]) -> None:
    if case not in ("dead", "hang", "500"):
        return
    while process.poll() is None and not any(run.history for run in server.runs.values()):
        time.sleep(0.05)
    server.fault = case
    if case == "dead":
        server.stop()


def train(case: str, folder: Path, steps: int, options: list[str]) -> dict[str, float]:
    """Seconds per step, before the first and after the last step, and of all processors."""
    run = folder / "run"
    mode = case if case in ("disabled", "offline") else "auto"
    with WandbServer() as server:
        if case == "no network":
            server.stop()
        began, used = time.time(), cpu_seconds()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vae_dist.train", "config=mnist", f"run={run}"),
                *(f"training.steps={steps}", f"evaluation.every={steps}", "log.every=1"),
                *(f"wandb.mode={mode}", f"wandb.finish_timeout_s={FINISH_S}", *options),
            ],
            env=server.environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        break_down(server, case, process)
        said = process.communicate()[0]
        ended, used = time.time(), cpu_seconds() - used
    rows = dict(read_rows(run / "log.jsonl"))
    if process.returncode != 0 or sorted(rows) != list(range(1, steps + 1)):
        raise SystemExit(f"{case}: not all {steps} steps\n{said}")
    # the first rows warm up; before the fault the cases are equal
    each = [row["time/step_seconds"] for step, row in rows.items() if step > steps // 10]
    last_row = (run / "log.jsonl").stat().st_mtime
    trained = sum(row["time/step_seconds"] for row in rows.values())
    return {
        "step_s": sum(each) / len(each),
        "before_s": last_row - began - trained,  # start and evaluation
        "after_s": ended - last_row,
        "cpu_s": used,
    }


def cpu_seconds() -> float:
    """Of all processes that have ended below this one; a busy machine hardly changes them."""
    below = resource.getrusage(resource.RUSAGE_CHILDREN)
    return below.ru_utime + below.ru_stime


def main() -> None:
    given = dict(option.split("=", 1) for option in sys.argv[1:])
    rounds, steps = int(given.pop("rounds", 5)), int(given.pop("steps", 600))
    options = [f"{key}={value}" for key, value in given.items()]
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case in random.Random(number).sample(CASES, len(CASES)):
            with tempfile.TemporaryDirectory() as folder:
                found[case].append(train(case, Path(folder), steps, options))
            print(f"round {number} {case}: {found[case][-1]}", file=sys.stderr, flush=True)
    report(found, rounds=rounds, steps=steps)


def report(found: dict[str, list[dict[str, float]]], *, rounds: int, steps: int) -> None:
    medians = {}
    for case, runs in found.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = [
            run["step_s"] / base["step_s"]
            for run, base in zip(runs, found["disabled"], strict=True)
        ]
        figures["ratio"] = statistics.median(ratios)
        figures["ratio_min"], figures["ratio_max"] = min(ratios), max(ratios)
        medians[case] = {key: round(value, 4) for key, value in figures.items()}
        print(
            f"{case:<11}{1e3 * figures['step_s']:8.2f} ms/step  x{figures['ratio']:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})  before {figures['before_s']:.1f} s, "
            f"after {figures['after_s']:.1f} s, CPU {figures['cpu_s']:.1f} s"
        )
    print(json.dumps({"rounds": rounds, "steps": steps, "cases": medians}))


if __name__ == "__main__":
    main()
