from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vae_dist.config.errors import ConfigError
from vae_dist.data.index import load_index
from vae_dist.data.indexing import write_info
from vae_dist.packing import jobs
from vae_dist.packing.jobs import Count, FinishedElsewhere, ShardJob, cut, run

PLAN = {"seed": 0, "pictures": "a digest"}
SHARDS = [f"s-{k:06d}.tar" for k in range(6)]


def write(job: ShardJob, name: str, count: Count = lambda number: None) -> None:
    with job.shard(name) as (writer, report):
        for i in range(3):
            writer.write({"__key__": f"{i}", "txt": f"{name} {i}".encode()})
            count(1)
        report["samples"] = 3


def complete(job: ShardJob) -> dict[str, Any]:
    def describe() -> dict[str, Any]:
        reports = [job.report(name) for name in SHARDS]
        write_info([job.out / name for name in SHARDS], split="s")
        return {"samples": sum(report["samples"] for report in reports)}

    return job.finish(describe)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return begun(tmp_path / "out")


def begun(out: Path) -> ShardJob:
    job = ShardJob(out, "done.json", PLAN)
    assert job.finished() is None
    job.begin()
    return job


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_job_is_shards_index_and_summary(job: ShardJob) -> None:
    for name in SHARDS:
        write(job, name)
    assert complete(job) == {"samples": 18, "identity": PLAN} == job.finished()
    assert not job.work.exists()
    assert load_index(str(job.out), key="data", create=False).num_samples == 18
    with pytest.raises(ConfigError, match=r"out=.*: made with another seed \(0 there, 1 here\)"):
        ShardJob(job.out, "done.json", {**PLAN, "seed": 1}).finished()
    (job.out / "done.json").write_bytes(b"[" * 10**5)
    with pytest.raises(ConfigError, match=r"done\.json: no JSON"):
        job.finished()


def test_a_shard_that_ends_early_is_not_there(job: ShardJob) -> None:
    write(job, SHARDS[0])
    with pytest.raises(KeyboardInterrupt), job.shard(SHARDS[1]) as (writer, _):
        writer.write({"__key__": "0", "txt": b"x"})
        raise KeyboardInterrupt
    assert [name for name in SHARDS if job.is_done(name)] == SHARDS[:1]
    assert not list((job.work / "partial").iterdir())
    with pytest.raises(ConfigError, match=r"not finished; give it, with out=.*, again: it goes on"):
        load_index(str(job.out), key="data.train", create=True)
    with pytest.raises(ConfigError, match="made with another pictures"):
        ShardJob(job.out, "done.json", {**PLAN, "pictures": "others"}).begin()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_write_the_same_bytes(tmp_path: Path, order: tuple[int, ...]) -> None:
    for out, parts in (("one", [(0, 1)]), ("three", [(i, 3) for i in order])):
        for i, n in parts:
            seen, job = [0], begun(tmp_path / out)
            run(partial(write, job), SHARDS[i::n], workers=2, progress=seen.append)
            assert seen[-1] == 3 * len(SHARDS[i::n])
        complete(job)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="is in use; give another one"):
            ShardJob(out, "done.json", PLAN).finished()


def test_who_comes_late_finds_the_job_finished(job: ShardJob) -> None:
    """Two write the same shards and describe the folder: the one that is quicker removes .job."""
    for name in SHARDS:
        write(job, name)
    with pytest.raises(FinishedElsewhere), job.shard(SHARDS[4]) as (writer, _):
        writer.write({"__key__": "0", "txt": b"x"})
        finished = complete(job)
    for workers in (1, 2):
        with pytest.raises(FinishedElsewhere):
            run(partial(write, job), SHARDS[4:], workers=workers, progress=lambda done: None)
    with pytest.raises(FinishedElsewhere):
        complete(job)
    assert job.finished() == finished


def test_what_the_disk_refuses_is_said_once(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write_sidecar", full)
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"No space left.*the same command goes on"):
            run(partial(write, job), SHARDS, workers=workers, progress=lambda done: None)
    assert not any(map(job.is_done, SHARDS))


def test_a_killed_process_is_named_and_the_others_end(job: ShardJob) -> None:
    def write_or_die(name: str, count: Count) -> None:
        if name == SHARDS[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        write(job, name, count)

    with pytest.raises(ConfigError, match=r"a process .* code -9.*the same command goes on"):
        run(write_or_die, SHARDS, workers=2, progress=lambda done: None)
    assert not multiprocessing.active_children()


def test_shards_are_of_equal_numbers() -> None:
    assert cut(7, 3, at_least=8) == [(0, 2), (2, 4), (4, 7)]
    assert cut(2, 3, at_least=8) == [(0, 1), (1, 2)]
    assert len(cut(1024, 1, at_least=8)) == 8 and len(cut(1024, 9, at_least=8)) == 9
