"""`vae_dist.train` as a user meets it: what it refuses, what it survives, what it leaves behind."""

import functools
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
from tests.support.faults import at_place, in_the_middle_of_a_write, run_command, signal_oneself
from tests.support.tiny_run import random_pixels, write_images
from tests.support.training import arguments, losses, rows, same_weights, status, weights
from vae_dist.data.tar import ShardError
from vae_dist.evaluate import main as evaluate
from vae_dist.evaluation.run import EvaluationResult
from vae_dist.models.build import build_vae
from vae_dist.run.checkpoint import load_checkpoint
from vae_dist.run.resume import initial_weights
from vae_dist.tracking.sinks import JsonlSink, read_rows
from vae_dist.train import main
from vae_dist.training import loop
from vae_dist.training.images import ImageLogger
from vae_dist.training.loop import Trainer
from vae_dist.training.optimizer import Ema

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("evaluation.every=0", "checkpoint.every=2", "optimizer.schedule=constant")
DEEP = "model.latent=spatial likelihood.kind=gaussian model.channels=[8,8,8,8]"
LONG = (*QUIET, "training.steps=100000")
SPATIAL = (
    *("training.steps=4", "optimizer.warmup_steps=1", "evaluation.every=0"),
    *("model.latent=spatial", "model.latent_channels=3", "likelihood.kind=gaussian"),
)
ADVERSARIAL = (
    *("adversarial.weight=0.5", "adversarial.warmup_steps=1"),
    *("adversarial.channels=8", "adversarial.layers=2"),
)


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


