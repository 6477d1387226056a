"""How `apr check` and `apr task check` show what they found."""

import typer

_COLORS = {"ok": "green", "note": "yellow", "fault": "red"}


def print_finding(level: str, subject: str, text: str, remedy: str = "") -> None:
    """Prints a finding in a line, and what to change, if there is something, in a second one."""
    typer.echo(f"{typer.style(f'{level:5}', fg=_COLORS[level])}  {subject}: {text}")
    if remedy:
        typer.echo(f"       -> {remedy}")
