"""The import rules of the house: core, lib/ and experiments/ know each other in one direction only."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (ROOT, ROOT / "lib", ROOT / "experiments")
    for path in folder.glob("*.py")
}


def imported(name):
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


@cache
def level(name):
    """1 for a file that imports none of ours. A cycle ends in a RecursionError."""
    return 1 + max(map(level, imported(name)), default=0)


def test_the_core_does_not_import_experiments():
    for name in FILES:
        if not name.startswith("experiments."):
            assert not any(x.startswith("experiments.") for x in imported(name)), name


def test_lib_imports_nothing_of_the_core():
    for name in FILES:
        if name.startswith("lib."):
            assert all(x.startswith("lib.") for x in imported(name)), name


def test_at_most_eight_levels():
    assert max(map(level, FILES)) <= 8


def test_little_is_imported_at_the_bottom():
    assert not imported("model") and not imported("masks")
