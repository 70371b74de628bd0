"""`vae_dist.train` as a user meets it: what it refuses, what it survives, what it leaves behind."""

import json
import os
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

from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from tests.support.faults import Ranks, last_step, signal_oneself
from tests.support.training import arguments, losses, rows, same_weights, status, train, weights
from vae_dist import distributed
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.tar import ShardError
from vae_dist.evaluate import main as evaluate
from vae_dist.evaluation.run import EvaluationResult
from vae_dist.models.blocks import Block
from vae_dist.models.conv import Decoder, Encoder
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.train import main
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Trainer
from vae_dist.training.optimizer import Ema

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("evaluation.every=0", "checkpoint.every=2")
LONG = ("training.steps=100000", "optimizer.schedule=constant", *QUIET)


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory, digits) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    assert train(run, digits, "training.steps=4", *QUIET) == [0]
    return run


@pytest.fixture
def begun(four_steps, tmp_path) -> Path:
    """A copy of a run of four steps."""
    return shutil.copytree(four_steps, tmp_path / "begun")


# what is refused, before anything is trained


@pytest.mark.parametrize(
    ("overrides", "environment", "messages"),
    [
        (["optimizer.lrr=1", "log.every=x"], {}, ["did you mean optimizer.lr", "log.every=x"]),
        (["training.batch_size=60"], {}, ["60 is not a multiple of data.slots=16"]),
        ([], {"WORLD_SIZE": "3", "RANK": "0"}, ["3 processes", "1, 2, 4, 8, 16"]),
        ([], {"WORLD_SIZE": "2"}, ["each would train alone", "--num_processes 2"]),
        (["data.train={digits}/train/train-{{000000..000009}}.tar"], {}, ["2 of 10 shards are"]),
        (["data.train={tmp}"], {}, ["holds no *.tar"]),
        (["run={tmp}/file/run"], {}, ["cannot be written"]),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path, digits, capfd, monkeypatch, overrides, environment, messages
):
    (tmp_path / "file").write_text("")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [word.format(digits=digits, tmp=tmp_path) for word in overrides]
    assert main(arguments(tmp_path / "run", digits, *words)) == 2
    errors = capfd.readouterr().err
    assert all(message in errors for message in messages), errors
    assert not (tmp_path / "run").exists()


def test_changes_under_a_run_are_refused_with_the_differences(begun, digits, capfd):
    before = (begun / "config.yaml").read_text()
    changed = ("training.steps=6", "optimizer.lr=0.5", "log.every=2", *QUIET)
    assert main(arguments(begun, digits, *changed)) == 2
    errors = capfd.readouterr().err
    assert "optimizer.lr: 0.001 -> 0.5" in errors and "log.every" not in errors
    other_model = ("model.latent_channels=9", "resume.allow_changes=true")
    assert main(arguments(begun, digits, *changed, *other_model)) == 2
    assert "do not fit this config's model" in capfd.readouterr().err
    assert (begun / "config.yaml").read_text() == before
    assert main(arguments(begun, digits, *changed, "resume.allow_changes=true")) == 0
    assert status(begun)["step"] == 6


def test_other_shards_of_the_same_name_are_refused(tmp_path, digits, capfd):
    run, copy = tmp_path / "run", tmp_path / "digits"
    shutil.copytree(digits, copy)
    assert main(arguments(run, copy, "training.steps=2", *QUIET)) == 0
    for name in ("train-000003.tar", "_info.json"):
        (copy / "train" / name).unlink()
    assert main(arguments(run, copy, "training.steps=4", *QUIET)) == 2
    assert "not those that the run began with" in capfd.readouterr().err


def test_slots_of_the_run_that_do_not_fit_the_processes_are_refused(tmp_path, digits, capfd):
    run = tmp_path / "run"
    assert main(arguments(run, digits, "training.steps=2", "data.slots=1", *QUIET)) == 0
    argv = arguments(run, digits, "training.steps=4", "data.slots=0", *QUIET)
    assert run_ranks(2, main, argv) == [2, 2]
    assert f"run={run}: 2 processes cannot share data.slots=1" in capfd.readouterr().err
    assert status(run)["status"] == "finished"


def test_a_second_trainer_in_one_folder_is_refused(tmp_path, digits, capfd):
    argv = arguments(tmp_path / "run", digits, *LONG)
    with Ranks(1, argv, output=tmp_path / "output") as first:
        first.wait_for_step(1)
        assert main(argv) == 2
        assert "in use by process" in capfd.readouterr().err
        first.signal(signal.SIGTERM)
        assert first.wait() == [75] and "goes on from there" in first.text()
    assert status(tmp_path / "run")["status"] == "interrupted"


# damage


def damage_png(index: ShardIndex, shard: int, sample: int) -> None:
    """Zero the middle of one sample's PNG, under its header, so that only decoding notices."""
    start, end = index.offsets(shard, sample, sample + 1)
    with open(index.paths[shard], "r+b") as file:
        data = file.read(int(end))
        file.seek(data.index(b"IDAT", int(start)) + 8)
        file.write(bytes(60))


def test_corrupt_samples_are_replaced_counted_and_named_up_to_a_limit(tmp_path, digits, capfd):
    copy, run = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, copy)
    index = load_index(str(copy / "train"), key="data.train", create=False)
    validation = load_index(str(copy / "validation"), key="data.validation", create=False)
    for sample in range(100, 130):
        damage_png(index, 2, sample)
    for sample in range(2):
        damage_png(validation, 0, sample)
    steps = index.num_samples // 64 + 1  # an epoch, so that each of them comes up
    options = (f"training.steps={steps}", "log.every=20", "evaluation.every=0")
    assert main(arguments(run, copy, *options)) == 0
    assert rows(run)[steps]["data/skipped_samples"] == 30
    assert rows(run)[steps]["eval/num_images"] == 998
    output = capfd.readouterr().out
    assert "train-000002.tar sample 117" in output and "in its place" in output
    for sample in range(600):
        damage_png(index, 1, sample)
    options = ("evaluation.every=0", "data.max_skipped_fraction=0.002")
    assert main(arguments(tmp_path / "other", copy, *options)) == 1
    assert "data.max_skipped_fraction" in status(tmp_path / "other")["reason"]
    assert status(tmp_path / "other")["status"] == "failed"


