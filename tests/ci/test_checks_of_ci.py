"""The checks that CI runs catch a wrong sample of what they are there for."""

import importlib
import sys
from pathlib import Path

pytest_plugins = ["pytester"]
CI = Path(__file__).resolve().parents[2] / ".ci"

sys.path.append(str(CI))
check_imports, check_skips, check_smoke = (
    importlib.import_module(f"check_{name}") for name in ("imports", "skips", "smoke")
)


def test_imports_go_downward_alone(tmp_path):
    assert check_imports.problems(CI.parent / "vae_dist") == []
    for name, text in {
        "__init__.py": "",
        "models/a.py": "from .b import x\nimport vae_dist\nimport vae_dist.training\n",
        "models/b.py": "from vae_dist.models import c\n",
        "models/c.py": "def f():\n    from vae_dist.models.b import x\n",
        "config/load.py": "from vae_dist import randomness\n",
        "data/index.py": "def f():\n    import vae_dist.train\n",
        "misc/strings.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    problems = check_imports.problems(tmp_path.rename(tmp_path.with_name("vae_dist")))
    expected = (
        "misc: has no layer yet",
        "config/load.py:1: config lies below randomness",
        "data/index.py:2: data lies below train",
        "models/a.py:1: relative import",
        "models/a.py:2: vae_dist.models.a imports vae_dist: the package's own __init__",
        "models/a.py:3: models lies below training",
        "circle of imports: vae_dist.models.",
    )
    assert all(text in problem for text, problem in zip(expected, problems, strict=True))


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
    for lacks_cuda, num_idle in ((True, 2), (False, 3)):
        assert len(check_skips.unjustified(output, {"needs CUDA": lacks_cuda})) == num_idle


def test_the_last_evaluation_counts_and_all_files_must_be_there(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"eval/neg_elbo_nats": {value}}}\n' for value in (200, 95.9)))
    pictures, checkpoint = check_smoke.problems(tmp_path, 96)
    assert "no pictures" in pictures and "no latest checkpoint" in checkpoint
    assert "is 95.9 in the last evaluation" in check_smoke.problems(tmp_path, 95)[0]
    log.write_text('{"eval/neg_elbo_nats": NaN}\n')
    assert len(check_smoke.problems(tmp_path, 96)) == 3
    log.unlink()
    assert len(check_smoke.problems(tmp_path, 96)) == 3
