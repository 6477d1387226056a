"""The `apr` command: parses flags, calls the library, and turns every error that a user can cause
into one line.

Exit status: 0 done, 1 failed, 2 asked for in a wrong way, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP. Set
APR_DEBUG=1 for tracebacks. Whatever needs JAX is imported inside the command, so that `apr --help`
answers at once."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apr_jax import __version__
from apr_jax.cli.bench import bench_app
from apr_jax.cli.flags import (
    ANYWHERE,
    HERE,
    NEW_FILE,
    Checkpoint,
    Config,
    Data,
    Json,
    Profile,
    Settings,
    Workdir,
)
from apr_jax.errors import DiskError, LostProcess, Stopped, UsageError, UserError
from apr_jax.io.runtime import is_first, start
from apr_jax.io.storage import nearby, require_reachable
from apr_jax.io.subprocesses import protect_imports
from apr_jax.io.terminal import serve_any_encoding, visible
from apr_jax.paper import Only, Question
from apr_jax.plan import Program

if TYPE_CHECKING:
    from apr_jax.config import Experiment

INTERRUPTED = 130  # 128 + the signal's number.
STOPPED = {143: "SIGTERM", 129: "SIGHUP"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run language models that reason as a tree of threads.",
)
data_app = typer.Typer(no_args_is_help=True, help="Problems, demonstrations and tokenizer.")
train_app = typer.Typer(
    no_args_is_help=True, help="Supervised training, then reinforcement learning."
)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    """Prints the version and ends, if that is wanted."""
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


@data_app.command(
    "build", epilog="Example: apr data build --config experiments/nano.py --out runs/nano/data"
)
def data_build(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder to build in. May be gs://.", **ANYWHERE)],
    exclude: Annotated[
        Path | None,
        typer.Option(
            help="Problems file; none of its problems occurs in training, validation or test.",
            **ANYWHERE,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the demonstrations; repeatable. Default: all of the task that fit the limits.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Build problems, demonstrations and the tokenizer, on all cores; says how good the solvers
    are.
    """
    from apr_jax.config import load
    from apr_jax.data.build import build
    from apr_jax.report.terminal_tables import print_demonstrations

    with goes_on(f"parts that were finished are in {out}"):
        built = build(load(config, settings), out, exclude, method or None)
    print_demonstrations(built)
    typer.echo(f"data: {out}")


