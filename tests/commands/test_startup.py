"""What a command decides before torch is there: what launchers promised, and what it imports."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.training import arguments
from vae_dist import train
from vae_dist.train import launch_problem

BATCH = "ENVIRONMENT=BATCH SLURM_JOB_ID=1"
AGENT = "SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("", ""),
        ("WORLD_SIZE=4 EXPECTED_WORLD_SIZE=4", ""),
        ("WORLD_SIZE=4 SLURM_NTASKS=4 SLURM_STEP_ID=0", ""),
        (f"{AGENT} WORLD_SIZE=16 GROUP_WORLD_SIZE=2", ""),  # a launcher on each node
        ("SLURM_JOB_ID=1 SLURM_NTASKS=8", ""),  # a shell of salloc, no step, or one of one task
        ("SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=4294967290", ""),
        (f"{BATCH} SLURM_NTASKS=1", ""),
        (f"{BATCH} SLURM_NTASKS=8 WORLD_SIZE=8", ""),  # a launcher in the batch script
        (f"{BATCH} SLURM_NTASKS=8 EXPECTED_WORLD_SIZE=1", ""),
        ("EXPECTED_WORLD_SIZE=1 SLURM_NTASKS=4 SLURM_STEP_ID=0", ""),  # meant so
        ("EXPECTED_WORLD_SIZE=4", "EXPECTED_WORLD_SIZE=4 processes were promised"),
        ("EXPECTED_WORLD_SIZE=4 WORLD_SIZE=2", "set EXPECTED_WORLD_SIZE=2"),
        ("SLURM_NTASKS=4 SLURM_STEP_ID=0", "each task would train alone"),
        ("SLURM_NTASKS=4 SLURM_STEP_ID=0 WORLD_SIZE=2", "SLURM has started 4 tasks"),
        (f"{BATCH} SLURM_NTASKS=8", "SLURM has started 8 tasks"),
        (f"{AGENT} WORLD_SIZE=2 GROUP_WORLD_SIZE=1", "SLURM has started 2 tasks"),
    ],
)
def test_what_a_launcher_promised_is_held_against_the_processes(environment, message):
    found = launch_problem(dict(setting.split("=") for setting in environment.split()))
    assert message in found if message else found == ""


@pytest.mark.parametrize(("rank", "pauses"), [("0", []), ("1", [train.REFUSAL_PAUSE_S])])
def test_other_ranks_leave_after_the_one_that_prints_the_reason(monkeypatch, capsys, rank, pauses):
    found = []
    monkeypatch.setattr(train.time, "sleep", found.append)
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.main(["config=debug", "optimizer.lrr=1"]) == 2
    assert found == pauses
    assert ("did you mean" in capsys.readouterr().err) == (rank == "0")


CODE = """
import json, os, sys
os.environ.pop("GOMP_SPINCOUNT", None)
import vae_dist
assert vae_dist.config("config=debug").training.steps > 0 and vae_dist.__version__
assert callable(vae_dist.train)
import vae_dist.config.schema
assert callable(vae_dist.config) and set(vae_dist.__all__) <= set(dir(vae_dist))
from vae_dist import decode, encode, evaluate, export, impute, index, pack, reconstruct, report
from vae_dist import sample, train
verbs = (decode, encode, evaluate, export, impute, index, pack, reconstruct, report, sample, train)
assert all(verb.main(["--help"]) == 0 for verb in verbs)
assert train.main(["config=mnist", "no.such=key"]) == 2
assert os.environ["GOMP_SPINCOUNT"] == "1000"  # it is read when torch is loaded
light = sorted({"torch", "accelerate", "wandb", "webdataset", "sympy"} & sys.modules.keys())
assert vae_dist.load.__doc__ and vae_dist.write_shards.__doc__
assert train.main(sys.argv[1:]) == 0
print(json.dumps([light, sorted({"torch", "wandb", "torchvision"} & sys.modules.keys())]))
"""


def test_help_refusals_and_the_api_need_no_torch_and_a_dry_run_no_tracker(
    request, digits, tmp_path
):
    environment = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    words = arguments(tmp_path / "run", digits, "dry_run=true", "optimizer.warmup_steps=70")
    argv = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], ["torch"]]
    assert "last step, 60, comes before optimizer.warmup_steps=70 is reached" in done.stdout
    for part in ("parameters", "512 images", "MiB", "1, 2, 4, 8", "nothing was trained"):
        assert part in done.stdout
    assert not (tmp_path / "run").exists()
