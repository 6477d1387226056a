"""How a process is set up before JAX works: where compiled programs are kept."""

import os
from pathlib import Path

CACHE_VARIABLE = "APR_CACHE"


def cache_folder() -> Path | None:
    """Where compiled XLA programs are kept: $APR_CACHE, by default ~/.cache/apr_jax; None if it is set to "off"."""
    chosen = os.environ.get(CACHE_VARIABLE) or "~/.cache/apr_jax"
    return None if chosen == "off" else Path(chosen).expanduser().absolute()


def keep_compiled() -> None:
    """Makes JAX keep compiled programs on disk: a second start of the same experiment compiles nothing anew."""
    folder = cache_folder()
    if folder is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
