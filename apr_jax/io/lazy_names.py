"""Names that a package exports and imports only when they are first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, defined_in: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package that imports an exported name at its first use.

    Args:
      package: the package's `__name__`.
      defined_in: exported name -> the module below the package that defines it, followed by
        `:attribute` where it has another name there.
    """

    def import_name(name: str) -> Any:
        if name not in defined_in:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = defined_in[name].partition(":")
        value = getattr(importlib.import_module(f"{package}.{module}"), attribute or name)
        setattr(sys.modules[package], name, value)
        return value

    return import_name
