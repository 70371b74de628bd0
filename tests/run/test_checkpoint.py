import errno
import json
import os

import pytest
import torch

from vae_dist.config.errors import ConfigError
from vae_dist.run.checkpoint import Checkpoints, TornCheckpoint, load_checkpoint


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3, 2), value)}, "ema": {"w": torch.full((3, 2), -value)}}


@pytest.fixture
def checkpoints(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.folder.mkdir()
    for step in (10, 20, 30):
        folder.save(step, tensors(step), {"scalars": {"skipped": step}}, keep_last=2)
    return folder


def test_what_is_saved_comes_back(checkpoints):
    loaded = checkpoints.load(30)
    assert loaded.step == 30 and loaded.state["scalars"] == {"skipped": 30}
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((3, 2), 30.0))
    assert torch.equal(loaded.tensors["ema"]["w"], torch.full((3, 2), -30.0))


def test_the_newest_ones_are_kept_and_latest_names_the_last(checkpoints):
    assert checkpoints.steps() == [20, 30]
    assert (checkpoints.folder / "latest").read_text() == "step_00000030"
    assert not list(checkpoints.folder.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(checkpoints, capsys, name, damage):
    path = checkpoints.folder / "step_00000030" / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        path.unlink()
    elif name == "manifest.json":
        path.write_bytes(b"{" + data)
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(TornCheckpoint, match="step_00000030"):
        checkpoints.load(30)
    loaded = checkpoints.load_newest()
    assert loaded is not None and loaded.step == 20
    assert "step_00000030" in capsys.readouterr().err


@pytest.mark.parametrize(
    "manifest", ["null", "[]", "[1]", '{"state.json": {}}', '{"state.json": 7}', '{"": {}}', None]
)
def test_a_manifest_of_another_form_is_torn(checkpoints, manifest):
    path = checkpoints.folder / "step_00000030" / "manifest.json"
    if manifest is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(manifest)
    assert checkpoints.load_newest().step == 20


def test_a_file_in_place_of_a_checkpoint_is_torn(checkpoints):
    (checkpoints.folder / "step_00000040").write_text("")
    assert checkpoints.load_newest().step == 30


def test_leftovers_that_cannot_be_removed_stay(checkpoints, monkeypatch):
    def busy(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (checkpoints.folder / ".step_00000007.old").mkdir()
    (checkpoints.folder / ".latest.17.tmp").write_text("")
    monkeypatch.setattr(os, "rmdir", busy)
    monkeypatch.setattr(os, "unlink", busy)
    checkpoints.remove_leftovers()
    assert checkpoints.load_newest().step == 30


def test_a_manifest_cannot_lead_out_of_its_folder(checkpoints):
    path = checkpoints.folder / "step_00000030" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["../../secret"] = manifest["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(TornCheckpoint, match="outside"):
        checkpoints.load(30)


def fail_at_the_rename(monkeypatch, error: BaseException) -> None:
    """Raise where the finished checkpoint would be renamed into place."""
    rename = os.replace

    def failing(source, target):
        source_name, target_name = os.path.basename(source), os.path.basename(target)
        if source_name.endswith(".tmp") and target_name.startswith("step_"):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)


def test_a_kill_before_the_rename_costs_nothing(checkpoints, monkeypatch):
    fail_at_the_rename(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(40, tensors(40), {}, keep_last=1)
    monkeypatch.undo()
    newest = checkpoints.load_newest()
    assert newest is not None and newest.step == 30
    checkpoints.remove_leftovers()
    assert not list(checkpoints.folder.glob(".*"))


def test_a_kill_while_a_step_is_saved_again_loses_neither(checkpoints, monkeypatch):
    fail_at_the_rename(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(30, tensors(31), {}, keep_last=2)
    monkeypatch.undo()
    checkpoints.remove_leftovers()
    assert checkpoints.steps() == [20, 30]
    assert checkpoints.load(30).tensors["model"]["w"][0, 0] == 30


def test_a_disk_that_fails_while_a_step_is_saved_again_keeps_it(checkpoints, monkeypatch):
    fail_at_the_rename(monkeypatch, OSError("no space left"))
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(30, tensors(31), {}, keep_last=2)
    monkeypatch.undo()
    assert checkpoints.load(30).tensors["model"]["w"][0, 0] == 30


def test_saving_a_step_again_replaces_a_torn_one(checkpoints):
    (checkpoints.folder / "step_00000030" / "state.json").unlink()
    checkpoints.save(30, tensors(31), {}, keep_last=2)
    assert checkpoints.load(30).tensors["model"]["w"][0, 0] == 31


def test_choosing_a_checkpoint(checkpoints, tmp_path):
    assert load_checkpoint(checkpoints.folder, "20").step == 20
    assert load_checkpoint(checkpoints.folder, "latest").step == 30
    with pytest.raises(ConfigError, match=r"checkpoint=25.*20, 30"):
        load_checkpoint(checkpoints.folder, "25")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, "latest")


def test_a_best_one_that_was_never_written_costs_the_one_before_nothing(checkpoints):
    checkpoints.save(40, tensors(40), {}, keep_last=1, best_step=40)
    checkpoints.save(60, tensors(60), {}, keep_last=1, best_step=50)  # 50: the disk was full
    assert checkpoints.steps() == [40, 60] and checkpoints.best_step() == 40
    checkpoints.save(70, tensors(70), {}, keep_last=1, best_step=70)
    assert checkpoints.steps() == [70] and checkpoints.best_step() == 70
