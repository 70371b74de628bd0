"""The checks that CI runs catch a wrong sample of what they are there for."""

import importlib.util
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CI = Path(__file__).resolve().parents[2] / ".ci"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_imports, check_skips, check_smoke = map(load, ("check_imports", "check_skips", "check_smoke"))


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
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "vae_dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (problem,) = check_imports.problems(tmp_path / "vae_dist")
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


def test_the_last_evaluation_counts_and_all_files_must_be_there(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"eval/neg_elbo_nats": {value}}}\n' for value in (200, 95.9)))
    lacking = check_smoke.problems(tmp_path, 96)
    assert ["no pictures" in lacking[0], "no latest checkpoint" in lacking[1]] == [True, True]
    assert "is 95.9 in the last evaluation" in check_smoke.problems(tmp_path, 95)[0]
    log.write_text('{"eval/neg_elbo_nats": NaN}\n')
    assert len(check_smoke.problems(tmp_path, 96)) == 3
    log.unlink()
    assert len(check_smoke.problems(tmp_path, 96)) == 3