def test_a_torn_newest_checkpoint_falls_back_and_the_end_is_the_same(begun, digits, capfd):
    whole = shutil.copytree(begun, begun.parent / "whole")
    torn = begun / "checkpoints" / "step_00000004" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert main(arguments(begun, digits, "training.steps=4", *QUIET)) == 0
    assert "step_00000004/optimizer.safetensors is torn" in capfd.readouterr().err
    assert same_weights(begun, whole, 4) and sorted(rows(begun)) == [1, 2, 3, 4]
    for manifest in begun.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert main(arguments(begun, digits, "training.steps=4", *QUIET)) == 2  # not begun anew
    assert "none of the 2 checkpoints" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError("no space left"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
def test_images_that_cannot_be_drawn_do_not_stop_a_run(tmp_path, digits, capfd, monkeypatch, error):
    def full(self: ImageLogger, *arguments: object) -> None:
        raise error

    monkeypatch.setattr(ImageLogger, "__call__", full)
    assert main(arguments(tmp_path / "run", digits, "training.steps=2")) == 0
    assert "no images" in capfd.readouterr().out
    assert "eval/neg_elbo_nats" in rows(tmp_path / "run")[2]


def test_trackers_are_closed_where_the_model_cannot_be_built(tmp_path, digits, monkeypatch):
    """An open W&B run would be ended by wandb's own exit hook, which has no time limit."""
    closed: list[str] = []

    def fails(*arguments: object) -> None:
        raise ValueError("no model")

    monkeypatch.setattr("vae_dist.training.setup.build_trainer", fails)
    monkeypatch.setattr(JsonlSink, "close", lambda self, status: closed.append(status))
    assert main(arguments(tmp_path / "run", digits)) == 1
    assert closed == ["failed"] and status(tmp_path / "run")["status"] == "failed"
    assert status(tmp_path / "run")["reason"] == "ValueError: no model"


@pytest.mark.parametrize(("value", "parts"), [("true", (Encoder, Decoder)), ("blocks", (Block,))])
def test_what_is_compiled_is_what_was_asked_for(tmp_path, digits, capfd, monkeypatch, value, parts):
    asked = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.add(type(self)))
    words = ("training.steps=1", "training.precision=no", f"runtime.compile={value}")
    assert main(arguments(tmp_path / "run", digits, *words)) == 0
    assert asked and all(issubclass(kind, parts) for kind in asked)
    assert ("compiled block by block" in capfd.readouterr().out) == (value == "blocks")


# the disk


