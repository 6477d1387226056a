"""Nothing outside `tasks/` knows what a problem holds; `paper/` is about Countdown."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "apr_jax"
FILES = sorted(
    path
    for path in LIBRARY.rglob("*.py")
    if path.relative_to(LIBRARY).parts[0] not in ("tasks", "paper")
)
CLASSES = {
    "Countdown",
    "CountdownConfig",
    "SolverConfig",
    "HiddenDigit",
    "Arithmetic",
    "PathStar",
    "Sudoku",
}
FIELDS = {
    "numbers",
    "target",
    "digits",
    "expression",
    "givens",
    "graph",
}  # What problems of our own tasks hold.


def imported(node):
    if isinstance(node, ast.ImportFrom):
        yield node.module or ""
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_no_task_is_named_and_no_problem_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node):
            assert name not in CLASSES and ".countdown" not in name, name
        if isinstance(node, ast.Name):
            assert node.id not in CLASSES
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            assert node.slice.value not in FIELDS, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "problem" or node.attr in ("id", "data", "to_json")


def test_files_are_looked_at():
    assert len(FILES) > 80
