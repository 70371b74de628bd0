import errno
import shutil
import threading

import pytest
import torch

from vae_dist.run.checkpoint import Checkpoints
from vae_dist.training.saving import CheckpointWriter


class Warnings(list):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(tmp_path / "checkpoints")


def writer(checkpoints: Checkpoints) -> tuple[CheckpointWriter, Warnings]:
    warnings = Warnings()
    return CheckpointWriter(checkpoints, keep_last=2, warn=warnings), warnings


def submit(one: CheckpointWriter, step: int, best_step: int | None = None) -> None:
    tensors = {"model": {"w": torch.full((3,), float(step))}}
    one.submit(step, tensors, {"scalars": {}}, best_step=best_step)


def test_training_may_change_the_weights_while_the_disk_is_busy(checkpoints, monkeypatch):
    one, warnings = writer(checkpoints)
    go_on = threading.Event()
    save = checkpoints.save

    def slow(*args, **kwargs):
        assert go_on.wait(10)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", slow)
    weights = torch.ones(3)
    one.submit(5, {"model": {"w": weights}}, {"scalars": {}}, best_step=None)
    assert one.written_step == -1  # it returned, and nothing is written
    weights.zero_()
    go_on.set()
    assert one.wait() and one.written_step == 5 and not warnings
    assert torch.equal(checkpoints.load(5).tensors["model"]["w"], torch.ones(3))
    assert one.stall_s < 5


def test_a_full_disk_costs_a_warning_and_the_next_one_tries_again(checkpoints, monkeypatch):
    one, warnings = writer(checkpoints)
    submit(one, 10)
    assert one.wait()

    def full(path, data):
        (checkpoints.folder / ".step_00000020.tmp" / "half").write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vae_dist.run.checkpoint.write_durably", full)
    submit(one, 20)
    assert not one.wait() and one.failures == 1
    assert "step_00000020: No space left" in warnings[0] and "step_00000010" in warnings[0]
    assert checkpoints.steps() == [10] and not list(checkpoints.folder.glob(".*"))
    assert checkpoints.load_newest().step == 10
    monkeypatch.undo()
    submit(one, 30)
    assert one.wait() and checkpoints.steps() == [10, 30] and len(warnings) == 1


def test_a_disk_that_hangs_costs_checkpoints_but_not_the_run(checkpoints, monkeypatch):
    one, warnings = writer(checkpoints)
    monkeypatch.setattr("vae_dist.training.saving.PATIENCE_S", 0.02)
    go_on, save = threading.Event(), checkpoints.save

    def hanging(*args, **kwargs):
        go_on.wait(10)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", hanging)
    submit(one, 10)
    submit(one, 20)
    monkeypatch.setattr("vae_dist.training.saving.PATIENCE_S", 600)
    submit(one, 30)  # training has waited long enough
    assert len(warnings) == 2 and "step_00000020 is left out" in warnings[0]
    go_on.set()
    assert one.wait() and one.written_step == 10
    submit(one, 40)
    assert one.wait() and checkpoints.steps() == [10, 40]


def test_a_folder_that_is_gone_is_not_made_again_elsewhere(checkpoints, tmp_path):
    one, warnings = writer(checkpoints)
    submit(one, 10)
    one.wait()
    checkpoints.folder.rename(tmp_path / "away")
    submit(one, 20)
    one.wait()
    assert "No such file" in warnings[0] and not checkpoints.folder.exists()
    (tmp_path / "away").rename(checkpoints.folder)
    submit(one, 30)
    assert one.wait() and checkpoints.steps() == [10, 30]


def test_a_failure_is_said_without_waiting_for_the_next_checkpoint(checkpoints):
    one, warnings = writer(checkpoints)
    shutil.rmtree(checkpoints.folder)
    submit(one, 10)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    one.poll()
    assert len(warnings) == 1 and "there is none before it" in warnings[0]


def test_what_is_no_disk_problem_is_an_error(checkpoints):
    one, _ = writer(checkpoints)
    one.submit(10, {}, {"scalars": object()}, best_step=None)
    with pytest.raises(TypeError):
        one.wait()


def test_the_best_one_is_kept_beside_the_newest(checkpoints):
    one, _ = writer(checkpoints)
    for step, best in ((10, None), (20, 20), (30, 20), (40, 20), (50, 20)):
        submit(one, step, best)
    one.wait()
    assert checkpoints.steps() == [20, 40, 50] and checkpoints.best_step() == 20
    submit(one, 60, 60)
    one.wait()
    assert checkpoints.steps() == [50, 60] and checkpoints.best_step() == 60
