"""Flags that several commands of `apr` take, declared once."""

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from apr_jax.storage import as_path


class Program(enum.StrEnum):
    """The programs of a run, which `apr plan` compiles."""

    SUPERVISED = "supervised"
    ROLLOUT = "rollout"
    REPLAY = "replay"
    UPDATE = "update"


class Method(enum.StrEnum):
    """Whose demonstrations are imitated."""

    APR = "apr"
    APR_NESTED = "apr-nested"
    SOS_PLUS = "sos+"
    SOS = "sos"


class Question(enum.StrEnum):
    """What `apr study` answers."""

    SEEDS = "seeds"
    EARLY = "early"
    PRICE = "price"
    SERIAL = "serial"
    SCRATCH = "scratch"
    NESTED = "nested"


Only = Literal["training", "figures"]  # Parts of `apr reproduce`.

# Of options that name a folder here or in a bucket.
ANYWHERE: Any = {"parser": as_path, "metavar": "PATH", "show_default": False}

Config = Annotated[
    Path,
    typer.Option(
        "--config",
        help="Experiment file, e.g. experiments/nano.py. It is Python and is run: never give a stranger's.",
        show_default=False,
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
        help="What `apr data build` wrote; by default the first that holds data of WORKDIR, WORKDIR/data, "
        "WORKDIR/../data and WORKDIR/../../data.",
        **ANYWHERE,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        help="A run's folder (its best or last step) or one step, both may be gs://; or a kept file of this machine.",
        **ANYWHERE,
    ),
]
Profile = Annotated[
    int | None,
    typer.Option(
        "--profile",
        metavar="STEP",
        min=1,
        help="Write a profile of this step to WORKDIR/profile, for TensorBoard and ui.perfetto.dev.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the config; repeatable.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.", show_default=False)]
