"""Imports of vae_dist go downward only, through six layers, and nowhere in a circle.

In: the package folder (first argument; default: vae_dist). Out: one line per wrong import, exit
code 1 if there is one. Every import statement counts, also those inside functions. Within a layer
modules may import each other as long as no circle arises.

    verbs > training | evaluation | inference | packing > objectives | tracking
          > models | data | run > distributed | randomness > config | files
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "vae_dist"
LAYERS = (  # from the top
    "train evaluate sample reconstruct impute encode decode export pack index report dashboard cli",
    "training evaluation inference packing",
    "objectives tracking",
    "models data run",
    "distributed randomness",
    "config files",
)


def layer_of(part: str) -> int | None:
    """The place of a part from the top, 0 for commands; None when it has no place yet."""
    return next((place for place, parts in enumerate(LAYERS) if part in parts.split()), None)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The folder or file right under the package; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for each import of the package; an empty module for a relative import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [""]
        elif isinstance(node, ast.ImportFrom):
            # `from package import x` is the module x if there is one, else a name of the package.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            whole = node.module == PACKAGE  # its __init__ is empty: a name of it is a module
            names = [name if whole or name in modules else str(node.module) for name in inner]
        else:
            continue
        for name in names:
            if not name or name.split(".")[0] == PACKAGE:
                yield node.lineno, name


def wrong_direction(importer: str, target: str) -> str | None:
    """Why a module of one part may not import a module of another, or None when it may."""
    part, other = part_of(importer), part_of(target)
    if part == other or not part:  # the package's own __init__ stands above the layers
        return None
    if not other:
        return f"{importer} imports {target}: the package's own __init__ stands above the layers"
    above, below = layer_of(part), layer_of(other)
    if above is None or below is None:
        return None  # reported once for the part
    return f"{part} lies below {other}, so it cannot import it" if above > below else None


def problems(root: Path) -> list[str]:
    """Everything that is wrong under the package folder `root`."""
    files = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    found: list[str] = []
    edges: dict[str, set[str]] = {module: set() for module in files}
    for part in sorted({part_of(module) for module in files} - {""}):
        if layer_of(part) is None:
            found.append(f"{root / part}: has no layer yet; give it one in .ci/check_imports.py")
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, target in imported(tree, set(files)):
            if not target:
                found.append(f"{path}:{line}: relative import; write the absolute one")
            elif problem := wrong_direction(module, target):
                found.append(f"{path}:{line}: {problem}")
            elif module != target:
                edges[module].add(target)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append(f"circle of imports: {' -> '.join(reversed(error.args[1]))}")
    return found


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else PACKAGE)
    found = problems(root)
    print("\n".join(found) or f"imports of {root}: downward only")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
