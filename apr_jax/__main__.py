"""`python -m apr_jax` is `apr`."""

from apr_jax.cli import main

main()
