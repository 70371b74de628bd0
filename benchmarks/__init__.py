"""Benchmarks that anyone can rerun, each `python -m benchmarks.NAME [key=value ...]`; --help says
what one measures and takes."""

import ast
import os
import sys
from pathlib import Path


def _tell(module: str) -> None:
    path = Path(__file__).with_name(f"{module.rpartition('.')[2]}.py")
    print(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


if sys.argv[0] == "-m" and {"-h", "--help"} & set(sys.argv[1:]):  # before torch is imported
    _tell(sys.orig_argv[sys.orig_argv.index("-m") + 1])
    sys.exit(0)
if "OMP_WAIT_POLICY" not in os.environ:  # as vae_dist.cli does, which peers cannot import
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
