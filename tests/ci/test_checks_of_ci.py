"""The checks that CI runs catch a wrong sample of what they are there for."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CI = Path(__file__).resolve().parents[2] / ".ci"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CI / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_imports = load("check_imports")
check_skips = load("check_skips")
check_smoke = load("check_smoke")


def package(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / "vae_dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "vae_dist"


def test_this_package_imports_downward_alone():
    assert check_imports.problems(CI.parent / "vae_dist") == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"models/vae.py": "\n\nimport vae_dist.training\n"}, "models/vae.py:3: models lies below"),
        ({"config/load.py": "from vae_dist import randomness\n"}, "config lies below randomness"),
        ({"data/index.py": "def f():\n    import vae_dist.train\n"}, "data lies below train"),
        ({"models/vae.py": "from .conv import Encoder\n"}, "vae.py:1: relative import"),
        ({"models/vae.py": "import vae_dist\n"}, "stands above the layers"),
        ({"misc/strings.py": ""}, "has no layer yet"),
        (
            {
                "models/a.py": "import vae_dist.models.b\n",
                "models/b.py": "from vae_dist.models import c\n",
                "models/c.py": "def f():\n    from vae_dist.models.a import x\n",
            },
            "vae_dist.models.a -> vae_dist.models.b",
        ),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, files, expected):
    (problem,) = check_imports.problems(package(tmp_path, {"__init__.py": "", **files}))
    assert expected in problem


def test_a_skip_needs_a_reason_that_holds_on_this_machine(pytester):
    pytester.makepyfile(
        "import pytest\n"
        "@pytest.mark.skip(reason='needs CUDA')\n"
        "def test_a(): pass\n"
        "def test_b(): pytest.skip('too lazy')\n"
        "@pytest.mark.parametrize('x', [])\n"
        "def test_c(x): pass\n"
    )
    output = str(pytester.runpytest_inprocess("-rs").stdout)
    idle = ["got empty parameter set", "too lazy"]
    for has_cuda, expected in ((False, idle), (True, [*idle, "needs CUDA"])):
        found = check_skips.unjustified(output, {"needs CUDA": not has_cuda})
        reasons = (line.partition(": ")[2].split(" for")[0] for line in found)
        assert sorted(reasons) == sorted(expected)


def run_folder(tmp_path, *neg_elbos):
    for name in ("images", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "samples.png").write_bytes(bytes(200))
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010")
    rows = [{"step": step, "eval/neg_elbo_nats": value} for step, value in enumerate(neg_elbos)]
    rows.append({"step": len(rows), "train/loss": 1.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_last_evaluation_counts_and_all_files_must_be_there(tmp_path):
    run = run_folder(tmp_path, 200.0, 95.9)
    assert check_smoke.problems(run, 96) == []
    (problem,) = check_smoke.problems(run, 95)
    assert "95.9" in problem
    (run / "log.jsonl").write_text('{"step": 1, "eval/neg_elbo_nats": NaN}\n')
    assert len(check_smoke.problems(run, 96)) == 1
    for name in ("images/samples.png", "checkpoints/latest", "log.jsonl"):
        (run / name).unlink()
    assert len(check_smoke.problems(run, 96)) == 3
    assert len(check_smoke.problems(tmp_path / "nothing", 96)) == 3
