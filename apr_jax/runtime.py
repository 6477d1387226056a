"""How a process is set up before JAX works: where compiled programs are kept, and how many devices the CPU is."""

import os
from pathlib import Path

CACHE_VARIABLE = "APR_CACHE"
MOST_CPU_DEVICES = 8


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


def use_all_cores() -> None:
    """Makes every CPU core a device, up to 8 and a power of two, so that batches divide.

    A step of a small model is many small operations. Spread over the cores each of them waits for the slowest core; a device a
    core runs them without waiting (docs/rollout.md has the figures). A device count set by the user, in XLA_FLAGS or
    JAX_NUM_CPU_DEVICES, stays.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    if jax.config.jax_num_cpu_devices > 0:
        return
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(usable, MOST_CPU_DEVICES)
    jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))


def start() -> None:
    """What every command that uses JAX does first."""
    keep_compiled()
    use_all_cores()
