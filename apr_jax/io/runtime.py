"""How a process is set up before JAX works: where compiled programs are kept, how many devices the
CPU is, and which other processes it works with."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apr_jax.errors import LostProcess, UsageError, UserError
from apr_jax.io.storage import folder_of

CACHE_VARIABLE = "APR_CACHE"
MOST_CPU_DEVICES = 8
AUTO = "auto"
_PLATFORMS = "JAX_PLATFORMS"
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 30  # After which a process that is gone ends the others.
_CONNECT_SECONDS = 300

# Settings of JAX with which this program does not work: name, values, and what they would do to it.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("jax_enable_x64", (True,), "weights and checkpoints are of 32-bit numbers"),
    ("jax_disable_jit", (True,), "a rollout that is not compiled takes hours"),
    ("jax_numpy_rank_promotion", ("raise",), "arrays of different rank are combined on purpose"),
    (
        "jax_numpy_dtype_promotion",
        ("strict",),
        "numbers of different types are combined on purpose",
    ),
    *(
        (
            name,
            ("disallow", "disallow_explicit"),
            "numbers go to the device and come back in every step",
        )
        for name in (
            "jax_transfer_guard",
            "jax_transfer_guard_host_to_device",
            "jax_transfer_guard_device_to_device",
            "jax_transfer_guard_device_to_host",
        )
    ),
)


def cache_folder() -> Path | None:
    """Where compiled XLA programs are kept: $APR_CACHE, by default ~/.cache/apr_jax; None if it is
    set to "off".

    Raises:
      UsageError: the variable names no folder of this machine.
    """
    if os.environ.get(CACHE_VARIABLE) == "off":
        return None
    return folder_of(CACHE_VARIABLE, "~/.cache/apr_jax")


def keep_compiled() -> None:
    """Makes JAX keep compiled programs on disk: a second start of the same experiment compiles
    nothing anew.
    """
    folder = cache_folder()
    if folder is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def use_all_cores() -> None:
    """Makes every CPU core a device, up to 8 and a power of two, so that batches divide.

    A step of a small model is many small operations. Spread over the cores each of them waits for
    the slowest core; a device a core runs them without waiting (docs/rollout.md has the figures). A
    device count set by the user, in XLA_FLAGS or JAX_NUM_CPU_DEVICES, stays."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    if jax.config.jax_num_cpu_devices > 0:
        return
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    cores = min(usable, MOST_CPU_DEVICES)
    jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))


def check_settings() -> None:
    """Refuses settings of JAX, as the environment has them, with which this program would fail
    later, and obscurely.

    Raises:
      UsageError: names the variable.
    """
    import jax

    for name, values, reason in _REFUSED:
        value = getattr(jax.config, name)
        if value in values:
            variable = name.upper()
            raise UsageError(
                f"{variable}={os.environ.get(variable, value)}: {reason}; unset {variable}"
            )


def check_devices() -> None:
    """Makes JAX look for its devices now: what is wrong with them must not come up where a file is
    read.

    Raises:
      UserError: there is none of the kind that JAX_PLATFORMS names, or it cannot be used.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        wanted = os.environ.get(_PLATFORMS)
        reason = str(error).partition(" (set ")[0] or "there is none"
        if wanted:
            told = (
                f"{_PLATFORMS}={wanted}: no such device can be used here ({reason});"
                f" {_PLATFORMS}=cpu always can"
            )
        else:
            told = f"no device can be used here ({reason}); {_PLATFORMS}=cpu uses the processor"
        raise UserError(told) from None


def join_processes() -> None:
    """Makes this process one of several that train together, if the environment says so.

    $JAX_COORDINATOR_ADDRESS is host:port of the first process, $JAX_NUM_PROCESSES how many there
    are, $JAX_PROCESS_ID which one this is, from 0. Where a cluster manager knows the latter two
    (Slurm) the address is enough; where it knows all three (TPU slices, on their own and in GKE) it
    is "auto".

    Raises:
      UsageError: the numbers are none, don't fit together, or are missing.
    """
    address = os.environ.get(COORDINATOR)
    if not address:
        return
    count, index = _whole(COUNT), _whole(INDEX)
    if count is not None and index is not None and not 0 <= index < count:
        raise UsageError(f"{INDEX}={index}: must be in 0..{count - 1}, because {COUNT}={count}")
    if address != AUTO and not address.rpartition(":")[2].isdigit():
        raise UsageError(
            f'{COORDINATOR}={address}: must be host:port, or "{AUTO}" on the hosts of a TPU slice'
        )
    import jax

    # SIGTERM is handled by the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    if address == AUTO:
        del os.environ[COORDINATOR]  # JAX would take it for an address.
    try:
        jax.distributed.initialize(
            None if address == AUTO else address,
            count,
            index,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_CONNECT_SECONDS,
        )
    except ValueError as error:
        if address == AUTO:
            told = f"{COORDINATOR}={AUTO}: this is no host of a TPU slice ({error}); give host:port"
        elif missing := [name for name, value in ((COUNT, count), (INDEX, index)) if value is None]:
            told = (
                f"{COORDINATOR}={address}: no cluster manager tells the rest ({error}); set"
                f" {' and '.join(missing)} too"
            )
        else:
            raise
        raise UsageError(told) from None


def is_first() -> bool:
    """Whether this is the only process, or the first of those that run the command as one."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first_decides(choose: Callable[[], int]) -> int:
    """What `choose` returns in the first process, in all of them."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if not jax.distributed.is_initialized():
        return choose()
    chosen = choose() if is_first() else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))


@contextmanager
def alone_fails() -> Iterator[None]:
    """What one process does while others wait: if it fails, it must end at once, for only that ends
    the others.
    """
    import jax

    try:
        yield
    except UserError as error:
        if not jax.distributed.is_initialized():
            raise
        raise LostProcess(
            f"process {jax.process_index()}, for which the others wait: {error}"
        ) from error


def _whole(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise UsageError(f"{variable}={text}: must be a whole number")
    return None if text is None else int(text)


def start(together: bool = False) -> None:
    """What every command that uses JAX does first.

    Args:
      together: several processes may run the command as one.
    """
    check_settings()
    keep_compiled()
    use_all_cores()
    if together:
        join_processes()
    check_devices()
