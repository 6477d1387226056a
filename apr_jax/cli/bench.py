"""The `apr bench` commands."""

import dataclasses
import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from apr_jax.bench.paired import Result, measured, write
from apr_jax.cli.flags import ANYWHERE, HERE, Json, Settings
from apr_jax.errors import UsageError
from apr_jax.io.json_files import write_json
from apr_jax.io.runtime import start

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure the throughput of each part against named alternatives."
)


class Shape(enum.StrEnum):
    """Models that the benchmarks know by name (`bench/plain_decoding.py`)."""

    NANO = "nano"
    MINI = "mini"


class Dtype(enum.StrEnum):
    """Types in which a model is computed."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Repeats = Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.", min=5)]
BenchConfig = Annotated[
    Path,
    typer.Option("--config", help="Experiment file or scale.", **(HERE | {"show_default": True})),
]
Grower = Annotated[
    Path, typer.Option("--checkpoint", help="Model that grows the trees.", **ANYWHERE)
]
Answered = Annotated[
    Path,
    typer.Option("--problems", help="Problems file that the checkpoint answers.", **ANYWHERE),
]
_NANO = Path("nano")


@bench_app.command(
    "rollout",
    epilog=(
        "Example: apr bench rollout --checkpoint runs/nano/apr/rl --problems"
        " runs/nano/data/test.jsonl"
    ),
)
def bench_rollout(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Also measure whole thread trees of this model.", **ANYWHERE)
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="Problems file that the checkpoint answers.", **ANYWHERE)
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Only this other engine; repeatable. Default: all installed."),
    ] = None,
    repeats: Repeats = 5,
    json: Json = None,
) -> None:
    """Measure the rollout on the device against transformers, llama.cpp and vLLM.

    The parts are plain decoding, whole thread trees, and the latency of one tree.
    """
    if (checkpoint is None) != (problems is None):
        raise UsageError("bench rollout: give both --checkpoint and --problems, or neither")
    start()
    from apr_jax.bench.engines import bench_rollout as run
    from apr_jax.train.checkpoint import load_checkpoint

    restored = load_checkpoint(checkpoint) if checkpoint else None
    _save_each(run(restored, problems, peer or [], repeats), json)


@bench_app.command(
    "decode",
    epilog="Example: apr bench decode --model runs/smollm2/model.safetensors",
)
def bench_decode(
    model: Annotated[
        Path,
        typer.Option(
            help="File that `apr import` or `apr export` wrote, or a workdir.", **ANYWHERE
        ),
    ],
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences decoded at once; repeatable. Default: 1 and 16.", min=1),
    ] = None,
    new: Annotated[int, typer.Option(help="Tokens decoded after each prompt.", min=1)] = 128,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of all weights and of the computation.")
    ] = Dtype.FLOAT32,
    devices: Annotated[
        int, typer.Option(help="Devices of our engine; on CPU one device uses all cores.", min=1)
    ] = 1,
    tensor: Annotated[
        int, typer.Option(help="Devices that share the work on each sequence.", min=1)
    ] = 1,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Only this other engine; repeatable. Default: all installed."),
    ] = None,
    repeats: Repeats = 5,
    json: Json = None,
) -> None:
    """Measure plain decoding of a model against other engines, and against the memory's limit."""
    start()
    from apr_jax.bench import decode_model
    from apr_jax.train.checkpoint import load_pretrained

    layout = decode_model.Layout(devices, tensor)
    pretrained = load_pretrained(model)
    config = dataclasses.replace(pretrained.model, dtype=dtype.value)
    about = decode_model.described(pretrained, config, new, layout)
    parts = []
    for part in decode_model.bench_decode(
        pretrained, config, batch or [1, 16], new, layout, peer or [], repeats
    ):
        parts.append(dataclasses.asdict(part))
        if json:
            write_json(json, about | {"parts": parts})


@bench_app.command(
    "schedule",
    epilog=(
        "Example: apr bench schedule --checkpoint runs/nano/apr/rl --problems"
        " runs/nano/data/test.jsonl"
    ),
)
def bench_schedule(
    checkpoint: Grower,
    problems: Answered,
    trees: Annotated[
        int, typer.Option(help="Trees of a rollout: one for each of the first problems.", min=2)
    ] = 256,
    repeats: Repeats = 5,
    json: Json = None,
) -> None:
    """Measure the checkpoint's schedule against others that differ in one field."""
    start()
    from apr_jax.bench.schedules import contest
    from apr_jax.bench.trees import prompts_of
    from apr_jax.train.checkpoint import load_checkpoint

    restored = load_checkpoint(checkpoint)
    contestants = contest(restored, prompts_of(restored, problems, trees))
    _save_each([measured("schedule", contestants, repeats)], json)


