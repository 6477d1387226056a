"""The `apr train` commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apr_jax.cli.flags import ANYWHERE, Config, Data, Profile, Settings, Tracker, Workdir
from apr_jax.cli.resumable import resumable
from apr_jax.errors import UsageError
from apr_jax.io.runtime import start
from apr_jax.io.storage import nearby, require_reachable

if TYPE_CHECKING:
    from apr_jax.config import Experiment

train_app = typer.Typer(
    no_args_is_help=True, help="Supervised training, then reinforcement learning."
)


@train_app.command(
    "sft", epilog="Example: apr train sft --config experiments/nano.py --workdir runs/nano/apr/sft"
)
def sft(
    config: Config,
    workdir: Workdir,
    method: Annotated[
        str | None,
        typer.Option(
            help=(
                "Method whose demonstrations are imitated; by default the task's first parallel"
                " method, or file if data.demonstrations is a file."
            ),
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Model to start from: what `apr import` wrote, or a checkpoint. Its network and"
                " tokenizer are taken; build the data with the same --init."
            ),
            **ANYWHERE,
        ),
    ] = None,
    data: Data = None,
    tracker: Tracker = None,
    profile: Profile = None,
    settings: Settings = None,
) -> None:
    """Train on demonstrations. A run that was stopped goes on from its last checkpoint."""
    from apr_jax.config import load

    experiment = load(config, _with_tracker(settings, tracker))
    method = method or _default_method(experiment)
    data = data or _find_data([workdir], config)

    start(together=True)
    from apr_jax.train.sft import train_sft

    with resumable(lambda: _last_saved_step(workdir)):
        train_sft(experiment, data, workdir, method, profile=profile, init=init)
    typer.echo(f"checkpoint: {workdir}")


@train_app.command(
    "rl",
    epilog=(
        "Example: apr train rl --config experiments/nano.py --workdir runs/nano/apr/rl --init"
        " runs/nano/apr/sft"
    ),
)
def rl(
    config: Config,
    workdir: Workdir,
    init: Annotated[
        Path, typer.Option(help="Checkpoint to start from; it decides the method.", **ANYWHERE)
    ],
    data: Data = None,
    tracker: Tracker = None,
    profile: Profile = None,
    settings: Settings = None,
) -> None:
    """Train by reinforcement learning on whole thread trees.

    A run that was stopped goes on from its last checkpoint.
    """
    from apr_jax.config import load

    experiment = load(config, _with_tracker(settings, tracker))
    data = data or _find_data([workdir, init], config)

    start(together=True)
    from apr_jax.train.rl.trainer import train_rl

    with resumable(lambda: _last_saved_step(workdir)):
        train_rl(experiment, data, workdir, init, profile=profile)
    typer.echo(f"checkpoint: {workdir}")


def _with_tracker(settings: list[str] | None, tracker: str | None) -> list[str]:
    """Returns the settings of `--set`, with that of `--tracker` behind them if it is given."""
    given = list(settings or [])
    return given if tracker is None else [*given, f"train.tracker={tracker}"]


def _default_method(experiment: "Experiment") -> str:
    """Returns the first method of the task whose demonstrations spawn and fit the limits.

    If the demonstrations are a file's, returns the method of the file, which is the only one.

    Raises:
      UsageError: there is none.
    """
    from apr_jax.data import tree_files
    from apr_jax.data.build import fitting_methods
    from apr_jax.tasks import make_task

    if experiment.data.file:
        return tree_files.METHOD
    task = make_task(experiment.task, experiment.limits)
    for name in fitting_methods(task):
        if task.methods[name].parallel:
            return name
    raise UsageError(
        f"--method: task {experiment.task.kind!r} has no method whose demonstrations spawn within"
        f" limits.max_depth={experiment.limits.max_depth}; give one of"
        f" {', '.join(task.methods) or '(it has none)'}"
    )


def _find_data(folders: Sequence[Path], config: Path) -> Path:
    """Finds the built data that belongs to a run.

    Args:
      folders: the data are looked for in each of these, in its folder `data`, and in a folder
        `data` up to two levels above it. The first one that is found is taken.
      config: the experiment file, which the error message repeats.

    Raises:
      UsageError: there are no data.
    """
    for folder in folders:
        for candidate in [folder, *(parent / "data" for parent in nearby(folder))]:
            if (candidate / "data.json").is_file():
                return candidate

    # Perhaps a bucket cannot be reached; that is said before the data are called missing.
    for folder in folders:
        require_reachable(folder)
    raise UsageError(
        f"no data found near {folders[0]}: give --data DIR, or build it with "
        f"`apr data build --config {config} --out {folders[0] / 'data'}`"
    )


def _last_saved_step(workdir: Path) -> str:
    """Says which step of a run was saved last, for the message about an interruption."""
    from apr_jax.train.checkpoint.step_files import FOLDER, steps_in

    steps = steps_in(workdir / FOLDER)
    if not steps:
        return f"no step was saved yet in {workdir}"
    return f"step {steps[-1]} is saved in {workdir}"