@pytest.mark.parametrize(
    ("keys", "env", "said"),
    [
        ("", "WORLD_SIZE=3 RANK=0", "3 processes|1, 2, 4, 8."),
        ("", "EXPECTED_WORLD_SIZE=2", "WORLD_SIZE=1"),
        ("data.train={digits}/train/images-{{000000..000009}}.tar", "", "2 of 10 shards are"),
        ("data.train={digits}", "", "holds no *.tar|there are some in|/train, "),
        ("run=/proc/run", "", "cannot be written"),
        ("init_from={tmp}/none", "", "no run folder, checkpoint folder, .safetensors file"),
        (f"{DEEP} adversarial.weight=0.5 adversarial.layers=4", "", "layers=4 needs images of 48"),
        (f"{DEEP} objective.scale_equivariance=0.5", "", "scale_equivariance needs images of 32"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, digits, capfd, monkeypatch, keys, env, said):
    for setting in env.split():
        monkeypatch.setenv(*setting.split("="))
    words = keys.format(digits=digits, tmp=tmp_path).split()
    assert main(arguments(tmp_path / "run", digits, *words)) == 2
    errors = capfd.readouterr().err
    assert all(part in errors for part in said.split("|")), errors
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


def test_corrupt_samples_are_replaced_counted_and_named_up_to_a_limit(tmp_path, digits, capfd):
    run, damaged, pixels = tmp_path / "run", tmp_path / "damaged", random_pixels(512, 28, 28)
    pixels[138:150] = 0  # written as no PNG
    write_images(damaged / "train", pixels, num_shards=8)
    write_images(damaged / "validation", pixels[:256])
    epoch = 512 // 16 + 1  # steps, in which each of them comes up
    assert trained(run, damaged, epoch, "data.max_skipped_fraction=0.05") == 0
    assert rows(run)[epoch]["data/skipped_samples"] == 12
    assert rows(run)[epoch]["eval/num_images"] == 244
    output = capfd.readouterr().out
    assert "images-000002.tar sample 17" in output and "in its place" in output
    assert trained(run, damaged, epoch + 1, "data.max_skipped_fraction=0.05") == 0
    assert rows(run)[epoch + 1]["data/skipped_samples"] >= 12  # those before it stopped count
    assert trained(tmp_path / "other", damaged, epoch, "data.max_skipped_fraction=0.02") == 1
    assert "data.max_skipped_fraction" in status(tmp_path / "other")["reason"]
    shutil.copytree(digits, damaged, dirs_exist_ok=True)  # repaired: it counts anew
    options = ("data.max_skipped_fraction=0.02", "resume.allow_changes=true")
    assert trained(tmp_path / "other", damaged, epoch, *options) == 0


def test_trackers_are_closed_where_the_model_cannot_be_built(tmp_path, digits, monkeypatch):
    """An open W&B run would be ended by wandb's own exit hook, which has no time limit."""
    closed, fails = [], raising(ValueError("no model"))
    monkeypatch.setattr("vae_dist.training.setup.build_trainer", fails)
    monkeypatch.setattr(JsonlSink, "close", lambda self, status: closed.append(status))
    assert trained(tmp_path / "run", digits, 2) == 1
    assert closed == ["failed"] and status(tmp_path / "run")["reason"] == "ValueError: no model"


def test_a_disk_that_takes_no_checkpoint_leaves_the_run_alive(begun, whole, digits, capfd):
    argv = arguments(begun, digits, "training.steps=8", *QUIET)
    largest = resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)  # file: as of a full disk
    assert run_command(1, argv, prepare=lambda rank: resource.setrlimit(*largest)) == [1]
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
    assert run_command(1, arguments(run, digits, *LONG), prepare=rename) == [75]
    found = status(away)
    assert not run.exists() and found["status"] == "interrupted" and str(away) in found["reason"]
    assert found["step"] == steps_of(away)[-1] == max(rows(away)) >= 4


@pytest.mark.parametrize(
    ("owner", "name", "error", "saved"),
    [
        (Trainer, "_next", ShardError("gone"), 5),
        (Trainer, "_next", MemoryError("no"), 5),
        (Ema, "update", RuntimeError("amid an update"), 4),  # its step is half done
    ],
)
def test_what_is_done_is_saved_where_a_run_ends_by_itself(
    begun, whole, digits, monkeypatch, owner, name, error, saved
):
    function, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(name)
        if len(calls) == 2:
            raise error
        return function(*arguments, **options)

    monkeypatch.setattr(loop, "UPDATE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        assert trained(begun, digits, 8) in (1, 2)
    found = status(begun)
    assert (steps_of(begun)[-1], found["status"], found["step"]) == (saved, "failed", saved)
    assert str(error) in found["reason"]
    assert trained(begun, digits, 8) == 0 and same_weights(begun, whole, 8)


def test_a_run_of_which_every_update_was_skipped_has_failed(tmp_path, digits):
    nothing = ("likelihood.kind=gaussian", "likelihood.variance=fixed", "likelihood.sigma=1e-40")
    assert trained(tmp_path / "run", digits, 3, *nothing) == 1
    assert "for 3 steps in a row" in status(tmp_path / "run")["reason"]


def test_kill_9_costs_at_most_one_interval_and_changes_no_bit(whole, tmp_path, digits, capfd):
    run = tmp_path / "run"
    kill = functools.partial(signal_oneself, signal.SIGKILL)
    argv = arguments(run, digits, "training.steps=8", *QUIET)
    for prepare in (at_place("step", kill, visit=6), in_the_middle_of_a_write(kill, after_step=4)):
        assert run_command(1, argv, prepare=prepare) == [-signal.SIGKILL]
        assert 2 in steps_of(run) or 4 in steps_of(run)
    assert list((run / "checkpoints").glob(".step*"))
    assert run_command(1, argv) == [0] and "going on at step" in capfd.readouterr().out
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
    more = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    argv = [*words, *arguments(run, digits, *LONG)]
    with subprocess.Popen(argv, env=os.environ | more, cwd=ROOT, **pipes) as process:
        while len(list(read_rows(run / "log.jsonl"))) < 4 and process.poll() is None:
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


def test_the_best_checkpoint_is_kept_and_grids_may_fail(tmp_path, digits, capfd, monkeypatch):
    run, best, row = tmp_path / "run", 4, EvaluationResult.row
    figures = iter([5.0, 3.0, 4.0, 6.0])
    better = lambda self: row(self) | {"eval/neg_elbo_nats": next(figures)}  # noqa: E731
    monkeypatch.setattr(EvaluationResult, "row", better)
    monkeypatch.setattr(ImageLogger, "__call__", raising(torch.OutOfMemoryError("no memory")))
    assert trained(run, digits, 8, "evaluation.every=2", "checkpoint.keep_last=1") == 0
    assert "no images (no memory)" in capfd.readouterr().out
    monkeypatch.undo()
    assert steps_of(run) == [best, 8]
    assert (run / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    assert evaluate([f"run={run}", "checkpoint=best"]) == 0
    figures = json.loads((run / f"results_step{best}.json").read_text())["figures"]
    assert figures["rate_nats"] == pytest.approx(rows(run)[best]["eval/rate_nats"], rel=1e-5)


def test_a_checkpoint_is_written_before_its_evaluation_and_names_it(tmp_path, digits, monkeypatch):
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
    monkeypatch.setattr(Trainer, "summary", raising(error))
    assert trained(run, digits, 4, "evaluation.every=2") == 1
    assert status(run)["status"] == "finished"  # what fails after the end does not change it
    assert "train/loss" in rows(run)[2] and "eval/neg_elbo_nats" in rows(run)[2]


def test_a_discriminator_that_joins_a_run_learns_before_it_is_heard(tmp_path, digits, capfd):
    run = tmp_path / "run"
    assert main(arguments(run, digits, *SPATIAL)) == 0
    more = (*ADVERSARIAL, "adversarial.warmup_steps=2", "resume.allow_changes=true")
    keys = arguments(run, digits, *SPATIAL, *more, "training.steps=8")
    assert main(keys) == 2
    words = "step 4 has no discriminator, and adversarial.start_step=0 lies before it"
    assert words in capfd.readouterr().err
    assert main([*keys, "adversarial.start_step=4"]) == 0
    assert "train/discriminator_loss" in rows(run)[5]
    assert rows(run)[6]["optim/adversarial_weight"] == 0 < rows(run)[8]["optim/adversarial_weight"]


def test_a_decoder_is_fine_tuned_with_the_discriminator_of_the_first_stage(tmp_path, digits, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    both = (*SPATIAL, *ADVERSARIAL, "training.steps=2")
    assert main(arguments(first, digits, *both)) == 0
    fine_tuned = (*both, f"init_from={first}", "training.train_only=decoder")
    assert main(arguments(second, digits, *fine_tuned)) == 0
    assert f"discriminator: that of {first}" in capfd.readouterr().out
    before, after = weights(first, 2, "ema"), weights(second, 2)
    for name, value in before.items():
        is_kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, after[name]) == is_kept, name
    assert before.keys() == after.keys() and rows(second)[2]["train/adversarial"] != 0
    stored = load_checkpoint(first / "checkpoints", "latest").tensors["discriminator"]

    def begun_with(*keys):
        config = vae_dist.config(*arguments(second, digits, *SPATIAL, f"init_from={first}", *keys))
        weights = initial_weights(config, build_vae(config, (28, 28)))
        return {k: v for k, v in weights.items() if k.startswith("discriminator/")}

    found = begun_with(*ADVERSARIAL)
    assert found and found.keys() == {f"discriminator/{name}" for name in stored}
    assert all(torch.equal(found[f"discriminator/{name}"], v) for name, v in stored.items())
    for keys in ((*ADVERSARIAL, "adversarial.channels=16"), ()):  # of another shape, or none
        assert not begun_with(*keys)
