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

import psutil
import pytest
import torch

import vae_dist
from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from tests.support.faults import Ranks, at_place, in_the_middle_of_a_write, last_step
from tests.support.training import arguments, losses, rows, same_weights, status, weights
from vae_dist.data.index import Run, load_index
from vae_dist.data.tar import ShardError
from vae_dist.evaluate import main as evaluate
from vae_dist.evaluation.run import EvaluationResult
from vae_dist.models.build import build_vae
from vae_dist.run.resume import initial_weights
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.train import main
from vae_dist.training import loop
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Trainer
from vae_dist.training.optimizer import Ema

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("evaluation.every=0", "checkpoint.every=2", "optimizer.schedule=constant")
LONG = (*QUIET, "training.steps=100000")


def trained(run, digits, steps, *overrides):
    """Exit code of a run to this step, in this process."""
    return main(arguments(run, digits, *QUIET, f"training.steps={steps}", *overrides))


def raising(error):
    def fails(*arguments, **options):
        raise error

    return fails


def steps_of(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory, digits):
    run = tmp_path_factory.mktemp("four") / "run"
    assert trained(run, digits, 4) == 0
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """Eight steps without a break."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert trained(run, digits, 8) == 0
    return run


@pytest.fixture
def begun(four_steps, tmp_path):
    """A copy of the run of four steps."""
    return shutil.copytree(four_steps, tmp_path / "begun")


# what is refused, before anything is trained


@pytest.mark.parametrize(
    ("overrides", "environment", "messages"),
    [
        ("", "WORLD_SIZE=3 RANK=0", "3 processes|1, 2, 4, 8."),
        ("", "EXPECTED_WORLD_SIZE=2", "WORLD_SIZE=1"),
        ("data.train={digits}/train/images-{{000000..000009}}.tar", "", "2 of 10 shards are"),
        ("data.train={tmp}", "", "holds no *.tar"),
        ("run=/proc/run", "", "cannot be written"),
        ("init_from={tmp}/none", "", "no run folder, checkpoint folder, .safetensors file"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path, digits, capfd, monkeypatch, overrides, environment, messages
):
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    words = overrides.format(digits=digits, tmp=tmp_path).split()
    assert main(arguments(tmp_path / "run", digits, *words)) == 2
    errors = capfd.readouterr().err
    assert all(message in errors for message in messages.split("|")), errors
    assert not (tmp_path / "run").exists()


def test_changes_under_a_run_are_refused_with_the_differences(begun, digits, tmp_path, capfd):
    before = (begun / "config.yaml").read_text()
    changed = ("optimizer.lr=0.5", "log.every=2")
    assert trained(begun, digits, 6, *changed) == 2
    errors = capfd.readouterr().err
    assert "optimizer.lr: 0.001 -> 0.5" in errors and "log.every" not in errors
    allowed = (*changed, "resume.allow_changes=true")
    assert trained(begun, digits, 6, *allowed, "model.latent_channels=9") == 2
    assert "do not fit this config's model" in capfd.readouterr().err
    others = shutil.copytree(digits, tmp_path / "others")
    for name in ("images-000003.tar", "_info.json"):
        (others / "train" / name).unlink()
    assert trained(begun, others, 6) == 2
    assert "not those that the run began with" in capfd.readouterr().err
    assert (begun / "config.yaml").read_text() == before and steps_of(begun) == [2, 4]
    assert trained(begun, digits, 6, *allowed) == 0 and status(begun)["step"] == 6


# damage


def damage_pngs(folder, shard, samples):
    """Zero the middle of their PNGs, under the header, so that only decoding notices."""
    index = load_index(str(folder), key="data", create=False)
    for sample in samples:
        start, end = index.offsets([Run(shard, sample, sample + 1)])[0]
        with open(index.paths[shard], "r+b") as file:
            data = file.read(int(end))
            file.seek(data.index(b"IDAT", int(start)) + 8)
            file.write(bytes(60))


def test_corrupt_samples_are_replaced_counted_and_named_up_to_a_limit(tmp_path, digits, capfd):
    copy, run = shutil.copytree(digits, tmp_path / "digits"), tmp_path / "run"
    damage_pngs(copy / "train", 2, range(10, 22))
    damage_pngs(copy / "validation", 0, range(2))
    epoch = 512 // 16 + 1  # steps, in which each of them comes up
    assert trained(run, copy, epoch, "data.max_skipped_fraction=0.05") == 0
    assert rows(run)[epoch]["data/skipped_samples"] == 12
    assert rows(run)[epoch]["eval/num_images"] == 62
    output = capfd.readouterr().out
    assert "images-000002.tar sample 17" in output and "in its place" in output
    assert trained(run, copy, epoch + 1, "data.max_skipped_fraction=0.05") == 0
    assert rows(run)[epoch + 1]["data/skipped_samples"] >= 12  # those before it stopped count
    assert trained(tmp_path / "other", copy, epoch, "data.max_skipped_fraction=0.02") == 1
    assert "data.max_skipped_fraction" in status(tmp_path / "other")["reason"]
    shutil.copytree(digits, copy, dirs_exist_ok=True)  # repaired: it counts anew
    options = ("data.max_skipped_fraction=0.02", "resume.allow_changes=true")
    assert trained(tmp_path / "other", copy, epoch, *options) == 0


def test_images_that_cannot_be_drawn_do_not_stop_a_run(tmp_path, digits, capfd, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ImageLogger, "__call__", raising(error))
    assert trained(tmp_path / "run", digits, 1) == 0
    assert "no images (CUDA out of memory)" in capfd.readouterr().out
    assert "eval/neg_elbo_nats" in rows(tmp_path / "run")[1]


def test_trackers_are_closed_where_the_model_cannot_be_built(tmp_path, digits, monkeypatch):
    """An open W&B run would be ended by wandb's own exit hook, which has no time limit."""
    closed, fails = [], raising(ValueError("no model"))
    monkeypatch.setattr("vae_dist.training.setup.build_trainer", fails)
    monkeypatch.setattr(JsonlSink, "close", lambda self, status: closed.append(status))
    assert trained(tmp_path / "run", digits, 2) == 1
    assert closed == ["failed"] and status(tmp_path / "run")["reason"] == "ValueError: no model"


