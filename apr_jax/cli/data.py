"""The `apr data` commands."""

from pathlib import Path
from typing import Annotated

import typer

from apr_jax.cli.flags import ANYWHERE, Config, Exclude, Settings
from apr_jax.cli.resumable import resumable

data_app = typer.Typer(no_args_is_help=True, help="Problems, demonstrations and tokenizer.")


@data_app.command(
    "build", epilog="Example: apr data build --config experiments/nano.py --out runs/nano/data"
)
def build(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder to build in. May be gs://.", **ANYWHERE)],
    exclude: Exclude = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Method of the demonstrations; repeatable. Default: all methods of the task that"
                " fit the limits."
            ),
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help=(
                "The model that will learn from the data, as given to `apr train sft --init`: its"
                " tokenizer is taken."
            ),
            **ANYWHERE,
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Build problems, demonstrations and the tokenizer, on all cores.

    Says at the end how accurate and how long the demonstrations are.
    """
    from apr_jax.config import load
    from apr_jax.data.build import build as run
    from apr_jax.data.build import few_problems, problem_counts
    from apr_jax.evaluate.cells import print_warnings
    from apr_jax.report.terminal_tables import print_demonstrations

    experiment = load(config, settings)
    tokenizer = None
    if init:
        from apr_jax.train.checkpoint import load_pretrained

        tokenizer = load_pretrained(init).tokenizer
    with resumable(f"parts that were finished are in {out}"):
        built = run(experiment, out, exclude or (), method or None, tokenizer=tokenizer)
    print_demonstrations(built)
    counts = ", ".join(f"{count:,} of {split}" for split, count in problem_counts(out).items())
    typer.echo(f"problems: {counts}")
    if few := few_problems(experiment, out):
        print_warnings([few])
    typer.echo(f"data: {out}")
