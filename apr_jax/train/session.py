"""What both stages of training share.

`train` opens a workdir, resumes the run in it, and runs the loop. `build_mesh` chooses the devices,
`read_tokenizer` loads the tokenizer of the data, and `adopt_network` takes the network of the model
from which a training starts.
"""

import dataclasses
import functools
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
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.terminal import Terminal
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import Checkpoints, Run
from apr_jax.train.distributed import lost_processes
from apr_jax.train.loop import Loop, Stage
from apr_jax.train.metrics.profile import profiled
from apr_jax.train.metrics.recorder import Recorder
from apr_jax.train.metrics.trackers import open_tracker
from apr_jax.train.state import TrainState
from apr_jax.train.validation_file import ValidationFile
from apr_jax.train.watchdog import Watchdog

# Fields of the model that say how it is computed and kept, and what an export tells others, and not
# which network it is.
_CHOSEN = ("dtype", "param_dtype", "remat", "max_positions")


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
    """Runs a stage in a workdir to its end, from where an earlier start left it.

    Args:
      run: what stays the same through the run.
      workdir: folder of the run.
      blank: the state of step 0, from which a new run begins.
      stage: what is trained.
      restore_data: puts the data iterator where `stage.data_state` said it was.
      log_every: steps between two lines of metrics, see `Recorder`.
      counted: metrics whose throughput is measured.
      shown: metrics that the terminal shows.
      progress: whether the terminal shows a progress bar.
      peak: FLOP/s that the machine can do; 0 if that is not known.
      profile: step of which a profile is written to `workdir`/profile, or None.
      bounds: metric -> the bound above which a step is reported.

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
        # Within, too: the checkpoints must know of a loss when they are left, or they would wait
        # for the lost process to take part in the save under way, until heartbeats are missed.
        lost_processes(workdir),
    ):
        state = blank
        unvalidated = False
        restored = checkpoints.restore_latest(blank)
        if restored is not None:
            state = restored.state
            unvalidated = restored.unvalidated
            restore_data(restored.data)

        if jax.process_index() == 0:
            with disk_errors(workdir):
                write_json(workdir / "config.json", to_dict(run.config))

        start = int(state.step)
        resumed = restored is not None
        if profile is not None:
            advance = profiled(stage.advance, profile, start, stage.steps, workdir)
            stage = dataclasses.replace(stage, advance=advance)
        if start >= stage.steps and not unvalidated:
            return state

        with Recorder(
            workdir,
            start,
            stage.steps,
            log_every,
            run.stage,
            counted=counted,
            shown=shown,
            progress=progress,
            peak=peak,
            bounds=bounds,
            lease=lease,
            open_tracker=functools.partial(
                open_tracker,
                run.config.train.tracker,
                title=f"{run.config.name} {run.method} {run.stage}",
                config=to_dict(run.config),
            ),
        ) as recorder:
            validation_file = ValidationFile(workdir, lease)
            settings = run.config.train
            with Watchdog(
                workdir, start, settings.hang_factor, settings.hang_seconds, lease
            ) as watchdog:
                loop = Loop(
                    stage,
                    state,
                    checkpoints,
                    recorder,
                    watchdog,
                    validation_file,
                    workdir,
                    resumed,
                )
                # The loop alone holds the state. What else held the first one would keep its memory
                # throughout the run.
                del blank, state, restored
                return loop.run(unvalidated)


def build_mesh(config: Experiment, devices: list[Any] | None = None) -> Mesh:
    """Makes the config's mesh over the given devices, by default over all there are.

    If the config leaves their number open, a single process may leave some of its devices out: an
    experiment of 4 rows a step is not refused on a laptop of 8 cores.

    Raises:
      UsageError: the devices do not fit the config's mesh.
    """
    if devices is None:
        devices = _dividing_devices(config)
    tensor = config.mesh.tensor or max(1, len(devices) // config.train.sft.batch_rows)
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, tensor, devices)
    except ValueError as error:
        raise UsageError(f"config {error}") from None


def _dividing_devices(config: Experiment) -> list[Any]:
    """Returns the most devices over which the rows of a step divide.

    If the config fixes the number of devices, or the run has several processes, it returns all.
    """
    devices = jax.devices()
    mesh = config.mesh
    sft = config.train.sft
    rl = config.train.rl
    if mesh.data or not mesh.tensor or jax.process_count() > 1:
        return devices

    rows = math.gcd(sft.batch_rows, rl.micro_batch_rows)
    if rl.max_staleness:
        rows = math.gcd(rows, rl.problems)  # Each shard has its own share of the groups.
    count = len(devices)
    for shards in range(len(devices) // mesh.tensor, 0, -1):
        if rows % shards == 0 and shards % mesh.fsdp == 0:
            count = shards * mesh.tensor
            break

    if count < len(devices):
        Terminal(stderr=True).print(
            f"mesh: {count} of {len(devices)} devices are used:"
            f" train.sft.batch_rows={sft.batch_rows} and"
            f" train.rl.micro_batch_rows={rl.micro_batch_rows} divide over no more"
            " (other rows take all of them; so does mesh.tensor=0, by which devices share rows,"
            " where there are at least twice as many devices as rows)",
            soft_wrap=True,
        )
    return devices[:count]


def read_tokenizer(data_dir: Path) -> Tokenizer:
    """Loads the tokenizer that `apr data build` trained.

    Raises:
      UserError: it is missing or damaged.
    """
    path = Path(data_dir) / "tokenizer.model"
    try:
        return tokenizer_from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data {path}: {reason}; run `apr data build --out {data_dir}`") from None


def adopt_network(config: Experiment, network: ModelConfig, path: str) -> Experiment:
    """Returns the experiment with the network of the model from which its training starts.

    What the experiment says about the network must be so. If it leaves the sizes open, it says only
    what differs from the defaults. How the network is computed and kept (`dtype`, `param_dtype`,
    `remat`) is its own choice, and so is the longest text if it says one (`adopt_positions`).

    Args:
      config: the experiment.
      network: the shape of that model.
      path: of that model, for messages.

    Raises:
      UsageError: the experiment has another network; names the first field.
    """
    wanted = adopt_positions(config, network).model
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        value = getattr(wanted, name)
        if name in _CHOSEN or (wanted.is_open and value == field.default):
            continue
        if value != getattr(network, name):
            raise UsageError(
                f"config model.{name}={value!r}: {path} has {getattr(network, name)!r}; give the"
                " same, or leave the model's sizes at 0 to take its network"
            )
    own = {name: getattr(wanted, name) for name in _CHOSEN}
    return dataclasses.replace(config, model=dataclasses.replace(network, **own))


def adopt_positions(config: Experiment, network: ModelConfig) -> Experiment:
    """Returns the experiment with the longest text of another model, if it says none itself."""
    if config.model.max_positions != ModelConfig.max_positions:
        return config
    model = dataclasses.replace(config.model, max_positions=network.max_positions)
    return dataclasses.replace(config, model=model)