# the disk


def train_on_a_full_disk(argv):
    """The kernel refuses to let a file grow beyond the limit, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    return main(argv)


def test_a_disk_that_takes_no_checkpoint_leaves_the_run_alive(begun, whole, digits, capfd):
    argv = arguments(begun, digits, "training.steps=8", *QUIET)
    assert run_ranks(1, train_on_a_full_disk, argv) == [1]
    output = capfd.readouterr().out
    assert "warning: cannot write checkpoint step_00000006" in output
    assert "the last good one is step_00000004; training goes on" in output
    assert sorted(rows(begun)) == list(range(1, 9))  # it trained to its last step
    found = status(begun)
    assert (found["status"], found["step"]) == ("failed", 4) and "free space" in found["reason"]
    assert not list((begun / "checkpoints").glob(".*"))
    assert main(argv) == 0 and same_weights(begun, whole, 8)  # there is room again
    assert "steps 8, going on at step 4" in capfd.readouterr().out


def test_a_run_folder_that_is_renamed_is_saved_under_its_new_name(tmp_path, digits):
    run, away = tmp_path / "run", tmp_path / "away"
    rename = at_place("step", lambda: run.rename(away), visit=4)
    with Ranks(1, arguments(run, digits, *LONG), output=tmp_path / "out", prepare=rename) as group:
        assert group.wait() == [75], group.text()
    found = status(away)
    assert not run.exists() and found["status"] == "interrupted" and str(away) in found["reason"]
    assert found["step"] == steps_of(away)[-1] == max(rows(away)) >= 4


# runs that end by themselves


@pytest.mark.parametrize("error", [ShardError("gone"), MemoryError("no")], ids=repr)
def test_what_is_done_is_saved_where_a_run_ends_by_itself(begun, whole, digits, monkeypatch, error):
    next_batch = Trainer._next

    def failing(self, stream):
        if self.step == 5:
            raise error
        return next_batch(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next", failing)
        assert trained(begun, digits, 8) in (1, 2)
    found = status(begun)
    assert (steps_of(begun)[-1], found["status"], found["step"]) == (5, "failed", 5)
    assert str(error) in found["reason"]
    assert trained(begun, digits, 8) == 0 and same_weights(begun, whole, 8)


def test_what_an_update_has_left_half_done_is_not_saved(begun, digits, monkeypatch):
    monkeypatch.setattr(loop, "UPDATE_S", 0.1)
    monkeypatch.setattr(Ema, "update", raising(RuntimeError("amid an update")))
    assert trained(begun, digits, 8) == 1
    assert steps_of(begun) == [2, 4] and "amid an update" in status(begun)["reason"]


def test_a_run_of_which_every_update_was_skipped_has_failed(tmp_path, digits):
    nothing = ("likelihood.kind=gaussian", "likelihood.variance=fixed", "likelihood.sigma=1e-40")
    assert trained(tmp_path / "run", digits, 3, *nothing) == 1
    assert "for 3 steps in a row" in status(tmp_path / "run")["reason"]


# kills and launchers


def test_kill_9_costs_at_most_one_interval_and_changes_no_bit(whole, tmp_path, digits):
    run = tmp_path / "run"
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    argv = arguments(run, digits, "training.steps=8", *QUIET)
    for prepare in (at_place("step", kill, visit=6), in_the_middle_of_a_write(kill, after_step=4)):
        with Ranks(1, argv, output=tmp_path / "killed", prepare=prepare) as group:
            assert group.wait() == [-signal.SIGKILL], group.text()
        assert 2 in steps_of(run) or 4 in steps_of(run)
    assert list((run / "checkpoints").glob(".step*"))
    with Ranks(1, argv, output=tmp_path / "last") as group:
        assert group.wait() == [0] and "going on at step" in group.text()
    assert same_weights(run, whole, 8) and torch.equal(losses(run), losses(whole))
    assert not list((run / "checkpoints").glob(".*"))


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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    argv = [*words, *arguments(run, digits, *LONG)]
    with subprocess.Popen(argv, env=environment, cwd=ROOT, **pipes) as process:
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


# what a run begins from, and leaves


def test_a_run_begins_from_the_averaged_weights_of_another(four_steps, tmp_path, digits, capfd):
    run, checkpoint = tmp_path / "run", four_steps / "checkpoints" / "step_00000004"
    assert trained(run, digits, 1, f"init_from={four_steps}", "optimizer.lr=1e-9") == 0
    averages, begun_with = weights(four_steps, 4, "ema"), weights(run, 1)
    for name, value in averages.items():
        torch.testing.assert_close(begun_with[name], value, rtol=0, atol=1e-6)
    for source in (checkpoint, checkpoint / "ema.safetensors"):
        config = vae_dist.config(*arguments(run, digits, f"init_from={source}"))
        found = initial_weights(config, build_vae(config, (28, 28)))
        assert all(torch.equal(found[name], value) for name, value in averages.items())
    other = (f"init_from={four_steps}", "model.latent_channels=4")
    assert trained(tmp_path / "other", digits, 1, *other) == 2
    errors = capfd.readouterr().err
    assert "tensors do not fit this model (there -> here)" in errors
    assert "decoder.linear_in.weight: 784x8 -> 784x4" in errors


def test_the_best_checkpoint_is_kept_and_can_be_used(tmp_path, digits, monkeypatch):
    run, best, row = tmp_path / "run", 4, EvaluationResult.row
    figures = iter([5.0, 3.0, 4.0, 6.0])
    better = lambda self: row(self) | {"eval/neg_elbo_nats": next(figures)}  # noqa: E731
    monkeypatch.setattr(EvaluationResult, "row", better)
    assert trained(run, digits, 8, "evaluation.every=2", "checkpoint.keep_last=1") == 0
    monkeypatch.undo()
    assert steps_of(run) == [best, 8]
    assert (run / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    assert evaluate([f"run={run}", "checkpoint=best"]) == 0
    figures = json.loads((run / f"results_step{best}.json").read_text())["figures"]
    assert figures["rate_nats"] == pytest.approx(rows(run)[best]["eval/rate_nats"], rel=1e-5)


def test_a_checkpoint_is_written_before_its_evaluation_and_then_names_it(
    tmp_path, digits, monkeypatch
):
    run, error = tmp_path / "run", RuntimeError("can't allocate memory")
    with monkeypatch.context() as patch:
        patch.setattr("vae_dist.training.setup.evaluate", raising(error))
        assert trained(run, digits, 4, "evaluation.every=2") == 1
    assert steps_of(run) == [2] and "lower evaluation.batch_size" in status(run)["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next", raising(error))  # once that evaluation is done
        assert trained(run, digits, 4, "evaluation.every=2") == 1
    manifest = json.loads((run / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert manifest["scalars"]["evaluated_step"] == 2
    assert trained(run, digits, 4, "evaluation.every=2") == 0
    assert "train/loss" in rows(run)[2] and "eval/neg_elbo_nats" in rows(run)[2]


def test_dry_run_shows_the_plan_and_leaves_no_folder(tmp_path, digits, capfd):
    words = ("dry_run=true", "optimizer.warmup_steps=70")
    assert main(arguments(tmp_path / "run", digits, *words)) == 0
    output = capfd.readouterr().out
    assert "the last step, 60, comes before optimizer.warmup_steps=70 is reached" in output
    for part in ("parameters", "512 images", "MiB", "1, 2, 4, 8", "nothing was trained"):
        assert part in output
    assert not (tmp_path / "run").exists()
