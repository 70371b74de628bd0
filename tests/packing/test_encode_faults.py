"""`encode` through damage, kills, several processes and others that use its folder."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.distributed import run_ranks
from tests.support.encoding import (
    encoded,
    files_of,
    keys,
    photo_run,
)
from tests.support.latent_data import write_spatial_run
from vae_dist import encode
from vae_dist.data.writer import ShardWriter, write_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_run(tmp_path_factory.mktemp("work"))


def test_too_much_damage_stops(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert encode.main(keys(run, out, "max_skipped_fraction=0.05")) == 2
    message = capsys.readouterr().err
    assert "2 of 23 images cannot be read" in message and "sample 4: " in message
    assert not (out / "encode.json").exists()
    encoded(run, out)  # goes on, with the limit of the other tests
    encoded(run, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_keys_that_a_tar_cannot_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    sample: dict[str, str | bytes] = {"__key__": "k" * 90, "png": file.getvalue()}
    write_shards([sample], tmp_path / "long", num_shards=1)
    assert encode.main([*keys(run, tmp_path / "out"), f"data={tmp_path}/long"]) == 2
    assert "give it a shorter key" in capsys.readouterr().err


def test_a_finished_folder_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    encoded(run, out)
    before = files_of(out)
    encoded(run, out)
    assert "nothing is left to do" in capsys.readouterr().out
    assert files_of(out) == before
    assert encode.main(keys(run, out, "dtype=bf16")) == 2
    assert "another dtype (fp16 there, bf16 here)" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert encode.main(keys(run, tmp_path / "used")) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 9, 17])
def test_a_killed_encode_goes_on(
    run: Path, tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 while sample `at` is written; then the same command, and refusals of others."""
    out = tmp_path / "out"

    def killed() -> None:
        write, count = ShardWriter.write, 0

        def write_or_die(self: ShardWriter, sample: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, sample)

        ShardWriter.write = write_or_die  # type: ignore[method-assign]
        encode.main(keys(run, out))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert bool(whole) == (at > 1)
    assert encode.main(keys(run, out, "content=mean")) == 2
    assert "another content (moments there, mean here)" in capsys.readouterr().err
    assert encode.main(keys(run, out, "checkpoint=10")) == 2
    assert "another step (20 there, 10 here)" in capsys.readouterr().err
    encoded(run, out)
    assert not (out / ".job").exists()
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    encoded(run, tmp_path / "straight")
    assert files_of(out) == files_of(tmp_path / "straight")


@pytest.mark.parametrize(("world", "shard_mb"), [(2, 0.02), (3, 0.02), (2, 10)])
def test_any_number_of_processes_writes_the_same(
    run: Path, tmp_path: Path, world: int, shard_mb: float
) -> None:
    """Of the 6 shards, or of a single one: then a rank has nothing to do."""
    size = f"shard_mb={shard_mb}"
    encoded(run, tmp_path / "one", size)
    assert run_ranks(world, encode.main, keys(run, tmp_path / "many", size)) == [0] * world
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_loader_threads_change_nothing(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    write_spatial_run(other, run.parent / "photos")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("workers: 0", "workers: 2"))
    encoded(run, tmp_path / "none")
    assert encode.main([*keys(run, tmp_path / "two")[1:], f"run={other}"]) == 0
    for path in (tmp_path / "none").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_accelerate_launch_writes_the_same(run: Path, tmp_path: Path) -> None:

    encoded(run, tmp_path / "one")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "-m", "vae_dist.encode"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command, *keys(run, tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout, time.monotonic() - started
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
