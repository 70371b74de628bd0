import errno
import json
import shutil
import threading

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.run import checkpoint as checkpoint_module
from vae_dist.run.checkpoint import Checkpoints, CheckpointWriter, TornCheckpoint, load_checkpoint


def tensors(value):
    return {"model": {"w": torch.full((3, 2), value)}, "ema": {"w": torch.full((3, 2), -value)}}


@pytest.fixture
def checkpoints(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.folder.mkdir()
    for step in (10, 20, 30):
        folder.save(step, tensors(step), {"scalars": {"skipped": step}}, keep_last=2)
    return folder


def test_what_is_saved_comes_back_and_the_newest_ones_are_kept(checkpoints, tmp_path):
    folder = checkpoints.folder
    assert checkpoints.steps() == [20, 30] and not list(folder.glob(".*"))
    assert (folder / "latest").read_text() == "step_00000030"
    checkpoints.amend(30, {"scalars": {"skipped": 7}}, best_step=30)
    for step, skipped in ((20, 20), (30, 7)):
        loaded = checkpoints.load(step)
        assert loaded.step == step and loaded.state["scalars"] == {"skipped": skipped}
        for name, sign in (("model", 1), ("ema", -1)):
            assert torch.equal(loaded.tensors[name]["w"], torch.full((3, 2), float(sign * step)))
    chosen = [load_checkpoint(folder, which).step for which in ("20", "latest", "best")]
    assert chosen == [20, 30, 30]
    with pytest.raises(ConfigError, match=r"checkpoint=25.*20, 30"):
        load_checkpoint(folder, "25")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, "latest")


def test_a_torn_checkpoint_falls_back_to_the_one_before(checkpoints, capsys):
    folder = checkpoints.folder / "step_00000030"
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    outside = {"../step_00000020/model.safetensors": weights.stat().st_size}
    for path, content in (
        (weights, weights.read_bytes()[:-1]),
        (weights, b"x" * weights.stat().st_size),
        (weights, None),
        (manifest, manifest.read_bytes()[:-9]),
        (manifest, b'{"step": 30, "files": 7}'),
        (manifest, json.dumps({"step": 30, "files": outside}).encode()),
        (manifest, None),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TornCheckpoint, match="step_00000030"):
            checkpoints.load(30)
        assert checkpoints.load_newest().step == 20
        assert "step_00000030" in capsys.readouterr().err
        checkpoints.save(30, tensors(31), {}, keep_last=2)
        assert checkpoints.load(30).tensors["model"]["w"][0, 0] == 31
    for manifest in checkpoints.folder.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints .* is whole"):
        checkpoints.load_newest()  # a run is not begun anew


def test_checkpoints_behind_a_link_are_refused(checkpoints, tmp_path):
    (tmp_path / "link").symlink_to(checkpoints.folder)
    with pytest.raises(ConfigError, match="link is a link; give the run folder"):
        load_checkpoint(tmp_path / "link", "latest")
    (checkpoints.folder / "step_00000040").symlink_to(checkpoints.folder / "step_00000030")
    assert checkpoints.steps() == [20, 30]


# in training


@pytest.fixture
def writer(checkpoints):
    writer = CheckpointWriter(
        checkpoints, keep_last=2, warn=lambda text: writer.warned.append(text)
    )
    writer.warned = []
    return writer


def written(writer, step, best_step=None, **options):
    writer.submit(step, tensors(step), {"scalars": {}}, best_step=best_step, **options)
    return writer.wait()


def test_training_may_change_the_weights_while_the_disk_is_busy(checkpoints, writer, monkeypatch):
    go_on, save, weights = threading.Event(), checkpoints.save, torch.ones(3)

    def slow(*given, **options):
        assert go_on.wait(10)
        save(*given, **options)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer.submit(40, {"model": {"w": weights}}, {}, best_step=None)
    assert writer.written_step == -1  # it returned, and nothing is written
    weights.zero_()
    go_on.set()
    assert writer.wait() and writer.written_step == 40
    assert torch.equal(checkpoints.load(40).tensors["model"]["w"], torch.ones(3))


def test_a_full_disk_costs_a_warning_and_the_next_one_tries_again(checkpoints, writer, monkeypatch):
    folder = checkpoints.folder

    def full(path, data):
        (folder / ".step_00000050.tmp" / "half").write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert written(writer, 40)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_durably", full)
        assert not written(writer, 50)
    assert not list(folder.glob(".*")) and checkpoints.load_newest().step == 40
    assert written(writer, 60) and checkpoints.steps() == [40, 60] and len(writer.warned) == 1
    shutil.rmtree(folder / "step_00000060")
    writer.amend(60, {"scalars": {}}, best_step=60)
    assert not writer.wait()
    writer.submit(70, {}, {"scalars": object()}, best_step=None)
    assert not writer.wait()
    folder.rename(folder.with_name("away"))  # which is not made again
    assert not written(writer, 70) and not folder.exists()
    reasons = ("No space left", "has no sound manifest", "not JSON serializable", "No such file")
    for step, reason, warning in zip((50, 60, 70, 70), reasons, writer.warned, strict=True):
        assert f"step_{step:08}: " in warning and reason in warning and "last good one" in warning


def test_the_best_one_is_kept_beside_the_newest(checkpoints, writer):
    for step, best in ((40, None), (50, 50), (60, 50), (70, 55), (80, 50)):  # 55: a full disk
        assert written(writer, step, best)
    assert checkpoints.steps() == [50, 70, 80] and checkpoints.best_step() == 50
    assert written(writer, 90)
    writer.amend(90, {"scalars": {}}, best_step=90)
    assert written(writer, 95)
    assert checkpoints.steps() == [90, 95] and checkpoints.best_step() == 90
    for step in (100, 110, 120):  # a streak of skipped steps
        assert written(writer, step, keep_all=True)
    assert checkpoints.steps() == [90, 95, 100, 110, 120]
