"""The command `apr plan`."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.flags import HERE, Config, Json, Settings
from apr_jax.plan import Program

plan_app = typer.Typer()


@plan_app.command(epilog="Example: apr plan --config experiments/paper.py --topology v5e:8x8")
def plan(
    config: Config,
    topology: Annotated[
        str,
        typer.Option(
            help="Generation and chips, like v5e:4x4 or v4:2x2x4; cpu: this machine.",
            show_default=False,
        ),
    ],
    program: Annotated[
        list[Program] | None,
        typer.Option(help="Only this program; repeatable. Default: all four.", show_default=False),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            help="Plan for the network of this Hugging Face folder, of which config.json is read."
            " The config leaves its model open, like experiments/pretrained.py.",
            **HERE,
        ),
    ] = None,
    json: Json = None,
    settings: Settings = None,
) -> None:
    """Tell whether a run's programs fit on a TPU topology, how long they take, what limits them.

    The programs are compiled for the topology on this machine, which needs no TPU. Ends with status
    1 if a program does not compile or does not fit.
    """
    from apr_jax.config import load
    from apr_jax.plan.programs import adopt_pretrained, vocabulary
    from apr_jax.plan.show import show_topology

    experiment = load(config, settings)
    if network:
        experiment, vocab = adopt_pretrained(experiment, network)
    else:
        vocab = vocabulary(experiment)
    if not show_topology(experiment, topology, vocab, program or tuple(Program), json):
        raise typer.Exit(1)
