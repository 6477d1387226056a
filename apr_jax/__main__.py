"""`python -m apr_jax` is `apr`."""

import sys

# Python has put the current folder in front. A file `random.py` there would be imported in place of
# the standard library's by any of the many imports that follow; in the last place it is in nobody's
# way. `sys` is part of Python's own program.
if not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

from apr_jax.cli.main import main

main()
