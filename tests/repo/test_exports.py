"""What the packages export."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "apr_jax").rglob("__init__.py")
    if "__all__ = " in path.read_text()
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_is_there(package):
    """Also where a name is imported only at its first use."""
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    assert not hasattr(module, "no_such_name")
