"""What both stages share: the mesh, the tokenizer, and opening a workdir, resuming, and running the
loop in it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.config import Experiment, to_dict
from apr_jax.errors import UsageError, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.lease import Lease
from apr_jax.io.storage import write_text
from apr_jax.io.terminal import Terminal
from apr_jax.model.sharding import make_mesh
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint.manager import Checkpoints, Run
from apr_jax.train.distributed import lost_processes
from apr_jax.train.loop import Loop, Stage
from apr_jax.train.metrics.profile import profiled
from apr_jax.train.metrics.recorder import Recorder
from apr_jax.train.state import TrainState


def train(
    run: Run,
    workdir: Path,
    blank: TrainState,
    stage: Stage,
    restore_data: Callable[[dict[str, Any]], None],
    log_every: int,
    counted: tuple[str, ...],
    shown: tuple[str, ...],
    progress: bool,
    peak: float = 0.0,
    profile: int | None = None,
    bounds: Mapping[str, float] = MappingProxyType({}),
) -> TrainState:
    """Runs a stage in a workdir from where it was, or from `blank`, to its end.

    Args:
      blank: the state of step 0.
      restore_data: puts the data iterator where `stage.data_state` said it was.
      log_every, counted, shown, progress, ceiling, bounds: see `Recorder`.
      profile: step of which a profile is written to `workdir`/profile.

    Returns:
      the state of the last step.

    Raises:
      UsageError: `profile` is none of the steps that are left.
    """
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with (
        lost_processes(workdir),
        Lease(workdir, f"training, {run.stage}", together=True) as lease,
        Checkpoints(workdir, run, lease) as checkpoints,
    ):
        restored = checkpoints.restore_latest(blank)
        state, unvalidated = blank, False
        if restored is not None:
            state, unvalidated = restored.state, restored.unvalidated
            restore_data(restored.data)
        if jax.process_index() == 0:
            with disk_errors(workdir):
                write_text(
                    workdir / "config.json", json.dumps(to_dict(run.config), indent=2) + "\n"
                )
        start = int(state.step)
        if profile is not None:
            stage = dataclasses.replace(
                stage, advance=profiled(stage.advance, profile, start, stage.steps, workdir)
            )
        if start >= stage.steps and not unvalidated:
            return state
        with Recorder(
            workdir,
            start,
            stage.steps,
            log_every,
            run.stage,
            counted,
            shown,
            progress,
            peak,
            bounds,
            lease,
        ) as recorder:
            return Loop(stage, state, checkpoints, recorder, workdir, restored is not None).run(
                unvalidated
            )


def build_mesh(config: Experiment, devices: list[Any] | None = None) -> Mesh:
    """The config's mesh over these devices, by default all there are; raises UsageError if they
    don't fit it.

    Of a single process some may be left out: a laptop of 8 cores must not refuse an experiment of 4
    rows a step."""
    devices = _dividing(config) if devices is None else devices
    tensor = config.mesh.tensor or max(1, len(devices) // config.train.sft.batch_rows)
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, tensor, devices)
    except ValueError as error:
        raise UsageError(f"config {error}") from None


def _dividing(config: Experiment) -> list[Any]:
    """The most devices over which the rows of a step divide, if the config leaves their number
    open; else all.
    """
    devices, mesh, settings = jax.devices(), config.mesh, config.train
    if mesh.data or not mesh.tensor or jax.process_count() > 1:
        return devices
    rows = math.gcd(settings.sft.batch_rows, settings.rl.micro_batch_rows)
    shards = range(len(devices) // mesh.tensor, 0, -1)
    count = next((n * mesh.tensor for n in shards if rows % n == n % mesh.fsdp == 0), len(devices))
    if count < len(devices):
        Terminal(stderr=True).print(
            f"mesh: {count} of {len(devices)} devices are used:"
            f" train.sft.batch_rows={settings.sft.batch_rows} and"
            f" train.rl.micro_batch_rows={settings.rl.micro_batch_rows} divide over no more"
            " (mesh.tensor=0 lets the others share rows)",
            soft_wrap=True,
        )
    return devices[:count]


def read_tokenizer(data_dir: Path) -> Tokenizer:
    """The tokenizer that `apr data build` trained; raises UserError if it is missing or damaged."""
    path = Path(data_dir) / "tokenizer.model"
    try:
        return Tokenizer.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data {path}: {reason}; run `apr data build --out {data_dir}`") from None
