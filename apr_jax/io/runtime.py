"""The setup of a process before JAX works.

It decides where compiled programs are kept, how many devices the CPU counts as, and with which
other processes this one works.
"""

import os
import sys
import threading
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
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
INDEX = "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 30  # So long after a process has vanished the others end.
_CONNECT_SECONDS = 300

_TRANSFER_REASON = "numbers go to the device and come back in every step"
_NO_TRANSFER = ("disallow", "disallow_explicit")
# Settings of JAX with which this program does not work: name, values, and why not.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("jax_enable_x64", (True,), "weights and checkpoints are of 32-bit numbers"),
    ("jax_disable_jit", (True,), "a rollout that is not compiled takes hours"),
    ("jax_numpy_rank_promotion", ("raise",), "arrays of different rank are combined on purpose"),
    ("jax_numpy_dtype_promotion", ("strict",), "numbers of several types are combined on purpose"),
    ("jax_transfer_guard", _NO_TRANSFER, _TRANSFER_REASON),
    ("jax_transfer_guard_host_to_device", _NO_TRANSFER, _TRANSFER_REASON),
    ("jax_transfer_guard_device_to_device", _NO_TRANSFER, _TRANSFER_REASON),
    ("jax_transfer_guard_device_to_host", _NO_TRANSFER, _TRANSFER_REASON),
)


def cache_folder() -> Path | None:
    """Returns the folder where compiled XLA programs are kept.

    It is $APR_CACHE, by default ~/.cache/apr_jax, or None if the variable is "off".

    Raises:
      UsageError: the variable names no folder of this machine.
    """
    if os.environ.get(CACHE_VARIABLE) == "off":
        return None
    return folder_of(CACHE_VARIABLE, "~/.cache/apr_jax")


def keep_compiled() -> None:
    """Makes JAX keep compiled programs on disk.

    The same experiment, started again, then compiles nothing.
    """
    folder = cache_folder()
    if folder is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def use_all_cores() -> None:
    """Makes every CPU core a device of its own, as many as a power of two up to 8 allows.

    With a power of two, batches divide. A step of a small model consists of many small operations.
    If each of them were spread over all cores, each would wait for the slowest core; with a device
    for each core there is no waiting (docs/rollout.md has the figures). A device count that the
    user has set, in XLA_FLAGS or JAX_NUM_CPU_DEVICES, stays.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    if jax.config.jax_num_cpu_devices > 0:
        return
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    cores = min(usable, MOST_CPU_DEVICES)
    largest_power_of_two = 1 << (cores.bit_length() - 1)
    jax.config.update("jax_num_cpu_devices", largest_power_of_two)


def check_settings() -> None:
    """Refuses settings of JAX in the environment with which this program would fail obscurely.

    Raises:
      UsageError: there is such a setting; the message names the variable.
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
    """Makes JAX look for its devices now, before their errors come up at some unrelated place.

    Raises:
      UserError: there is no device of the kind that JAX_PLATFORMS names, or it cannot be used.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        wanted = os.environ.get(_PLATFORMS)
        reason = str(error).partition(" (set ")[0] or "there is none"
        if wanted:
            message = (
                f"{_PLATFORMS}={wanted}: no such device can be used here ({reason});"
                f" {_PLATFORMS}=cpu always can"
            )
        else:
            message = f"no device can be used here ({reason}); {_PLATFORMS}=cpu uses the processor"
        raise UserError(message) from None


def join_processes() -> None:
    """Makes this process one of several that train together, if the environment says so.

    $JAX_COORDINATOR_ADDRESS is host:port of the first process, $JAX_NUM_PROCESSES the number of
    processes, and $JAX_PROCESS_ID the index of this one, from 0. Where a cluster manager knows the
    last two (Slurm), the address is enough. Where it knows all three (TPU slices, on their own and
    in GKE), the address is "auto".

    Raises:
      UsageError: the numbers are no whole numbers, do not fit together, or are missing.
    """
    address = os.environ.get(COORDINATOR)
    if not address:
        return
    count = _whole_number(COUNT)
    index = _whole_number(INDEX)
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
            raise UsageError(
                f"{COORDINATOR}={AUTO}: this is no host of a TPU slice ({error}); give host:port"
            ) from None
        missing = [name for name, value in ((COUNT, count), (INDEX, index)) if value is None]
        if missing:
            raise UsageError(
                f"{COORDINATOR}={address}: no cluster manager tells the rest ({error}); set"
                f" {' and '.join(missing)} too"
            ) from None
        raise


def is_one_of_several() -> bool:
    """Returns whether this process was set up to run the command together with others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def disconnect(seconds: float) -> None:
    """Leaves the run's other processes; waits at most `seconds` for them to leave too."""
    import jax

    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(seconds)


def is_first() -> bool:
    """Returns whether this process is the first, or the only one, that runs the command."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first_decides(choose: Callable[[], int]) -> int:
    """Returns in all processes what `choose` returns in the first one."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if not jax.distributed.is_initialized():
        return choose()
    chosen = choose() if is_first() else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))


@contextmanager
def alone_fails() -> Iterator[None]:
    """Marks what one process does while the others wait for it.

    If it fails, the process must end at once, because the others end only when it is gone. So
    errors of users become LostProcess where there are other processes.
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


def _whole_number(variable: str) -> int | None:
    """Returns the value of an environment variable, or None if it is not set."""
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise UsageError(f"{variable}={text}: must be a whole number")
    return None if text is None else int(text)


def start(together: bool = False) -> None:
    """Does what every command that uses JAX must do first.

    Args:
      together: whether several processes may run the command as one.
    """
    check_settings()
    keep_compiled()
    use_all_cores()
    if together:
        join_processes()
    check_devices()
