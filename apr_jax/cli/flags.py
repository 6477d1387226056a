"""Flags that several commands of `apr` take, declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from apr_jax.errors import UsageError
from apr_jax.io.storage import as_path, local_path


def _parser(read: Callable[[str], Path]) -> Callable[[str], Path]:
    """The reader of a path, as typer takes it: a ValueError is told with the name of the flag."""

    def parse(text: str) -> Path:
        try:
            return read(text)
        except UsageError as error:
            raise ValueError(str(error)) from None

    return parse


def _new_file(text: str) -> Path:
    """A file of this machine that is to be written when the work is done, which is late to find
    that it can't be.
    """
    path = local_path(text)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; must be a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    return path


# Every option that names a file or folder has one of these: a path here or in a bucket, or of this
# machine alone.
ANYWHERE: Any = {"parser": _parser(as_path), "metavar": "PATH", "show_default": False}
HERE: Any = {"parser": _parser(local_path), "metavar": "PATH", "show_default": False}
NEW_FILE: Any = {"parser": _parser(_new_file), "metavar": "FILE", "show_default": False}

Config = Annotated[
    Path,
    typer.Option(
        "--config",
        help=(
            "Experiment file, e.g. experiments/nano.py, or the name of a scale: nano, mini, paper."
            " The file is Python and is run: never give a stranger's."
        ),
        **HERE,
    ),
]
Workdir = Annotated[
    Path,
    typer.Option("--workdir", help="Folder of the run; made if missing. May be gs://.", **ANYWHERE),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help=(
            "What `apr data build` wrote; by default the first that holds data of WORKDIR,"
            " WORKDIR/data, WORKDIR/../data and WORKDIR/../../data."
        ),
        **ANYWHERE,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        help="A run's folder (its best or last step) or one step, or an exported file. May be gs://.",
        **ANYWHERE,
    ),
]
Profile = Annotated[
    int | None,
    typer.Option(
        "--profile",
        metavar="STEP",
        min=1,
        help=(
            "Write a profile of this step to WORKDIR/profile, for TensorBoard and ui.perfetto.dev."
        ),
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a field of the config; repeatable."
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file too.", **NEW_FILE)
]