@bench_app.command(
    "carry-over",
    epilog=(
        "Example: apr bench carry-over --checkpoint runs/nano/apr/rl --problems"
        " runs/nano/data/test.jsonl"
    ),
)
def bench_carry_over(
    checkpoint: Grower,
    problems: Answered,
    groups: Annotated[
        int, typer.Option(help="Groups of trees: one for each of the first problems.", min=2)
    ] = 64,
    slots: Annotated[
        list[int] | None,
        typer.Option(help="Decode slots; repeatable. Default: the checkpoint's own.", min=1),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of RL that are counted.", min=10)] = 40,
    json: Json = None,
) -> None:
    """Count the decode steps that `train.rl.max_staleness` saves, on trees of a trained model.

    The trees are rolled out once. Their steps of RL are then counted on one device.
    """
    start()
    from apr_jax.bench.carry_over import compare, record_groups, show
    from apr_jax.bench.trees import prompts_of
    from apr_jax.train.checkpoint import load_checkpoint

    restored = load_checkpoint(checkpoint)
    recorded = record_groups(restored, prompts_of(restored, problems, groups))
    chosen = slots or [restored.config.schedule.slots]
    comparisons = compare(recorded, restored.config.train.rl.problems, chosen, steps)
    show(comparisons)
    if json:
        write_json(json, [dataclasses.asdict(comparison) for comparison in comparisons])


@bench_app.command("cache", epilog="Example: apr bench cache --shape mini")
def bench_cache(
    shape: Annotated[Shape, typer.Option(help="Shape of the model.")] = Shape.MINI,
    repeats: Repeats = 5,
    json: Json = None,
) -> None:
    """Measure layouts of the key/value cache, at the attention of a decode step."""
    start()
    from apr_jax.bench.cache_layouts import contest

    _save_each([measured(f"cache, {shape.value}", contest(shape.value), repeats)], json)


@bench_app.command("train", epilog="Example: apr bench train --config experiments/mini.py")
def bench_train(
    config: BenchConfig = Path("mini"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Also measure the parts of an RL step of this model.", **ANYWHERE),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="Problems file that the checkpoint answers.", **ANYWHERE)
    ] = None,
    repeats: Repeats = 5,
    json: Json = None,
    settings: Settings = None,
) -> None:
    """Measure the supervised step against transformers in torch, and the parts of an RL step.

    The supervised step is also measured against the machine's matrix products and on padded rows.
    """
    if (checkpoint is None) != (problems is None):
        raise UsageError("bench train: give both --checkpoint and --problems, or neither")
    from apr_jax.config import load

    experiment = load(config, settings)
    start()
    from apr_jax.bench.train_step import bench_train as run
    from apr_jax.train.checkpoint import load_checkpoint

    restored = load_checkpoint(checkpoint) if checkpoint else None
    _save_each(run(experiment, restored, problems, repeats), json)


@bench_app.command("solver", epilog="Example: apr bench solver --config experiments/nano.py")
def bench_solver(
    config: BenchConfig = _NANO,
    problems: Annotated[
        int | None,
        typer.Option(
            help=(
                "Instead of the speed, measure success and length of the demonstrations of this"
                " many random problems."
            ),
            min=1,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "With --problems: only demonstrations by this method; repeatable. Default: all"
                " methods that fit the limits."
            )
        ),
    ] = None,
    repeats: Repeats = 5,
    json: Json = None,
    settings: Settings = None,
) -> None:
    """Measure how fast demonstrations are made, on all cores against one core.

    With --problems, tell how good and how long they are instead.
    """
    from apr_jax.bench.demonstrators import check_demonstrator, contest, rate
    from apr_jax.config import load
    from apr_jax.data.build import check_methods, fitting_methods
    from apr_jax.report.terminal_tables import print_demonstrations
    from apr_jax.tasks import make_task

    experiment = load(config, settings)
    check_demonstrator(experiment)
    if problems is not None:
        methods = method or fitting_methods(make_task(experiment.task, experiment.limits))
        check_methods(experiment, methods)
        rates = rate(experiment, methods, problems)
        print_demonstrations(rates)
        if json:
            write_json(json, rates)
        return

    with contest(experiment) as contestants:
        _save_each([measured("solver", contestants, repeats)], json)


def _save_each(parts: Iterable[Result], json: Path | None) -> None:
    """Measures part after part, and writes all results after each of them.

    A bench that is stopped leaves the results that it has.

    Args:
      parts: an iterator, which measures when it is asked for the next part.
      json: the file that is written; None writes nothing.
    """
    results: list[Result] = []
    for result in parts:
        results.append(result)
        if json:
            write(results, json)
