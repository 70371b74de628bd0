"""Clusters, and the run that nothing stops."""

import pytest

from tests.support.slurm.cluster import OPTIONS, started
from tests.support.training import train


@pytest.fixture(scope="module")
def cluster():
    """Signals reach every process of a task."""
    yield from started("linuxproc")


@pytest.fixture(scope="module")
def cgroup_cluster():
    """Signals reach the task alone, as on most real clusters."""
    yield from started("cgroup")


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """The run of two processes of this machine that nothing stops."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(run, digits, *OPTIONS, world=2) == [0, 0]
    return run
