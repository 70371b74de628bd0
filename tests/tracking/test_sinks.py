"""log.jsonl over resumes, kills and full disks; TensorBoard over resumes."""

import json
import math
import resource
import sys
from pathlib import Path

import pytest
from PIL import Image

from vae_dist.config.errors import ConfigError
from vae_dist.tracking.images import save_png
from vae_dist.tracking.sinks import JsonlSink, TensorBoardSink, read_rows


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_cuts_later_rows_and_lines_that_are_no_row(tmp_path):
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path, resume_step=0)
    for step in range(1, 8):
        sink.log(step, {"train/loss": step / 2})
    sink.close("interrupted")
    inode = path.stat().st_ino
    JsonlSink(path, resume_step=7).close("finished")
    assert path.stat().st_ino == inode  # a clean log is not rewritten
    with path.open("ab") as file:
        file.write(b"\0\0\xff\0\n[1]\n{}\n" + b"[" * 10**5 + b'\n{"step": 3, "train/lo')
    for _ in range(2):  # killed before the checkpoint that follows, both are made up again
        sink = JsonlSink(path, resume_step=4)
        sink.log(4, {"eval/loss": 0.5, "eval/best": math.nan})  # joins the row of its step
        sink.log(5, {"train/loss": math.nan, "optim/grad_norm": math.inf, "optim/lr": 0.1})
        for _ in range(2):
            sink.close("finished")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    assert rows(path)[3] == {"step": 4, "train/loss": 2.0, "eval/loss": 0.5, "eval/best": None}
    last = '{"step": 5, "train/loss": null, "optim/grad_norm": null, "optim/lr": 0.1}\n'
    assert path.read_text().endswith("\n" + last)


def test_rows_wait_for_a_full_disk_and_come_in_order(tmp_path):
    """The kernel refuses to let a file grow beyond a limit, as a full disk does."""
    path = tmp_path / "log.jsonl"
    sink, before = JsonlSink(path, resume_step=0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # a row has some 30 bytes
    try:
        for step in (1, 2, 3):
            sink.log(step, {"train/loss": step / 2})
        for step in range(4, 501):  # more than the buffer of a file holds
            with pytest.raises(OSError):
                sink.log(step, {"train/loss": step / 2})
        assert path.stat().st_size == 100  # the last row is torn
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.log(501, {"train/loss": 5.5})
    sink.close("finished")
    assert [row["step"] for row in rows(path)] == list(range(1, 502))


def test_whole_rows_of_a_log_that_is_being_written(tmp_path):
    log = tmp_path / "log.jsonl"
    assert list(read_rows(log)) == list(read_rows(Path("/dev/zero"))) == []
    log.write_text('{"step": 1, "a": 2}\n[3]\n{"a": 1}\n{"step": 2, "a": NaN}\n{"step": 3, "a"')
    assert list(read_rows(log)) == [(1, {"a": 2}), (2, {"a": None})]


@pytest.mark.slow
@pytest.mark.parametrize("resume_step", [20, 0])  # 0: killed before its first checkpoint
def test_tensorboard_has_each_point_of_a_resumed_run_once(tmp_path, resume_step):
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="needs the extra tensorboard")
    png = save_png(Image.new("L", (8, 8)), tmp_path / "grid.png")
    for session, first in ((1.0, 0), (2.0, resume_step)):
        sink = TensorBoardSink(tmp_path / "tensorboard", resume_step=first)
        for step in range(first + 10, 41, 10):
            kl = [[0.0, 1.0], [math.nan], [math.inf, 1e30]][step % 3]
            sink.log(step, {"train/loss": session, "latent/kl_nats_per_unit": kl})
        sink.image(40, "images/samples", png, "")
        for _ in range(2):
            sink.close("finished")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, 2.0 if step > resume_step else 1.0) for step in (10, 20, 30, 40)]
    assert events.Tags()["images"] == ["images/samples"]
    assert events.Tags()["histograms"] == ["latent/kl_nats_per_unit"]


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'vae_dist\[tensorboard\]'"):
        TensorBoardSink(tmp_path, resume_step=0)
