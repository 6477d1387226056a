"""A profile of one step: what host and devices did, operation by operation."""

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
    """`advance` that traces one step, and says where the trace is: in `workdir`/profile, for
    TensorBoard and Perfetto.

    The device is waited for before and after, so that the trace has this step and no other.

    Args:
      step: 1 is the first of the run.
      start: steps that are done.
      steps: of the whole run.

    Raises:
      UsageError: the run won't come to `step`, or JAX can't profile on this machine.
    """
    if not start < step <= steps:
        left = (
            f"steps {start + 1} to {steps} are left"
            if start < steps
            else f"all {steps} steps are done"
        )
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
    """JAX has tried libtpu and fallen back to the CPU.

    Its profiler is then registered but not initialised: a segfault.
    """
    tried = "tpu" in (jax.config.jax_platforms or "tpu")
    return (
        tried and jax.default_backend() != "tpu" and importlib.util.find_spec("libtpu") is not None
    )
