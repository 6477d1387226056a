"""The commands for whole experiments: `apr reproduce`, `apr ablation` and `apr report`."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.flags import ANYWHERE, HERE, Exclude, Settings
from apr_jax.cli.resumable import resumable
from apr_jax.errors import UsageError
from apr_jax.io.runtime import is_first, start
from apr_jax.paper import Only, Question
from apr_jax.scales import SCALES

paper_app = typer.Typer()


@paper_app.command(epilog="Example: apr reproduce --scale nano --out runs/nano")
def reproduce(
    out: Annotated[
        Path, typer.Option(help="Folder of the whole experiment. May be gs://.", **ANYWHERE)
    ],
    scale: Annotated[
        str | None, typer.Option(help=f"{', '.join(SCALES)}, or a file in ./experiments.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="An experiment file of your own instead of --scale. It is Python and is run.",
            **HERE,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder where the data are, or are to be built; default: OUT/data.", **ANYWHERE
        ),
    ] = None,
    only: Annotated[
        Only | None,
        typer.Option(
            help=(
                "training: no evaluation, which needs no pod; figures: evaluate and draw, train"
                " nothing."
            )
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Folder of another run whose models answer the problems of this one; nothing is"
                " trained. For fresh problems also give another data.seed, and --exclude its data."
            ),
            **ANYWHERE,
        ),
    ] = None,
    exclude: Exclude = None,
    settings: Settings = None,
) -> None:
    """Run a whole experiment: data, training, RL, evaluation, report.

    An experiment that was stopped goes on from there.
    """
    if (scale is None) == (config is None):
        raise UsageError("reproduce: give either --scale or --config")
    from apr_jax.config import load
    from apr_jax.paper.pipeline import reproduce as run
    from apr_jax.paper.pipeline import show_results
    from apr_jax.scales import scale_file

    experiment = load(config or scale_file(str(scale)), settings)
    start(together=True)
    with resumable(f"every finished stage and the last checkpoint are in {out}"):
        run(experiment, out, data, only, exclude or (), models)
    if is_first() and only != "training":
        show_results(out)


@paper_app.command(epilog="Example: apr ablation seeds --out runs/seeds")
def ablation(
    question: Annotated[Question, typer.Argument(help="Which question.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the ablation.", **HERE)],
    scale: Annotated[str, typer.Option(help="Scale of which the trainings are variants.")] = "nano",
    settings: Settings = None,
) -> None:
    """Answer a question that takes several trainings.

    An ablation that was stopped goes on from there.
    """
    from apr_jax.config import load
    from apr_jax.scales import scale_file

    experiment = load(scale_file(scale), settings)
    start(together=True)
    from apr_jax.paper.ablations import run_ablation, show_ablation

    with resumable(f"every finished stage and the last checkpoint are in {out}"):
        results = run_ablation(question, experiment, out)
    if is_first():
        show_ablation(results, out)


@paper_app.command(epilog="Example: apr report runs/nano")
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a finished `apr reproduce`.", **(ANYWHERE | {"metavar": "RUN"})
        ),
    ],
) -> None:
    """Draw the figures of a finished run and write its HTML report again."""
    from apr_jax.paper.pipeline import Folders, show_results, write_report

    start()
    write_report(Folders.of(run))
    show_results(run)
