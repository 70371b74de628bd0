"""What `vae_dist.train` survives, and what a run may begin from, through its real entry points."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.commands.test_train import ROOT, environment, wait_for_row
from tests.support.distributed import run_ranks
from tests.support.faults import Ranks, signal_oneself
from tests.support.training import (
    arguments,
    losses,
    rows,
    same_weights,
    status,
    train,
    weights,
)
from vae_dist import distributed
from vae_dist.evaluate import main as evaluate
from vae_dist.evaluation.run import EvaluationResult
from vae_dist.train import main

QUIET = ("evaluation.every=0", "checkpoint.every=2")


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


# the disk


def train_on_a_full_disk(argv: list[str], limit_bytes: int) -> int:
    """The kernel refuses to let a file grow beyond the limit, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    return main(argv)


def test_a_disk_that_takes_no_checkpoint_leaves_the_run_alive(tmp_path, digits, capfd):
    run = tmp_path / "run"
    assert train(run, digits, "training.steps=4", *QUIET) == [0]
    argv = arguments(run, digits, "training.steps=8", *QUIET)
    assert run_ranks(1, train_on_a_full_disk, argv, 50_000) == [1]
    output = capfd.readouterr().out
    assert "warning: cannot write checkpoint step_00000006" in output
    assert "the last good one is step_00000004; training goes on" in output
    assert sorted(rows(run)) == list(range(1, 9))  # it trained to its last step
    found = status(run)
    assert (found["status"], found["step"]) == ("failed", 4) and "make room" in found["reason"]
    assert not list((run / "checkpoints").glob(".*"))
    assert train(run, digits, "training.steps=8", *QUIET) == [0]  # there is room again
    assert status(run)["step"] == 8 and "steps 8, going on at step 4" in capfd.readouterr().out


def test_a_run_folder_that_vanishes_stops_nothing_but_the_record(tmp_path, digits):
    run, away = tmp_path / "run", tmp_path / "away"
    argv = arguments(run, digits, "training.steps=100000", "optimizer.schedule=constant", *QUIET)
    with Ranks(1, argv, output=tmp_path / "output") as group:
        group.wait_for_step(4)
        while not (run / "checkpoints" / "latest").exists():  # the writer gives way to training
            assert group.wait(timeout_s=0.05) == [None], group.text()
        run.rename(away)
        before = len((away / "log.jsonl").read_bytes())
        while len((away / "log.jsonl").read_bytes()) < before + 5000:
            assert group.wait(timeout_s=0.05) == [None], group.text()
        group.signal(signal.SIGTERM)
        assert group.wait() == [75], group.text()
        assert "warning: cannot write checkpoint" in group.text() and not run.exists()
    away.rename(run)
    options = (f"training.steps={max(steps_of(run)) + 1}", "optimizer.schedule=constant", *QUIET)
    assert train(run, digits, *options) == [0]


