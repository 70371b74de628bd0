"""The clusters that the tests of this folder share, and data for their runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm.cluster import Cluster, has_freezer, lacking


def started(**settings: str) -> Iterator[Cluster]:
    if lacks := lacking():
        pytest.skip(f"needs a SLURM cluster, but this machine lacks {lacks}")
    # Not under pytest's own folder: a socket's path is at most 108 characters long.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        Path(folder).chmod(0o755)  # munge asks for it
        lab = Path(folder) / Path(folder).name  # its name also names the network namespaces
        with Cluster(lab, **settings) as cluster:
            yield cluster


@pytest.fixture(scope="session")
def linuxproc() -> Iterator[Cluster]:
    """Signals reach every process of a task."""
    yield from started(PROCTRACK="linuxproc", KILL_WAIT="30")


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Cluster]:
    """Signals reach the task alone, as on most real clusters."""
    if not lacking() and not has_freezer():
        pytest.skip("needs the cgroup v1 freezer")
    yield from started(PROCTRACK="cgroup", KILL_WAIT="30")
