"""`vae_dist.train` as a user meets it: what it refuses, what it survives, what it leaves behind."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import LAUNCHER_VARIABLES, run_ranks
from tests.support.training import arguments, rows, same_weights, status, train
from vae_dist.data.index import ShardIndex, load_index
from vae_dist.data.reader import SampleReader
from vae_dist.data.tar import ShardError
from vae_dist.distributed import load_full
from vae_dist.models.blocks import Block
from vae_dist.models.conv import Decoder, Encoder
from vae_dist.run.checkpoint import Checkpoints
from vae_dist.run.folder import RunFolder
from vae_dist.tracking.sinks import JsonlSink
from vae_dist.train import main
from vae_dist.training.images import ImageLogger

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


def start(argv: list[str], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**changes),
        cwd=ROOT,
    )


def wait_for_row(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until log.jsonl has a row of that step."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (run / "log.jsonl").exists() and f'"step": {step},' in (run / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no row of step {step}: {process.communicate()[0]}")


# what is refused, before anything is trained


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.larning_rate=1e-3", "optimizer.larning_rate"),
        ("optimizer.lrr=1e-3", "did you mean optimizer.lr"),
        ("training.steps=many", "training.steps=many is not a whole number"),
        ("model.latent=vektor", "did you mean vector"),
        ("training.batch_size=60", "training.batch_size=60 is not a multiple of data.slots=16"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, digits, capfd, override, message):
    assert main(arguments(tmp_path / "run", digits, override)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_problems_are_reported_at_once(tmp_path, digits, capfd):
    assert main(arguments(tmp_path / "run", digits, "sed=1", "log.every=x")) == 2
    errors = capfd.readouterr().err
    assert "sed" in errors and "log.every=x" in errors


def test_a_missing_shard_is_named(tmp_path, digits, capfd):
    override = f"data.train={digits}/train/train-{{000000..000009}}.tar"
    assert train(tmp_path / "run", digits, override) == [2]
    errors = capfd.readouterr().err
    assert "2 of 10 shards are missing" in errors and "train-000009.tar" in errors


def test_a_folder_without_shards_is_refused(tmp_path, digits, capfd):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "run", digits, f"data.train={tmp_path}/empty") == [2]
    assert "holds no *.tar" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_refused(tmp_path, digits, capfd):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run", digits) == [2]
    assert "cannot be written" in capfd.readouterr().err


def test_a_number_of_processes_that_does_not_divide_the_slots_is_refused(
    tmp_path, digits, capfd, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(arguments(tmp_path / "run", digits)) == 2
    errors = capfd.readouterr().err
    assert "3 processes" in errors and "data.slots=16" in errors and "1, 2, 4, 8, 16" in errors


def test_slots_of_the_run_that_do_not_fit_the_processes_are_refused(tmp_path, digits, capfd):
    run = tmp_path / "run"
    options = ("data.slots=1", "evaluation.every=0")
    assert train(run, digits, "training.steps=2", *options) == [0]
    without_slots = arguments(run, digits, "training.steps=4", "evaluation.every=0", "data.slots=0")
    assert run_ranks(2, main, without_slots, timeout_s=100) == [2, 2]
    errors = capfd.readouterr().err
    assert f"run={run}: 2 processes cannot share data.slots=1" in errors
    assert status(run)["status"] == "finished"


def test_another_batch_size_gets_slots_that_divide_it(tmp_path, digits, capfd):
    run = tmp_path / "run"
    options = ("data.slots=0", "evaluation.every=0")
    assert train(run, digits, "training.steps=2", "training.batch_size=64", *options) == [0]
    changed = ("training.steps=4", "training.batch_size=96", "resume.allow_changes=true")
    assert train(run, digits, *changed, *options) == [0]
    assert status(run)["step"] == 4


def test_a_disk_that_refuses_the_last_checkpoint_once_does_not_fail_the_run(
    tmp_path, digits, monkeypatch
):
    save, refused = Checkpoints.save, []

    def failing_once(self: Checkpoints, step: int, *arguments: Any, **options: Any) -> Path:
        if step == 4 and not refused:
            refused.append(step)
            raise OSError(5, "Input/output error")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", failing_once)
    options = ("training.steps=4", "evaluation.every=0", "checkpoint.every=2")
    assert main(arguments(tmp_path / "run", digits, *options)) == 0
    assert refused and RunFolder(tmp_path / "run").checkpoints.steps()[-1] == 4


def test_processes_that_cannot_find_each_other_are_refused(tmp_path, digits, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(tmp_path / "run", digits)) == 2
    errors = capfd.readouterr().err
    assert "each would train alone" in errors and "--num_processes 2" in errors


def test_a_changed_config_is_refused_with_the_differences(tmp_path, digits, capfd):
    run = tmp_path / "run"
    assert train(run, digits, "training.steps=4", "evaluation.every=0") == [0]
    changed = ("training.steps=6", "evaluation.every=0", "optimizer.lr=0.5", "log.every=2")
    assert train(run, digits, *changed) == [2]
    errors = capfd.readouterr().err
    assert "optimizer.lr: 0.001 -> 0.5" in errors and "log.every" not in errors
    assert train(run, digits, *changed, "resume.allow_changes=true") == [0]
    assert status(run)["step"] == 6


def test_a_model_that_does_not_fit_the_weights_leaves_the_run_as_it_was(tmp_path, digits, capfd):
    run = tmp_path / "run"
    options = ("training.steps=4", "evaluation.every=0")
    assert train(run, digits, *options) == [0]
    before = (run / "config.yaml").read_text()
    changed = ("training.steps=6", "model.latent_channels=9", "resume.allow_changes=true")
    assert train(run, digits, *changed) == [2]
    assert "do not fit this config's model" in capfd.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_of_weights_that_do_not_fit_some_are_named():
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(20))
    with pytest.raises(RuntimeError, match=r"0\.bias: None -> \(2,\); .*; and 32 more$"):
        load_full(model, {})


def test_other_shards_under_an_old_run_are_refused(tmp_path, digits, capfd):
    run, copy = tmp_path / "run", tmp_path / "digits"
    shutil.copytree(digits, copy)
    assert train(run, copy, "training.steps=4", "evaluation.every=0") == [0]
    (copy / "train" / "train-000003.tar").unlink()
    assert train(run, copy, "training.steps=6", "evaluation.every=0") == [2]
    assert "not those that the run began with" in capfd.readouterr().err


# what is survived


def damage_png(index: ShardIndex, shard: int, sample: int) -> None:
    """Zero the middle of one sample's PNG, under its header, so that only decoding notices."""
    start, end = index.offsets(shard, sample, sample + 1)
    with open(index.paths[shard], "r+b") as file:
        data = file.read(int(end))
        file.seek(data.index(b"IDAT", int(start)) + 8)
        file.write(bytes(60))


