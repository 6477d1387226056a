"""`import apr_jax`: what it offers, and that it costs nothing until it is used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import apr_jax
from apr_jax.cli.main import run

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there():
    for name in apr_jax.__all__:
        assert getattr(apr_jax, name) is not None, name
    assert set(apr_jax.__all__) == set(apr_jax._DEFINED_IN) <= set(dir(apr_jax))


def test_editors_and_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "apr_jax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{statement.module}:{alias.name}"
        for statement in block.body
        for alias in statement.names
    }
    assert seen == {name: f"apr_jax.{place}" for name, place in apr_jax._DEFINED_IN.items()}


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(apr_jax, "no_such_name")


def test_importing_the_library_brings_no_jax():
    code = "import apr_jax, apr_jax.cli.main, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert "apr_jax" in loaded
    assert not {"jax", "numpy", "pydantic"} & set(loaded)


def test_one_version_everywhere():
    version = apr_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == version


def test_the_command_tells_its_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"apr_jax {apr_jax.__version__}\n"
