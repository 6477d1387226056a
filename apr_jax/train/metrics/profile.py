"""A profile of one step: what the host and the devices did, operation by operation."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax

from apr_jax.errors import UsageError
from apr_jax.io.storage import Mirror
from apr_jax.train.loop import Advance, Stopping
from apr_jax.train.state import TrainState

FOLDER = "profile"


def profiled(advance: Advance, step: int, start: int, steps: int, workdir: Path) -> Advance:
    """Wraps `advance` so that it traces one step, and prints where the trace is.

    The trace is in `workdir`/profile, for TensorBoard and Perfetto. The wrapper waits for the
    devices before and after the step, so that the trace holds this step and no other.

    Args:
      advance: takes a step, see `loop.Stage`.
      step: the step to trace; 1 is the first of the run.
      start: number of steps that are done.
      steps: steps of the whole run.
      workdir: folder of the run.

    Raises:
      UsageError: the run will not come to `step`, or JAX cannot profile on this machine.
    """
    if not start < step <= steps:
        if start < steps:
            left = f"steps {start + 1} to {steps} are left"
        else:
            left = f"all {steps} steps are done"
        raise UsageError(f"--profile {step}: of the run in {workdir} {left}")
    if _would_crash():
        raise UsageError(
            "--profile: libtpu is installed, but there is no TPU, and its profiler would crash: set"
            " JAX_PLATFORMS=cpu"
        )
    folder = workdir / FOLDER

    def advance_profiled(
        state: TrainState, done: int, stopping: Stopping
    ) -> tuple[TrainState, dict[str, Any] | None]:
        if done + 1 != step:
            return advance(state, done, stopping)
        jax.block_until_ready(state)
        with Mirror(folder) as mirror, jax.profiler.trace(mirror.local, create_perfetto_trace=True):
            state, metrics = advance(state, done, stopping)
            jax.block_until_ready(state)
        print(f"profile of step {step}: {folder}", file=sys.stderr)
        return state, metrics

    return advance_profiled


def _would_crash() -> bool:
    """Returns whether JAX has tried libtpu and fallen back to the CPU.

    The profiler of libtpu is then registered but not initialised, and its use is a segfault.
    """
    tried_tpu = "tpu" in (jax.config.jax_platforms or "tpu")
    fell_back = tried_tpu and jax.default_backend() != "tpu"
    return fell_back and importlib.util.find_spec("libtpu") is not None