@train_app.command(
    "sft", epilog="Example: apr train sft --config experiments/nano.py --workdir runs/nano/apr/sft"
)
def train_sft(
    config: Config,
    workdir: Workdir,
    method: Annotated[
        str | None,
        typer.Option(
            help="Whose demonstrations to imitate; by default the task's first parallel method.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    profile: Profile = None,
    settings: Settings = None,
) -> None:
    """Train on demonstrations. A run that was stopped goes on from its last checkpoint."""
    from apr_jax.config import load

    experiment = load(config, settings)
    method = method or _parallel_method(experiment)
    data = data or find_data([workdir], config)
    start(together=True)
    from apr_jax.train.sft import train_sft as train

    with goes_on(lambda: _saved(workdir)):
        train(experiment, data, workdir, method, profile=profile)
    typer.echo(f"checkpoint: {workdir}")


@train_app.command(
    "rl",
    epilog=(
        "Example: apr train rl --config experiments/nano.py --workdir runs/nano/apr/rl --init"
        " runs/nano/apr/sft"
    ),
)
def train_rl(
    config: Config,
    workdir: Workdir,
    init: Annotated[
        Path, typer.Option(help="Checkpoint to start from; it decides the method.", **ANYWHERE)
    ],
    data: Data = None,
    profile: Profile = None,
    settings: Settings = None,
) -> None:
    """Reinforcement learning over whole thread trees.

    A run that was stopped goes on from its last checkpoint.
    """
    from apr_jax.config import load

    experiment = load(config, settings)
    data = data or find_data([workdir, init], config)
    start(together=True)
    from apr_jax.train.rl.trainer import train_rl as train

    with goes_on(lambda: _saved(workdir)):
        train(experiment, data, workdir, init, profile=profile)
    typer.echo(f"checkpoint: {workdir}")


@app.command(
    "eval",
    epilog=(
        "Example: apr eval --checkpoint runs/nano/apr/rl --problems runs/nano/data/test.jsonl --out"
        " runs/nano/mine"
    ),
)
def evaluate(
    checkpoint: Checkpoint,
    problems: Annotated[
        Path, typer.Option(help="Problems file, one JSON object a line.", **ANYWHERE)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for traces.jsonl and summary.json.", **ANYWHERE)
    ],
    condition: Annotated[
        int | None,
        typer.Option(
            help=(
                "A number that the prompts state, if the model was trained with one: of child"
                " threads (Countdown's APR) or of window bins (SoS+)."
            ),
            min=0,
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Positions a thread may occupy, instead of the model's own.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Trees a problem.", min=1)] = 1,
    temperature: Annotated[
        float, typer.Option(help="Of the sampling; 0 is greedy.", min=0.0)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the k most likely tokens only; 0 is all.", min=0)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Draw from the fewest likely tokens that reach this probability.",
            min=0.01,
            max=1.0,
        ),
    ] = 1.0,
    force_children: Annotated[
        int | None,
        typer.Option(help="Hold every root to exactly so many children, over its spawns.", min=0),
    ] = None,
    constrain: Annotated[
        bool | None,
        typer.Option(
            "--constrain/--no-constrain",
            help=(
                "Draw no token that the thread protocol does not allow; by default as the model was"
                " trained."
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Evaluate any checkpoint on any problems file; the checkpoint is all it needs."""
    start()
    from apr_jax.evaluate.decoding import Decoding, task_of
    from apr_jax.evaluate.runner import evaluate as run
    from apr_jax.report.terminal_tables import print_table
    from apr_jax.tasks import load_problems
    from apr_jax.train.checkpoint.manager import load_checkpoint

    with goes_on(f"the trees that were decoded are in {out}"):
        restored = load_checkpoint(checkpoint)
        wanted = load_problems(problems, task_of(restored))
        decoding = Decoding(
            samples, temperature, top_k, top_p, window, condition, force_children, constrain
        )
        summary = run(restored, wanted, out, decoding)
    print_table({f"{restored.method} {restored.stage}": summary})
    typer.echo(f"traces and summary: {out}")


@app.command(
    epilog='Example: apr solve "22 26 2 -> 46" --checkpoint runs/nano/apr/rl --html tree.html'
)
def solve(
    problem: Annotated[
        str,
        typer.Argument(
            help='As the task writes it; of Countdown numbers and target: "22 26 2 -> 46".',
            show_default=False,
        ),
    ],
    checkpoint: Checkpoint,
    html: Annotated[
        Path | None, typer.Option(help="Write the viewer of the tree to this file.", **NEW_FILE)
    ] = None,
) -> None:
    """Solve one problem and show its thread tree."""
    start()
    from apr_jax.evaluate.decoding import task_of
    from apr_jax.report.solve import solve as run
    from apr_jax.train.checkpoint.manager import load_checkpoint

    restored = load_checkpoint(checkpoint)
    run(restored, task_of(restored).parse(problem), html)


@app.command(
    epilog=(
        "Example: apr export --checkpoint runs/mini/apr/rl --out experiments/mini/apr.safetensors"
    )
)
def export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "FILE.safetensors: one small file, which every --checkpoint takes. Any other name:"
                " a new folder, or that of an "
                "earlier export, in the form of Hugging Face."
            ),
            **HERE,
        ),
    ],
) -> None:
    """Write a model as one small file (bfloat16), or as a Hugging Face Llama with its tokenizer.

    The folder is what transformers loads, and vLLM, which reads the same files. llama.cpp needs a
    GGUF file: its converter was not tried on this folder. All of them write one thread; none starts
    the children of a <spawn> block."""
    from apr_jax.train.checkpoint.exported import SUFFIX, export_file
    from apr_jax.train.checkpoint.hf_folder import check_folder, export_folder
    from apr_jax.train.checkpoint.manager import load_checkpoint

    one_file = out.suffix == SUFFIX
    if not one_file:
        try:
            check_folder(out)
        except UsageError as error:
            raise UsageError(f"--out {error}") from None
    start()
    restored = load_checkpoint(checkpoint)
    if one_file:
        export_file(restored, out)
    else:
        export_folder(restored, out)
    typer.echo(f"model{'' if one_file else ' and tokenizer'}: {out}")


@app.command(epilog="Example: apr reproduce --scale nano --out runs/nano")
def reproduce(
    out: Annotated[
        Path, typer.Option(help="Folder of the whole experiment. May be gs://.", **ANYWHERE)
    ],
    scale: Annotated[
        str | None, typer.Option(help="nano, mini or paper, or a file in ./experiments.")
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
        typer.Option(help="Where the data are or are to be built; default: OUT/data.", **ANYWHERE),
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
    settings: Settings = None,
) -> None:
    """Run a whole experiment: data, training, RL, evaluation, report. Goes on where it was
    stopped.
    """
    if (scale is None) == (config is None):
        raise UsageError("reproduce: give either --scale or --config")
    from apr_jax.config import load
    from apr_jax.paper.pipeline import reproduce as run
    from apr_jax.paper.pipeline import show_results
    from apr_jax.scales import scale_file

    experiment = load(config or scale_file(str(scale)), settings)
    start(together=True)
    with goes_on(f"every finished stage and the last checkpoint are in {out}"):
        run(experiment, out, data, only)
    if is_first() and only != "training":
        show_results(out)


@app.command(epilog="Example: apr ablation seeds --out runs/seeds")
def ablation(
    question: Annotated[Question, typer.Argument(help="Which one.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the ablation.", **HERE)],
    scale: Annotated[str, typer.Option(help="Scale of which the trainings are variants.")] = "nano",
    settings: Settings = None,
) -> None:
    """Answer a question that takes several trainings. Goes on where it was stopped."""
    from apr_jax.config import load
    from apr_jax.scales import scale_file

    experiment = load(scale_file(scale), settings)
    start(together=True)
    from apr_jax.paper.ablations import run_ablation, show_ablation

    with goes_on(f"every finished stage and the last checkpoint are in {out}"):
        found = run_ablation(question, experiment, out)
    if is_first():
        show_ablation(found, out)


@app.command(epilog="Example: apr report runs/nano")
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a finished `apr reproduce`.", **(ANYWHERE | {"metavar": "RUN"})
        ),
    ],
) -> None:
    """Draw the figures and write the HTML report of a finished run anew."""
    from apr_jax.paper.pipeline import show_results, write_report

    start()
    write_report(run)
    show_results(run)


@app.command(epilog="Example: apr plan --config experiments/paper.py --topology v5e:8x8")
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
        typer.Option(help="Only this one; repeatable. Default: all four.", show_default=False),
    ] = None,
    json: Json = None,
    settings: Settings = None,
) -> None:
    """Compile a run's programs for a TPU topology, on this CPU machine: does it fit, how long does
    it take, what binds it.

    Ends with status 1 if a program does not compile or does not fit.
    """
    from apr_jax.config import load
    from apr_jax.plan.show import show_topology

    if not show_topology(load(config, settings), topology, program or tuple(Program), json):
        raise typer.Exit(1)


def find_data(near: list[Path], config: Path) -> Path:
    """The built data that belongs to a run: in one of these folders, in `data` in it, or up to two
    levels above it.

    Raises:
      UsageError: there is none.
    """
    for folder in near:
        for candidate in [folder, *(parent / "data" for parent in nearby(folder))]:
            if (candidate / "data.json").is_file():
                return candidate
    for folder in near:
        require_reachable(folder)
    wanted = near[0] / "data"
    raise UsageError(
        f"no data found near {near[0]}: give --data DIR, or build it with "
        f"`apr data build --config {config} --out {wanted}`"
    )


class Interrupted(UserError):
    """Ctrl-C; the message says what was saved. Exit status 130."""


@contextmanager
def goes_on(saved: str | Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into one line that says what is saved and that the same command goes
    on from there.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        what = saved if isinstance(saved, str) else saved()
        kept = f"{what}; the same command goes on from there"
        if isinstance(stop, Stopped):
            raise Stopped(
                f"stopped by {signal.Signals(stop.number).name}; {kept}", stop.number
            ) from None
        raise Interrupted(f"interrupted; {kept}") from None


def _parallel_method(experiment: "Experiment") -> str:
    """The first method of the experiment's task whose demonstrations spawn and fit the limits.

    Raises:
      UsageError: there is none.
    """
    from apr_jax.data.build import fitting_methods
    from apr_jax.tasks import make_task

    task = make_task(experiment.task, experiment.limits)
    for name in fitting_methods(task):
        if task.methods[name].parallel:
            return name
    raise UsageError(
        f"--method: task {experiment.task.kind!r} has no method whose demonstrations spawn within"
        f" limits.max_depth={experiment.limits.max_depth}; give one of"
        f" {', '.join(task.methods) or '(it has none)'}"
    )


def _saved(workdir: Path) -> str:
    steps = [
        int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdigit()
    ]
    return (
        f"step {max(steps)} is saved in {workdir}"
        if steps
        else f"no step was saved yet in {workdir}"
    )


def main() -> None:
    """Entry point of the console script."""
    protect_imports()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit status; what goes wrong is said in one line on standard
    error.
    """
    serve_any_encoding()
    try:
        return app(arguments, prog_name="apr", standalone_mode=False) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if status in STOPPED:
            with suppress(OSError):  # A terminal that was closed takes no more words.
                message = (
                    f"stopped by {STOPPED[status]}; the run is saved; the same command goes on from"
                    " there"
                )
                typer.echo(f"apr: {message}", err=True)
        return status
    except BaseException as error:
        if os.environ.get("APR_DEBUG"):
            traceback.print_exc()
        message, status = _explain(error)
        if message:
            stopped = status == INTERRUPTED or isinstance(error, Stopped)
            typer.echo(f"apr: {'' if stopped else 'error: '}{message}", err=True)
        if isinstance(error, DiskError | LostProcess):
            leave(status)
        return status


def leave(status: int) -> None:
    """Ends at once: an orderly end would wait for the process that is gone, or try to write what
    finds no room.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _explain(error: BaseException) -> tuple[str, int]:
    """The one line about an error, and the exit status."""
    if isinstance(error, KeyboardInterrupt | typer.Abort | Interrupted):
        return _one_line(str(error)) or "interrupted", INTERRUPTED
    if isinstance(error, Stopped):
        return _one_line(str(error)), 128 + error.number
    if isinstance(error, UserError):
        return _one_line(str(error)), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, typer.TyperException):
        # A command group without a command has shown its help and has no more to say.
        message = _one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        return message and f"{message}; see `apr --help`", 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "a file"
        return (
            (
                f"no space left on the disk while writing {where}; what was saved before is kept;"
                " make room, start again"
            ),
            1,
        )
    if isinstance(error, OSError):
        return _one_line(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")), 1
    if (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in str(error)
        or "can't start new thread" in str(error)
    ):
        return (
            _one_line(
                "too little memory, or too few threads, for this run here"
                f" ({error or 'MemoryError'})"
            ),
            1,
        )
    what = f"{type(error).__name__}: {error}"
    if not str(error) and (frames := traceback.extract_tb(error.__traceback__)):
        what = (
            f"{type(error).__name__} in {Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        )
    return _one_line(what) + "; APR_DEBUG=1 shows where", 1


def _one_line(text: str) -> str:
    """The text in one line, safe for a terminal: a message may quote what a stranger wrote."""
    return visible(" ".join(text.split()))
