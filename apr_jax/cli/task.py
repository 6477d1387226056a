"""The `apr task` commands."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.findings import print_finding
from apr_jax.cli.flags import HERE, Settings
from apr_jax.errors import UsageError, UserError

task_app = typer.Typer(no_args_is_help=True, help="Tasks of your own.")


@task_app.callback()
def group() -> None:
    """Keeps `check` a command of its own while it is the only one."""


@task_app.command("check", epilog="Example: apr task check examples/anagrams.py:Anagrams")
def check(
    kind: Annotated[
        str | None,
        typer.Argument(
            help=(
                "The task: a short name, module:Class or file.py:Class. The file is Python and is"
                " run: never give a stranger's."
            ),
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Instead of KIND: an experiment, whose limits demonstrations are held to.",
            **HERE,
        ),
    ] = None,
    problems: Annotated[
        int, typer.Option(min=10, max=100_000, help="Number of problems to draw.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Which problems are drawn.")] = 0,
    time_limit: Annotated[
        float, typer.Option(min=0.01, help="Seconds that the score of one answer may take.")
    ] = 5.0,
    memory_limit: Annotated[
        float, typer.Option(min=0.1, help="GiB of address space that the scorer may take.")
    ] = 4.0,
    settings: Settings = None,
) -> None:
    """Try a task before anything is trained: problems, prompts, demonstrations, scores.

    Exit status 1 if there is a fault, with what to mend.
    """
    from apr_jax.config import load, task_from_settings
    from apr_jax.data.task_check import check_task
    from apr_jax.tasks import make_task

    if (kind is None) == (config is None):
        raise UsageError("task check: give either the task, or the experiment with --config")
    if config is not None:
        experiment = load(config, settings)
        task = make_task(experiment.task, experiment.limits)
    else:
        assert kind is not None
        task = make_task(task_from_settings(kind, settings or []))

    faults = 0
    for finding in check_task(
        task, problems, seed, time_limit, memory_limit, bounded=config is not None
    ):
        print_finding(finding.level, finding.subject, finding.text, finding.remedy)
        faults += finding.level == "fault"
    if faults:
        raise UserError(f"task {task.kind}: {faults} fault{'s' if faults > 1 else ''}; see above")
