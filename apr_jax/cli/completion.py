"""The command `apr completion`."""

import enum
from typing import Annotated

import typer
from typer.completion import get_completion_script

completion_app = typer.Typer()


class Shell(enum.StrEnum):
    """Shells for which typer writes a completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@completion_app.command(epilog="Example: apr completion bash >> ~/.bashrc")
def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell.", show_default=False)],
) -> None:
    """Print the script by which a shell completes commands and flags of `apr`."""
    script = get_completion_script(prog_name="apr", complete_var="_APR_COMPLETE", shell=shell.value)
    typer.echo(script)