# the launcher


ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
ACCELERATE_LAUNCH = (*ACCELERATE, "--num_processes", "2", "--main_process_port", "0")
LAUNCHERS = {
    "accelerate launch": [*ACCELERATE_LAUNCH, "-m", "vae_dist.train"],
    "launch/local.sh": ["bash", str(ROOT / "launch" / "local.sh")],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "whom", "code"),
    [
        # the agent's code is 1 for every one but 0: status.json has the truth
        ("accelerate launch", signal.SIGTERM, "launcher", 1),
        ("accelerate launch", signal.SIGTERM, "one worker", 1),
        ("accelerate launch", signal.SIGUSR1, "launcher", -signal.SIGUSR1),
        ("accelerate launch", signal.SIGKILL, "launcher", -signal.SIGKILL),
        ("launch/local.sh", signal.SIGUSR1, "launcher", 1),
    ],
)
def test_a_signal_under_a_launcher(tmp_path, digits, launcher, number, whom, code):
    run = tmp_path / "run"
    options = arguments(run, digits, "training.steps=100000", "optimizer.schedule=constant", *QUIET)
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(PYTHON=sys.executable, PROCESSES="2"),
    )
    try:
        wait_for_row(run, 3, process)
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in family if p.environ().get("LOCAL_RANK") == "1"]
        os.kill(process.pid if whom == "launcher" else workers[0].pid, number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    found = status(run)
    assert found["status"] == "interrupted" and found["step"] == max(steps_of(run)), output
    assert process.returncode == code
    if code < 0:
        assert found["reason"] == f"the launcher, process {process.pid}, is gone"
    end = time.monotonic() + 20
    while any(p.is_running() for p in family) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(p.is_running() for p in family)


def test_a_stop_while_other_ranks_are_waited_for_is_an_interruption(tmp_path, digits):
    run = tmp_path / "run"

    def only_rank_0_comes(rank: int) -> None:
        join = distributed.PartialState
        if rank == 1:
            time.sleep(60)

        def stopped_at_once(**options: object) -> object:
            signal_oneself()
            return join(**options)

        distributed.PartialState = stopped_at_once

    argv = arguments(run, digits, "runtime.timeout_s=30", *QUIET)
    with Ranks(2, argv, output=tmp_path / "output", prepare=only_rank_0_comes) as group:
        assert group.wait(0, timeout_s=20) == [75], group.text()
        assert "interrupted before training (signal SIGTERM)" in group.text()
    assert not run.exists()


# what a run begins from


def test_a_run_begins_from_the_averaged_weights_of_another(tmp_path, digits):
    first = tmp_path / "first"
    assert train(first, digits, "training.steps=4", *QUIET) == [0]
    sources = (
        first,
        first / "checkpoints" / "step_00000004",
        first / "checkpoints" / "step_00000004" / "ema.safetensors",
    )
    found = []
    for number, source in enumerate(sources):
        run = tmp_path / f"run{number}"
        options = ("training.steps=2", f"init_from={source}", "optimizer.lr=1e-9", *QUIET)
        assert train(run, digits, *options) == [0]
        found.append(losses(run))
        for name, value in weights(first, 4, "ema").items():
            torch.testing.assert_close(weights(run, 2)[name], value, rtol=0, atol=1e-6)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    shutil.rmtree(first)  # a run that goes on needs it no more
    options = ("training.steps=3", f"init_from={sources[0]}", "optimizer.lr=1e-9", *QUIET)
    assert train(tmp_path / "run0", digits, *options) == [0]


def test_weights_that_do_not_fit_are_listed(tmp_path, digits, capfd):
    first = tmp_path / "first"
    assert train(first, digits, "training.steps=2", *QUIET) == [0]
    options = ("training.steps=2", f"init_from={first}", "model.latent_channels=4", *QUIET)
    assert train(tmp_path / "run", digits, *options) == [2]
    errors = capfd.readouterr().err
    assert "tensors do not fit this model (there -> here)" in errors
    assert "decoder.linear_in.weight: 784x8 -> 784x4" in errors
    assert train(tmp_path / "run", digits, f"init_from={tmp_path}/none", *QUIET) == [2]
    assert (
        "no run folder, checkpoint folder, .safetensors file or folder of" in capfd.readouterr().err
    )


def test_more_steps_extend_a_finished_run_exactly(tmp_path, digits, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (*QUIET, "optimizer.schedule=constant")
    assert train(whole, digits, "training.steps=8", *options) == [0]
    for steps in (4, 8):
        assert train(run, digits, f"training.steps={steps}", *options) == [0]
    assert same_weights(run, whole, 8)
    assert json.loads((run / "status.json").read_text())["step"] == 8
    for line in (lines := re.findall(r"first step after (.*)", capfd.readouterr().out)):
        total, parts = line.split(" s: ")
        names = re.sub(r" [0-9.]+(,|$)", r"\1", parts).strip()
        assert names == "imports, ranks, checkpoint, data, model and trackers, first step"
        seconds = [float(part.split()[-1]) for part in parts.split(",")]
        assert sum(seconds) == pytest.approx(float(total), abs=0.05 * (len(seconds) + 1))
    assert len(lines) == 3  # of each session


# the best


def test_the_best_checkpoint_is_kept_and_can_be_used(tmp_path, digits, monkeypatch):
    run, best = tmp_path / "run", 6
    figures, row = iter([5.0, 3.0, 4.0, 6.0]), EvaluationResult.row

    def next_figure(self: EvaluationResult) -> dict[str, Any]:
        return row(self) | {"eval/neg_elbo_nats": next(figures)}

    monkeypatch.setattr(EvaluationResult, "row", next_figure)
    options = ("training.steps=12", "evaluation.every=3", "checkpoint.every=0")
    assert train(run, digits, *options, "checkpoint.keep_last=1") == [0]
    monkeypatch.undo()
    assert rows(run)[best]["eval/neg_elbo_nats"] == 3.0
    assert steps_of(run) == [best, 12]
    assert (run / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    assert evaluate([f"run={run}", "checkpoint=best"]) == 0
    results = json.loads((run / f"results_step{best}.json").read_text())
    assert results["step"] == best
    rate_nats = rows(run)[best]["eval/rate_nats"]
    assert results["figures"]["rate_nats"] == pytest.approx(rate_nats, rel=1e-5)
