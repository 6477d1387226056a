"""The command `apr new`."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.flags import HERE

new_app = typer.Typer()


@new_app.command(epilog="Example: apr new word_sums --out my_tasks")
def new(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the task, in small letters, like word_sums.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the files; made if missing.", **HERE)
    ] = Path(),
) -> None:
    """Write a task, an experiment and a test to begin a task of your own with.

    All three work as they are, and no file is overwritten.
    """
    from apr_jax.new_task.write import write_new_task

    task, config, test = write_new_task(name, out)
    typer.echo(f"task: {task}\nexperiment: {config}\ntest: {test}")
    typer.echo(f"next: apr task check --config {config}")
