"""Flags that several commands of `apr` take, declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from apr_jax.errors import UsageError
from apr_jax.io.storage import as_path, local_path, wait_for_bucket
from apr_jax.scales import SCALES


def _parser(read: Callable[[str], Path]) -> Callable[[str], Path]:
    """Makes the parser of a path for typer, which names the flag in the message of a ValueError."""

    def parse(text: str) -> Path:
        try:
            return read(text)
        except UsageError as error:
            raise ValueError(str(error)) from None

    return parse


def _anywhere(text: str) -> Path:
    """Reads the path of a file or folder, and waits for the bucket that it may be in.

    Raises:
      UsageError: there can be no such path.
      UserError: the bucket's service does not answer.
    """
    path = as_path(text)
    wait_for_bucket(path)
    return path


def _new_file(text: str) -> Path:
    """Reads the path of a file of this machine that a command writes at its end.

    It would be late to find then that the file cannot be written.

    Raises:
      UsageError: the path is a folder's, or its folder is missing.
    """
    path = local_path(text)
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; must be a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    return path


# Arguments of `typer.Option`. Every flag that names a file or folder has one of the three: a path
# of this machine or of a bucket, a path of this machine only, a file that is going to be written.
ANYWHERE: Any = {"parser": _parser(_anywhere), "metavar": "PATH", "show_default": False}
HERE: Any = {"parser": _parser(local_path), "metavar": "PATH", "show_default": False}
NEW_FILE: Any = {"parser": _parser(_new_file), "metavar": "FILE", "show_default": False}

Config = Annotated[
    Path,
    typer.Option(
        "--config",
        help=(
            "Experiment file, e.g. experiments/nano.py, or the name of a scale:"
            f" {', '.join(SCALES)}. The file is Python and is run: never give a stranger's."
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
            "Folder that `apr data build` wrote. By default the first of WORKDIR, WORKDIR/data,"
            " WORKDIR/../data and WORKDIR/../../data that holds data."
        ),
        **ANYWHERE,
    ),
]
Exclude = Annotated[
    list[Path] | None,
    typer.Option(
        "--exclude",
        help=(
            "Problems file, or folder of built data; repeatable. No problem is of the same group as"
            " one of these: in Countdown, none has the same numbers."
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
Tracker = Annotated[
    Literal["none", "tensorboard", "wandb"] | None,
    typer.Option(
        "--tracker",
        help=(
            "Also show the metrics in TensorBoard (files in WORKDIR/tensorboard) or in Weights &"
            " Biases; short for --set train.tracker=NAME."
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
    Path | None, typer.Option("--json", help="Also write the figures to this file.", **NEW_FILE)
]