def train_on_a_full_disk(argv: list[str], limit_bytes: int) -> int:
    """The kernel refuses to let a file grow beyond the limit, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    return main(argv)


def test_a_disk_that_takes_no_checkpoint_leaves_the_run_alive(begun, digits, capfd):
    argv = arguments(begun, digits, "training.steps=8", *QUIET)
    assert run_ranks(1, train_on_a_full_disk, argv, 50_000) == [1]
    output = capfd.readouterr().out
    assert "warning: cannot write checkpoint step_00000006" in output
    assert "the last good one is step_00000004; training goes on" in output
    assert sorted(rows(begun)) == list(range(1, 9))  # it trained to its last step
    found = status(begun)
    assert (found["status"], found["step"]) == ("failed", 4) and "free space" in found["reason"]
    assert not list((begun / "checkpoints").glob(".*"))
    assert main(argv) == 0  # there is room again
    assert status(begun)["step"] == 8 and "steps 8, going on at step 4" in capfd.readouterr().out


def test_a_run_folder_that_is_renamed_is_saved_under_its_new_name(tmp_path, digits):
    run, away = tmp_path / "run", tmp_path / "away"
    with Ranks(1, arguments(run, digits, *LONG), output=tmp_path / "output") as group:
        group.wait_for_step(4)
        run.rename(away)
        assert group.wait() == [75], group.text()
    found = status(away)
    assert not run.exists() and found["status"] == "interrupted"
    assert found["step"] == steps_of(away)[-1]
    assert str(away) in found["reason"] and found["step"] == max(rows(away)) >= 4
    options = (f"training.steps={found['step'] + 1}", "optimizer.schedule=constant", *QUIET)
    assert main(arguments(away, digits, *options)) == 0


# runs that end by themselves


@pytest.mark.parametrize("error", [ShardError("gone"), RuntimeError("odd"), MemoryError("no")])
def test_what_is_done_is_saved_where_a_run_ends_by_itself(tmp_path, digits, monkeypatch, error):
    run, options = tmp_path / "run", ("evaluation.every=0", "checkpoint.every=0")
    next_batch = Trainer._next

    def failing(self: Trainer, stream: Any) -> Any:
        if self.step == 3:
            raise error
        return next_batch(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next", failing)
        assert main(arguments(run, digits, "training.steps=5", *options)) in (1, 2)
    found = status(run)
    assert (steps_of(run), found["status"], found["step"]) == ([3], "failed", 3)
    assert str(error) in found["reason"]
    assert main(arguments(run, digits, "training.steps=5", *options)) == 0
    assert main(arguments(tmp_path / "whole", digits, "training.steps=5", *options)) == 0
    assert same_weights(run, tmp_path / "whole", 5)


def test_what_an_update_has_left_half_done_is_not_saved(tmp_path, digits, monkeypatch):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("amid an update")

    monkeypatch.setattr(Ema, "update", fails)
    run = tmp_path / "run"
    assert main(arguments(run, digits, "training.steps=5")) == 1
    assert steps_of(run) == [] and "amid an update" in status(run)["reason"]


def test_a_run_of_which_every_update_was_skipped_has_failed(tmp_path, digits):
    run = tmp_path / "run"
    nothing = ("training.steps=4", "likelihood.kind=gaussian", "likelihood.variance=fixed")
    assert main(arguments(run, digits, *nothing, "likelihood.sigma=1e-40")) == 1
    assert (
        status(run)["status"] == "failed" and "all 4 updates were skipped" in status(run)["reason"]
    )


# kills and launchers


def test_kill_9_costs_at_most_one_interval_and_changes_no_bit(tmp_path, digits):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ("training.steps=40", "checkpoint.every=10", "evaluation.every=20")
    assert main(arguments(whole, digits, *options)) == 0
    for step in (3, 21):
        with Ranks(1, arguments(run, digits, *options), output=tmp_path / "output") as group:
            group.wait_for_step(step)
            group.signal(signal.SIGKILL)
            group.wait()
    with Ranks(1, arguments(run, digits, *options), output=tmp_path / "last") as group:
        assert group.wait() == [0] and "going on at step" in group.text()
    assert same_weights(run, whole, 40) and torch.equal(losses(run), losses(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        # the agent's code is 1 for every one but 0: status.json has the truth
        ("accelerate", signal.SIGTERM, 1),
        ("accelerate", signal.SIGKILL, -signal.SIGKILL),
        ("launch/local.sh", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_to_a_launcher(tmp_path, digits, launcher, number, code):
    run = tmp_path / "run"
    words = ["bash", str(ROOT / launcher)]
    if launcher == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        words += ["--num_processes", "2", "--main_process_port", "0", "-m", "vae_dist.train"]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PROCESSES": "2"}
    with subprocess.Popen(
        [*words, *arguments(run, digits, *LONG)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        while last_step(run) < 3 and process.poll() is None:
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    found = status(run)
    assert found["status"] == "interrupted" and found["step"] == max(steps_of(run)), output
    assert process.returncode == code
    if code < 0:
        assert found["reason"] == f"the launcher, process {process.pid}, is gone"
    assert psutil.wait_procs(family, timeout=20)[1] == []


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


# what a run begins from, and leaves


def test_a_run_begins_from_the_averaged_weights_of_another(four_steps, tmp_path, digits, capfd):
    checkpoint = four_steps / "checkpoints" / "step_00000004"
    found = []
    for number, source in enumerate((four_steps, checkpoint, checkpoint / "ema.safetensors")):
        run = tmp_path / f"run{number}"
        options = ("training.steps=2", f"init_from={source}", "optimizer.lr=1e-9", *QUIET)
        assert main(arguments(run, digits, *options)) == 0
        found.append(losses(run))
        for name, value in weights(four_steps, 4, "ema").items():
            torch.testing.assert_close(weights(run, 2)[name], value, rtol=0, atol=1e-6)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    options = (f"init_from={four_steps}", "model.latent_channels=4", *QUIET)
    assert main(arguments(tmp_path / "other", digits, *options)) == 2
    errors = capfd.readouterr().err
    assert "tensors do not fit this model (there -> here)" in errors
    assert "decoder.linear_in.weight: 784x8 -> 784x4" in errors
    assert main(arguments(tmp_path / "other", digits, f"init_from={tmp_path}/none")) == 2
    assert "no run folder, checkpoint folder, .safetensors file" in capfd.readouterr().err


def test_more_steps_extend_a_finished_run_exactly(tmp_path, digits, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (*QUIET, "optimizer.schedule=constant")
    for folder, steps in ((whole, 8), (run, 4), (run, 8), (run, 8)):
        assert main(arguments(folder, digits, f"training.steps={steps}", *options)) == 0
    assert same_weights(run, whole, 8) and status(run)["step"] == 8
    output = capfd.readouterr().out
    assert output.count("first step after ") == 3 and "nothing is left to do" in output


def test_the_best_checkpoint_is_kept_and_can_be_used(tmp_path, digits, monkeypatch):
    run, best = tmp_path / "run", 6
    figures, row = iter([5.0, 3.0, 4.0, 6.0]), EvaluationResult.row

    def next_figure(self: EvaluationResult) -> dict[str, Any]:
        return row(self) | {"eval/neg_elbo_nats": next(figures)}

    monkeypatch.setattr(EvaluationResult, "row", next_figure)
    options = ("training.steps=12", "evaluation.every=3", "checkpoint.every=0")
    assert main(arguments(run, digits, *options, "checkpoint.keep_last=1")) == 0
    monkeypatch.undo()
    assert steps_of(run) == [best, 12]
    assert (run / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    assert evaluate([f"run={run}", "checkpoint=best"]) == 0
    results = json.loads((run / f"results_step{best}.json").read_text())
    rate_nats = rows(run)[best]["eval/rate_nats"]
    assert results["figures"]["rate_nats"] == pytest.approx(rate_nats, rel=1e-5)


def test_a_checkpoint_is_written_before_its_evaluation(tmp_path, digits, monkeypatch):
    run = tmp_path / "run"
    options = ("training.steps=4", "evaluation.every=2", "checkpoint.every=2")

    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("not enough memory: no evaluation")

    with monkeypatch.context() as patch:
        patch.setattr("vae_dist.training.build.evaluate", fails)
        assert main(arguments(run, digits, *options)) == 1
    assert steps_of(run) == [2] and "no evaluation" in status(run)["reason"]
    assert "lower evaluation.batch_size" in status(run)["reason"]
    assert main(arguments(run, digits, *options)) == 0
    assert "train/loss" in rows(run)[2] and "eval/neg_elbo_nats" in rows(run)[2]


def test_dry_run_shows_the_plan_and_leaves_no_folder(tmp_path, digits, capfd):
    words = ("dry_run=true", "optimizer.warmup_steps=70")
    assert main(arguments(tmp_path / "run", digits, *words)) == 0
    output = capfd.readouterr().out
    assert "the last step, 60, comes before the end of optimizer.warmup_steps=70" in output
    assert "the run ends within its first epoch, after 3,840 of 9,000 images" in output
    for part in ("parameters", "9,000 images", "60", "MiB", "1, 2, 4, 8", "nothing was trained"):
        assert part in output
    assert not (tmp_path / "run").exists()
