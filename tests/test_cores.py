"""Waiting threads leave their core to others, and the trainer sees to it in time."""

import os
import subprocess
import sys

import pytest

from vae_dist.cores import share_cores


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "infinity"}, "infinity"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_waiting_threads_give_up_their_core_unless_somebody_says_otherwise(
    monkeypatch, given, expected
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_training_says_so_before_torch_reads_it():
    """Which it does once, when it is loaded."""
    code = (
        "import os, sys\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "from vae_dist.train import main\n"
        "assert main(['config=debug', 'no.such=key']) == 2\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1000"], done.stderr
