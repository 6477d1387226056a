"""Imports point one way (see apr_jax/__init__.py): whoever reads a package needs to know only those
below it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each package may import of the library, itself aside. `config` gathers the configs of all
# packages below `train`.
BASE = {"errors", "io"}
LIBRARY = BASE | {"threads", "text", "model", "tasks", "data", "config"}
ALLOWED = {
    "errors": set(),
    "io": {"errors"},
    "threads": {"errors"},
    "text": {"errors"},
    "model": BASE,
    "tasks": BASE,
    "data": BASE | {"tasks", "text", "threads", "config"},
    "scales": {"errors"},
    "config": {"errors", "scales", "tasks", "data", "model", "threads", "train"},
    "compare": {"config"},
    "train": LIBRARY | {"compare"},
    "evaluate": LIBRARY | {"train"},
    "report": LIBRARY | {"train", "evaluate", "scales"},
    "paper": LIBRARY | {"compare", "train", "evaluate", "report"},
    "plan": LIBRARY | {"train", "evaluate", "report", "bench", "paper"},
    "check": LIBRARY | {"train", "scales", "plan"},
    "new_task": LIBRARY | {"train"},
    "bench": LIBRARY | {"train", "evaluate", "report"},
}
FILES = sorted((ROOT / "apr_jax").rglob("*.py"))


def imported(path):
    """Packages of the library that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("apr_jax."))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    own = [
        path
        for path in FILES
        if path.relative_to(ROOT / "apr_jax").parts[0].removesuffix(".py") == package
    ]
    assert own
    for path in own:
        beyond = set(imported(path)) - ALLOWED[package] - {package}
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_threads_and_tasks_need_no_network():
    """The rollout can be lifted into another project: importing it brings no model, no optimizer
    and no data library.
    """
    code = "import apr_jax.threads, apr_jax.tasks, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert not {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"} & set(
        loaded.split()
    )


def test_no_tensorflow_at_run_time():
    code = (
        "import apr_jax.train.rl.trainer, apr_jax.data.build, apr_jax.evaluate.runner, sys;"
        " print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "tensorflow" not in loaded.split()


def test_no_text_is_ever_evaluated_as_code():
    """Nor unpickled."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                ), f"{path}:{node.lineno}"
                assert "pickle.load" not in called and "Unpickler" not in called, (
                    f"{path}:{node.lineno}"
                )


def test_every_folder_is_a_package_that_gets_installed():
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").is_file(), folder


def test_no_test_imports_a_test():
    """What two tests share is in `tests/helpers`."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            shared = [name for name in names if name.startswith(("test_", "tests."))]
            assert not shared, f"{path.relative_to(ROOT)} imports {shared}"
