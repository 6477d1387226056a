"""Runs the `apr` command: `python -m apr_jax` is the same as `apr`."""

import sys

# Python has put the current folder in front of the import path. A user's file `random.py` there
# would hide the standard library's module from the imports that follow, so the folder is moved to
# the end. `sys` itself is built into Python.
if not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

from apr_jax.cli.main import main

main()
