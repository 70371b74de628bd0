"""What the tests of the launch scripts share."""

import pytest

from tests.support.slurm.job import left_alone


@pytest.fixture(scope="session")
def alone(digits, tmp_path_factory):
    """What a run on two processes ends as that nothing stops."""
    return left_alone(digits, tmp_path_factory.mktemp("alone"))
