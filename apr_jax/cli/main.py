"""The parser of the `apr` command and its way out.

Every error that a user can cause becomes one line on standard error; APR_DEBUG=1 shows tracebacks.

Exit status: 0 done, 1 failed, 2 wrong use of a command, 75 a training hung (train/watchdog.py), 129
SIGHUP, 130 Ctrl-C, 143 SIGTERM.
"""

import errno
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from typer.completion import completion_init

from apr_jax import __version__
from apr_jax.cli.bench import bench_app
from apr_jax.cli.check import check_app
from apr_jax.cli.completion import completion_app
from apr_jax.cli.data import data_app
from apr_jax.cli.models import models_app
from apr_jax.cli.new import new_app
from apr_jax.cli.paper import paper_app
from apr_jax.cli.plan import plan_app
from apr_jax.cli.resumable import Interrupted
from apr_jax.cli.task import task_app
from apr_jax.cli.train import train_app
from apr_jax.errors import DiskError, LostProcess, Stopped, UsageError, UserError
from apr_jax.io.runtime import disconnect, is_one_of_several
from apr_jax.io.subprocesses import protect_imports
from apr_jax.io.terminal import one_line, serve_any_encoding

# Exit statuses of commands that a signal ended: 128 + the number of the signal.
INTERRUPTED = 130
STOPPED = {143: "SIGTERM", 129: "SIGHUP"}

# After an error, how long a process waits for the others to meet the same error and say so.
_PARTING_SECONDS = 15

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run language models that reason as a tree of threads.",
)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(task_app, name="task")
# Without a name, the commands of a group become commands of `apr` itself.
app.add_typer(models_app)
app.add_typer(paper_app)
app.add_typer(plan_app)
app.add_typer(check_app)
app.add_typer(new_app)
app.add_typer(completion_app)
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    """Prints the version and ends the command, if `--version` was given."""
    if wanted:
        typer.echo(f"apr_jax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main() -> None:
    """Runs the command of this process's arguments and ends the process (the console script)."""
    protect_imports()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit status.

    An error is told in one line on standard error. After a DiskError or a LostProcess, and after
    any error in one process of several, the process ends instead of returning: an orderly end would
    wait for the others for minutes, and they, in a collective, for this one.
    """
    serve_any_encoding()
    completion_init()  # A shell that asks for completions is answered by `app`.
    try:
        return app(arguments, prog_name="apr", standalone_mode=False) or 0
    except SystemExit as end:
        return _end_of_training(end)
    except BaseException as error:
        if os.environ.get("APR_DEBUG"):
            traceback.print_exc()
        message, status = _explain(error)
        if message:
            was_stopped = status == INTERRUPTED or isinstance(error, Stopped)
            prefix = "" if was_stopped else "error: "
            typer.echo(f"apr: {prefix}{message}", err=True)
        if isinstance(error, DiskError | LostProcess):
            leave(status)
        if is_one_of_several():
            disconnect(_PARTING_SECONDS)
            leave(status)
        return status


def _end_of_training(end: SystemExit) -> int:
    """Returns the exit status of a SystemExit.

    A training that has saved its state on a signal ends with one, and says so here.
    """
    status = end.code if isinstance(end.code, int) else 1
    if status in STOPPED:
        message = (
            f"apr: stopped by {STOPPED[status]}; the run is saved; the same command goes on from"
            " there"
        )
        # A terminal that was closed takes no more text.
        with suppress(OSError):
            typer.echo(message, err=True)
    return status


def leave(status: int) -> None:
    """Ends the process at once.

    An orderly end would wait for another process that is lost, or try to write to a full disk.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _explain(error: BaseException) -> tuple[str, int]:
    """Returns the one line about an error, which may be empty, and the exit status."""
    text = one_line(str(error))
    if isinstance(error, KeyboardInterrupt | typer.Abort | Interrupted):
        return text or "interrupted", INTERRUPTED
    if isinstance(error, Stopped):
        return text, 128 + error.number
    if isinstance(error, UsageError):
        return text, 2
    if isinstance(error, UserError):
        return text, 1
    if isinstance(error, typer.TyperException):
        message = one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        # A command group without a command has shown its help; its message is empty.
        return message and f"{message}; see `apr --help`", 2
    if isinstance(error, OSError):
        return _explain_os_error(error), 1
    if _is_shortage(error):
        detail = text or type(error).__name__
        return f"too little memory, or too few threads, for this run here ({detail})", 1
    return _explain_unknown(error), 1


def _explain_os_error(error: OSError) -> str:
    """Returns the line about an error of the operating system."""
    if error.errno == errno.ENOSPC:
        return (
            f"no space left on the disk while writing {error.filename or 'a file'}; what was saved"
            " before is kept; make room, start again"
        )
    reason = error.strerror or str(error)
    return one_line(f"{error.filename}: {reason}" if error.filename else reason)


def _is_shortage(error: BaseException) -> bool:
    """Whether memory or threads have run out, here or on a device."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in text
        or "can't start new thread" in text
    )


def _explain_unknown(error: BaseException) -> str:
    """Returns the line about an error that nobody foresaw.

    An error without a message is described by the place where it was raised.
    """
    name = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not str(error) and frames:
        description = f"{name} in {Path(frames[-1].filename).name}, line {frames[-1].lineno}"
    else:
        description = f"{name}: {error}"
    return f"{one_line(description)}; APR_DEBUG=1 shows where"