def test_a_corrupt_png_is_replaced_counted_and_named(tmp_path, digits, capfd):
    copy, run = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, copy)
    index = load_index(str(copy / "train"), key="data.train", create=False)
    for sample in range(100, 130):
        damage_png(index, 2, sample)
    steps = index.num_samples // 64 + 1  # an epoch, so that each of them comes up
    assert train(run, copy, f"training.steps={steps}", "log.every=20", "evaluation.every=0") == [0]
    assert rows(run)[steps]["data/skipped_samples"] == 30
    output = capfd.readouterr().out
    assert "train-000002.tar sample 117" in output and "in its place" in output


def test_too_many_corrupt_samples_stop_the_run(tmp_path, digits, capfd):
    copy, run = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, copy)
    index = load_index(str(copy / "train"), key="data.train", create=False)
    for sample in range(600):
        damage_png(index, 1, sample)
    assert train(run, copy, "evaluation.every=0", "data.max_skipped_fraction=0.002") == [1]
    assert "data.max_skipped_fraction" in status(run)["reason"]
    assert status(run)["status"] == "failed"
    assert "failed" in capfd.readouterr().out


def test_a_torn_newest_checkpoint_falls_back_and_the_end_is_the_same(tmp_path, digits, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ("evaluation.every=0", "checkpoint.every=4")
    assert train(whole, digits, "training.steps=12", *options) == [0]
    shutil.copytree(whole, run)
    torn = run / "checkpoints" / "step_00000012" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert train(run, digits, "training.steps=12", *options) == [0]
    assert "step_00000012/optimizer.safetensors is torn" in capfd.readouterr().err
    assert same_weights(run, whole, 12)
    assert sorted(rows(run)) == list(range(1, 13))


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tmp_path, digits, capfd):
    run = tmp_path / "run"
    assert train(run, digits, "training.steps=4", "evaluation.every=0") == [0]
    (run / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    assert train(run, digits, "training.steps=4", "evaluation.every=0") == [2]
    assert "none of the 1 checkpoints" in capfd.readouterr().err
    assert sorted(rows(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "error", [OSError("no space left"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
def test_pictures_that_cannot_be_drawn_do_not_stop_a_run(
    tmp_path, digits, capfd, monkeypatch, error
):
    def full(self: ImageLogger, *arguments: object) -> None:
        raise error

    monkeypatch.setattr(ImageLogger, "__call__", full)
    assert train(tmp_path / "run", digits, "training.steps=4") == [0]
    assert "no images" in capfd.readouterr().out
    assert "eval/neg_elbo_nats" in rows(tmp_path / "run")[4]


def test_trackers_are_closed_where_the_model_cannot_be_built(tmp_path, digits, monkeypatch):
    """An open W&B run would be ended by wandb's own exit hook, which has no time limit."""
    closed: list[str] = []

    def fails(*arguments: object) -> None:
        raise ValueError("no model")

    monkeypatch.setattr("vae_dist.training.setup.build_trainer", fails)
    monkeypatch.setattr(JsonlSink, "close", lambda self, status: closed.append(status))
    assert main(arguments(tmp_path / "run", digits)) == 1
    assert closed == ["failed"]
    assert status(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(("value", "parts"), [("true", (Encoder, Decoder)), ("blocks", (Block,))])
def test_what_is_compiled_is_what_was_asked_for(tmp_path, digits, capfd, monkeypatch, value, parts):
    asked = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.add(type(self)))
    words = ("training.steps=1", "training.precision=no", f"runtime.compile={value}")
    assert main(arguments(tmp_path / "run", digits, *words)) == 0
    assert asked and all(issubclass(kind, parts) for kind in asked)
    assert ("compiled block by block" in capfd.readouterr().out) == (value == "blocks")


def test_damaged_validation_images_are_left_out(tmp_path, digits):
    copy, run = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, copy)
    index = load_index(str(copy / "validation"), key="data.validation", create=False)
    for sample in range(2):
        damage_png(index, 0, sample)
    assert train(run, copy, "training.steps=4", "log.num_images=4") == [0]
    assert rows(run)[4]["eval/num_images"] == 998


def test_an_error_of_one_rank_is_told_by_that_rank(tmp_path, digits, capfd, monkeypatch):
    read, reads = SampleReader.read, itertools.count()

    def vanishing(self: SampleReader, *run: int) -> list[bytes]:
        if os.environ["RANK"] == "1" and next(reads) > 40:  # after the first windows
            raise ShardError("train-000005.tar: cannot be read")
        return read(self, *run)

    monkeypatch.setattr(SampleReader, "read", vanishing)
    assert train(tmp_path / "run", digits, world=2) == [1, 2]
    assert "rank 1: train-000005.tar" in capfd.readouterr().err
    assert "rank 1: train-000005.tar" in status(tmp_path / "run")["reason"]


def test_kill_9_costs_at_most_one_interval_and_changes_no_bit(tmp_path, digits):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ("training.steps=60", "checkpoint.every=10", "evaluation.every=30")
    assert train(whole, digits, *options) == [0]
    command = ["-m", "vae_dist.train", *arguments(run, digits, *options)]
    for step in (3, 27):
        process = start(command)
        wait_for_row(run, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "going on at step" in output  # it went on, it did not begin anew
    assert same_weights(run, whole, 60)
    assert [rows(run)[k]["train/loss"] for k in range(1, 61)] == [
        rows(whole)[k]["train/loss"] for k in range(1, 61)
    ]


def test_a_second_trainer_in_one_folder_is_refused(tmp_path, digits, capfd):
    run = tmp_path / "run"
    long = ("training.steps=100000", "evaluation.every=0", "checkpoint.every=0")
    first = start(["-m", "vae_dist.train", *arguments(run, digits, *long)])
    try:
        wait_for_row(run, 1, first)
        assert train(run, digits, *long) == [2]
        assert f"in use by process {first.pid}" in capfd.readouterr().err
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=60)
        assert first.returncode == 75, output
        assert "goes on from there" in output and status(run)["status"] == "interrupted"
    finally:
        first.kill()
        first.communicate()


# other ways in


def test_accelerate_launch_trains_one_model_on_two_processes(tmp_path, digits):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = arguments(run, digits, "training.steps=6", "evaluation.every=0")
    process = start([*launch, "--main_process_port", "0", "-m", "vae_dist.train", *options])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "on 2 x cpu" in output and sorted(rows(run)) == list(range(1, 7))


def test_dry_run_shows_the_plan_and_leaves_no_folder(tmp_path, digits, capfd):
    assert train(tmp_path / "run", digits, "dry_run=true", "optimizer.warmup_steps=70") == [0]
    output = capfd.readouterr().out
    assert "the last step, 60, comes before the end of optimizer.warmup_steps=70" in output
    assert "the run ends within its first epoch, after 3,840 of 9,000 images" in output
    for part in ("parameters", "9,000 images", "60", "MiB", "1, 2, 4, 8", "nothing was trained"):
        assert part in output
    assert not (tmp_path / "run").exists()


def test_help_lists_every_key_without_importing_torch():
    code = (
        "import sys; from vae_dist.train import main; main(['--help']); "
        "assert 'torch' not in sys.modules"
    )
    process = start(["-c", code])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "optimizer.lr" in output and "data.slots" in output
