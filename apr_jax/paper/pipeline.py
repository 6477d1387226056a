"""A whole experiment from nothing to its report, stage after stage, in one process.

The life of a run (OUT is its folder):

  1. data         OUT/data: problems, tokenizer, demonstrations of APR and SoS+. Where APR searches
                  from both ends, SoS+ searches forward and has data of its own, OUT/sos+/data.
  2. <method>/sft OUT/<method>/sft: supervised training
  3. <method>/rl  OUT/<method>/rl: reinforcement learning from there
                  With `evaluate.ablations` the ablations of the suite are trained too, each in
                  OUT/<ablation>/{data,sft,rl}.
  4. eval/NAME    OUT/eval/NAME: answers to held-out test problems, a folder for each evaluation
                  of `paper/suite.py`, and answers to validation problems where these choose
  5. latency/NAME OUT/eval/NAME/latency.json: seconds of one problem
     votes/NAME   OUT/eval/NAME/votes.json: the same of several samples side by side
     slots/NAME   OUT/eval/NAME/slots.json: the same on 1, 2, 4, ... decode slots
  6. report       OUT/results.json, OUT/figures/*.{png,svg}, OUT/report.html

`paper/stages.py` runs each stage once, so the command can be stopped and started at will. When
every stage is done, the command only shows the results. `--only training` runs stages 1 to 3, so
that a pod need not wait for the evaluations of one host. `--only figures` runs stages 1 and 4 to 6
with the checkpoints that exist.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apr_jax.config import Experiment
from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.cells import outcome, print_warnings
from apr_jax.evaluate.scores import mean
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.storage import Mirror
from apr_jax.io.terminal import Terminal
from apr_jax.paper import Only
from apr_jax.paper.stages import Stage, read_json, read_record, reserve, run_stages
from apr_jax.report.terminal_tables import SOLVED, print_comparisons, print_table

if TYPE_CHECKING:
    from apr_jax.paper.suite import Evaluation
    from apr_jax.train.checkpoint import Restored

METHODS = ("sos+", "apr")  # The serial baseline first: the table reads from worse to better.


def reproduce(
    config: Experiment,
    out: Path,
    data: Path | None = None,
    only: Only | None = None,
    exclude: Sequence[Path] = (),
    models: Path | None = None,
) -> None:
    """Runs every stage that is not done yet.

    Args:
      config: the experiment.
      out: folder of the run.
      data: where its data are, or will be built; by default out/data.
      only: "training" ends before the first evaluation, because evaluations need no pod; "figures"
        trains nothing, and draws the figures even if they are drawn already.
      exclude: see `data.build`.
      models: folder of another run, whose models answer the problems of this one. Then nothing is
        trained, as with "figures".

    Raises:
      UsageError: OUT holds a run of other settings, or the suite has an evaluation that the models
        cannot answer.
      UserError: a stage failed; what was finished before is kept.
    """
    from apr_jax.paper import methods, suite

    if config.data.file:
        raise UsageError(
            f"data.demonstrations={config.data.file!r}: `apr reproduce` compares what the task's"
            " own solvers demonstrate, so it must be a number; a file has `apr data build`,"
            " `apr train` and `apr eval`"
        )
    if models is not None and only == "training":
        raise UsageError(
            f"--models {models}: are evaluated and not trained; leave out --only training"
        )
    only = "figures" if models is not None else only
    (suite if suite.is_of_the_paper(config) else methods).check(config)
    folders = Folders(out, data or out / "data", models or out)
    _check_what_is_built(config, folders)

    with Lease(out, "reproduce", together=True):
        reserve(out, config)
        stages = part_of(stages_of(config, folders, exclude), folders.models, only)
        if only == "figures" and [stage.name for stage in stages] == ["data", "report"]:
            raise UserError(
                f"{folders.models}: has no model to evaluate; train with"
                f" `apr reproduce --out {folders.models}` first"
            )
        run_stages(stages, out, again=("report",) if only == "figures" else ())


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the parts of a run are.

    Attributes:
      out: folder of the run.
      data: its data.
      models: folder of the run whose models are evaluated, as a rule `out` itself.
    """

    out: Path
    data: Path
    models: Path

    @classmethod
    def of(cls, out: Path) -> Folders:
        """Returns the folders of a run that has everything in its own."""
        return cls(out, out / "data", out)


def part_of(stages: list[Stage], models: Path, only: Only | None) -> list[Stage]:
    """Selects the stages that `--only` names; all of them without it.

    `models` is the folder whose models are evaluated.
    """
    if only == "training":
        return [stage for stage in stages if not stage.name.startswith(_FIGURES)]
    if only == "figures":
        wanted = ("data", *_FIGURES)
        return [
            stage for stage in stages if stage.name.startswith(wanted) and _has_model(stage, models)
        ]
    return stages


def stages_of(config: Experiment, folders: Folders, exclude: Sequence[Path] = ()) -> list[Stage]:
    """Lists the stages of a run in their order.

    Args:
      config: the experiment.
      folders: where the parts of the run are.
      exclude: see `data.build`.
    """
    out = folders.out
    record = read_record(folders.models)

    trained = []
    reinforced = []
    for data in _data_of(config, folders):
        trained.append(data.stage(exclude))
        for method in data.methods:
            sft = f"{method}/sft"
            rl = f"{method}/rl"
            trained.append(supervised_stage(sft, data.config, data.name, data.folder, out, method))
            reinforced.append(
                reinforced_stage(rl, sft, data.config, data.folder, out, f"rl {method}")
            )
    trained += reinforced
    if config.evaluate.ablations:
        trained += _ablations(config, out, record, exclude)

    # Evaluations of models that are trained here, or that exist already. The model of an ablation
    # that was stopped half-way, and does not go on in this run, is not finished.
    known = {stage.name for stage in trained} if folders.models == out else set()
    unfinished = {name for name, stage in record.items() if not stage["done"]}
    measured = [
        stage
        for stage in _evaluations(config, folders)
        if _model(stage) in known
        or (_has_model(stage, folders.models) and _model(stage) not in unfinished)
    ]

    names = tuple(stage.name for stage in (*trained, *measured))
    if _is_of_the_paper(config):
        makes, about = out / "report.html", "tables, figures and one HTML page"
    else:
        makes, about = out / "results.json", "the comparisons of the methods"
    report = Stage("report", makes, lambda: write_report(folders), about, names, "report")
    return [*trained, *measured, report]


def _is_of_the_paper(config: Experiment) -> bool:
    from apr_jax.paper.suite import is_of_the_paper

    return is_of_the_paper(config)


def _methods(config: Experiment) -> tuple[str, ...]:
    """Returns the methods that a run trains."""
    from apr_jax.paper.methods import methods_of

    return METHODS if _is_of_the_paper(config) else methods_of(config)


def _own(config: Experiment, folder: str) -> Experiment:
    """Returns the config of the model in a folder of the run."""
    from apr_jax.paper.suite import own_config

    return own_config(config, folder) if _is_of_the_paper(config) else config


def sharing_methods(config: Experiment) -> tuple[str, ...]:
    """Returns the methods that learn from the run's own data."""
    return tuple(method for method in _methods(config) if _own(config, method) == config)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Demonstrations that a run builds for some of its methods.

    Attributes:
      name: name of the stage that builds them.
      config: the config that they are built with.
      folder: where they are.
      methods: the methods that learn from them.
    """

    name: str
    config: Experiment
    folder: Path
    methods: tuple[str, ...]

    def stage(self, exclude: Sequence[Path]) -> Stage:
        """Makes the stage that builds the data, and checks them."""
        return data_stage(self.name, self.config, self.folder, self.methods, exclude, self.check)

    def check(self) -> None:
        """Refuses data on which the evaluations make no sense."""
        _check_data(self.config, self.folder, self.methods)


def _data_of(config: Experiment, folders: Folders) -> list[_Data]:
    """Lists the run's own data, then those of each method that cannot share them."""
    sharing = sharing_methods(config)
    own = (method for method in _methods(config) if method not in sharing)
    return [
        _Data("data", config, folders.data, sharing),
        *(
            _Data(f"{method}/data", _own(config, method), folders.out / method / "data", (method,))
            for method in own
        ),
    ]


def _check_what_is_built(config: Experiment, folders: Folders) -> None:
    """Checks the data that are there; others are checked as soon as they are built."""
    record = read_record(folders.out)
    for data in _data_of(config, folders):
        if record.get(data.name, {}).get("done") and (data.folder / "data.json").is_file():
            data.check()


def _check_data(config: Experiment, built: Path, methods: tuple[str, ...]) -> None:
    """Refuses data on which the evaluations make no sense, before a model learns from them.

    Args:
      config: the config of the data.
      built: their folder.
      methods: the methods whose demonstrations are there.
    """
    from apr_jax.paper.methods import check_windows
    from apr_jax.paper.suite import check_conditions

    if _is_of_the_paper(config):
        check_conditions(config, built, methods)
    else:
        check_windows(config, built)


def _ablations(
    config: Experiment, out: Path, record: dict[str, Any], exclude: Sequence[Path]
) -> list[Stage]:
    """Lists the data and training stages of the suite's ablations, each in a folder of its own."""
    from apr_jax.paper.suite import ABLATIONS, MODELS, model_of

    stages = []
    for name, (method, _) in ABLATIONS.items():
        own = _own(config, name)
        data = f"{name}/data"
        built = out / name / "data"

        is_the_run_itself = method in METHODS and own == _own(config, method)
        # Exported, or trained by another command.
        has_foreign_model = f"{name}/sft" not in record and model_of(out, f"{name}/sft")
        if is_the_run_itself or has_foreign_model:
            continue

        stages.append(data_stage(data, own, built, (method,), exclude))
        stages.append(supervised_stage(f"{name}/sft", own, data, built, out, method))
        if f"{name}/rl" in MODELS:
            stages.append(
                reinforced_stage(f"{name}/rl", f"{name}/sft", own, built, out, f"rl {method}")
            )
    return stages


def data_stage(
    name: str,
    config: Experiment,
    built: Path,
    methods: tuple[str, ...],
    exclude: Sequence[Path] = (),
    check: Callable[[], None] = lambda: None,
) -> Stage:
    """Makes a stage that builds the data that `methods` are trained on, and then calls `check`."""

    def run() -> str:
        from apr_jax.data.build import build, few_problems

        build(config, built, exclude, methods)
        check()
        tested = f"{config.data.heldout:,} test problems"
        if _is_of_the_paper(config):
            tested += ", whose numbers never occur together in training"
        few = few_problems(config, built)
        return f"{tested}; warning: {few}" if few else tested

    about = f"problems, and demonstrations of {' and '.join(methods)}"
    return Stage(name, built / "data.json", run, about, kind="data")


def supervised_stage(
    name: str, config: Experiment, data: str, built: Path, out: Path, method: str
) -> Stage:
    """Makes a stage of supervised training into OUT/<name>.

    Args:
      name: name of the stage.
      config: the experiment.
      data: name of the stage that builds the data.
      built: folder of the data.
      out: folder of the run.
      method: the method whose demonstrations the model learns from.
    """

    def run() -> str:
        from apr_jax.train.sft import train_sft

        train_sft(config, built, out / name, method)
        return _course(out / name, {"loss": "loss"})

    sft = config.train.sft
    # Epochs of two methods have different numbers of steps, so the time of one method's epoch says
    # nothing about that of another's.
    kind = "sft" if sft.steps else f"sft {method}"
    return Stage(
        name,
        out / name / "checkpoints",
        run,
        f"imitates demonstrations of {method}",
        (data,),
        kind,
        sft.steps or sft.epochs,
        together=True,
    )


def reinforced_stage(
    name: str, start: str, config: Experiment, built: Path, out: Path, kind: str
) -> Stage:
    """Makes a stage of reinforcement learning into OUT/<name>.

    Args:
      name: name of the stage.
      start: name of the stage whose model it starts from, in OUT/<start>.
      config: the experiment.
      built: folder of the data.
      out: folder of the run.
      kind: stages of one kind take the same time for the same work.
    """

    def run() -> str:
        from apr_jax.train.rl.trainer import train_rl

        train_rl(config, built, out / name, out / start)
        return _course(out / name, {"accuracy": "right in training", "children": "children"})

    return Stage(
        name,
        out / name / "checkpoints",
        run,
        "reinforcement learning over whole trees",
        (start,),
        kind,
        config.train.rl.steps,
        together=True,
    )


def _course(workdir: Path, measures: dict[str, str]) -> str:
    """Says how some metrics of a training changed: means of the first and of the last steps.

    Args:
      workdir: folder of the training.
      measures: metric -> its name on the screen.
    """
    from apr_jax.train.metrics.recorder import FILE

    lines = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    parts = []
    for metric, name in measures.items():
        values = [line[metric] for line in lines if line.get(metric) is not None]
        if any(values):
            few = max(1, min(_ENDS, len(values) // 2))
            parts.append(f"{name} {mean(values[:few]):.2f} to {mean(values[-few:]):.2f}")
    return ", ".join(parts)


def _evaluations(config: Experiment, folders: Folders) -> list[Stage]:
    """Lists the stages that measure the trained models: answers first, then seconds."""
    from apr_jax.paper import methods, suite

    settings = config.evaluate
    if not suite.is_of_the_paper(config):
        return [
            _answer_stage(evaluation, config, folders) for evaluation in methods.declare(config)
        ]
    answered = (*suite.declare(settings), *suite.choosing(settings))
    return [
        *(_answer_stage(evaluation, config, folders) for evaluation in answered),
        *(_latency_stage(evaluation, config, folders) for evaluation in suite.timed(settings)),
        *(_votes_stage(evaluation, config, folders) for evaluation in suite.timed_votes(settings)),
        *(
            _slots_stage(evaluation, config, folders)
            for evaluation in suite.timed_on_slots(settings)
        ),
    ]


def _answer_stage(evaluation: Evaluation, config: Experiment, folders: Folders) -> Stage:
    """Answers the problems of an evaluation: OUT/eval/NAME/summary.json."""

    def run() -> str:
        from apr_jax.evaluate.runner import evaluate

        if evaluation.validation:
            problems = _load_problems(config, folders, "validation")[-(evaluation.problems or 0) :]
        else:
            problems = _load_problems(config, folders, "test")[: evaluation.problems]
        restored = _load_model(config, folders.models, evaluation.model)
        folder = folders.out / "eval" / evaluation.name
        summary = evaluate(restored, problems, folder, evaluation.decoding)
        return outcome(summary)

    count = evaluation.problems or config.data.heldout
    split = "validation" if evaluation.validation else "test"
    temperature = evaluation.decoding.temperature
    how = f"sampled at temperature {temperature:g}" if temperature else "greedily"
    about = f"answers {count:,} {split} problems, {how}"
    trees = count * evaluation.decoding.samples
    return _evaluation_stage("eval", evaluation, folders, "summary.json", run, about, work=trees)


def _latency_stage(evaluation: Evaluation, config: Experiment, folders: Folders) -> Stage:
    """Measures the seconds of one problem: OUT/eval/NAME/latency.json."""
    from apr_jax.evaluate.latency import LATENCY, measure_latency

    count = config.evaluate.timed
    about = f"times {count} problems, one by one"
    run = _timing(measure_latency, evaluation, config, folders, count)
    return _evaluation_stage("latency", evaluation, folders, LATENCY, run, about, work=count)


def _votes_stage(evaluation: Evaluation, config: Experiment, folders: Folders) -> Stage:
    """Measures the seconds of 1, 2, 4, ... samples of one problem: OUT/eval/NAME/votes.json."""
    from apr_jax.evaluate.latency import VOTES, measure_votes

    count = config.evaluate.timed
    about = f"times 1, 2, 4, ... samples of {count} problems, side by side"
    run = _timing(measure_votes, evaluation, config, folders, count)
    return _evaluation_stage("votes", evaluation, folders, VOTES, run, about, work=count)


def _slots_stage(evaluation: Evaluation, config: Experiment, folders: Folders) -> Stage:
    """Measures seconds of one problem on 1, 2, 4, ... decode slots: OUT/eval/NAME/slots.json."""
    from apr_jax.evaluate.latency import SLOTS, measure_slots

    # On one decode slot a tree takes a step for each of its tokens, so fewer problems are timed.
    count = math.ceil(config.evaluate.timed / 3)
    about = f"times {count} problems on 1, 2, 4, ... decode slots"
    run = _timing(measure_slots, evaluation, config, folders, count)
    return _evaluation_stage("slots", evaluation, folders, SLOTS, run, about, work=count)


def _timing(
    measure: Callable[..., Any],
    evaluation: Evaluation,
    config: Experiment,
    folders: Folders,
    count: int,
) -> Callable[[], None]:
    """Returns what a stage runs that measures seconds of the first `count` test problems.

    `measure` is a function of `evaluate/latency.py`.
    """

    def run() -> None:
        restored = _load_model(config, folders.models, evaluation.model)
        problems = _load_problems(config, folders, "test")[:count]
        folder = folders.out / "eval" / evaluation.name
        measure(restored, problems, folder, evaluation.decoding, config.evaluate.repeats)

    return run


def _evaluation_stage(
    what: str,
    evaluation: Evaluation,
    folders: Folders,
    file: str,
    run: Callable[[], str | None],
    about: str,
    work: float,
) -> Stage:
    """Makes a stage whose `run` writes `file` into an evaluation's folder.

    `what` begins the name of the stage and its kind. Stages of one method are of one kind, because
    they take equally long for the same `work`.
    """
    method = evaluation.model.partition("/")[0]
    return Stage(
        f"{what}/{evaluation.name}",
        makes=folders.out / "eval" / evaluation.name / file,
        run=run,
        about=about,
        needs=(evaluation.model,),
        kind=f"{what} {method}",
        work=work,
    )


def _load_model(config: Experiment, models: Path, model: str) -> Any:
    """Loads a trained or exported model.

    Args:
      config: the experiment.
      models: folder of the run that has it.
      model: its name there, for example "apr/rl".

    Raises:
      UserError: there is none, it has learned another search than the run's model of that name, or
        test problems of the run may be among those that it has learned from.
    """
    from apr_jax.paper.suite import is_of_the_paper, model_of
    from apr_jax.train.checkpoint import load_checkpoint

    path = model_of(models, model) or models / model
    restored = load_checkpoint(path)
    _check_split(config, restored)
    if is_of_the_paper(config) and is_of_the_paper(restored.config):
        wanted, found = (
            one.task.options.solver.search
            for one in (_own(config, model.partition("/")[0]), restored.config)
        )
        if found != wanted:
            raise UserError(
                f"{path}: has learned task.solver.search={found!r}, must be {wanted!r} for"
                f" {model} of a run with task.solver.search={config.task.options.solver.search!r};"
                " move it to another folder"
            )
    return restored


def _check_split(config: Experiment, restored: Restored) -> None:
    """Refuses a model that may have learned from test problems of a run.

    Problems of one seed are drawn in one order, of which the first are held out. So with another
    number of held-out problems, some that were for training are for test.

    Raises:
      UserError: names the field.
    """
    trained = restored.config.data
    data = config.data
    if trained.seed == data.seed and trained.heldout != data.heldout:
        raise UserError(
            f"{restored.path}: was trained with data.heldout={trained.heldout} of"
            f" data.seed={trained.seed}, so that with data.heldout={data.heldout} test problems may"
            " be among those that it learned from; take another data.seed, and --exclude its data"
        )


def _load_problems(config: Experiment, folders: Folders, split: str) -> list[Any]:
    """Loads the problems of a split, "test" or "validation", of the run's data."""
    from apr_jax.data.build import check_files
    from apr_jax.tasks import load_problems, make_task

    name = f"{split}.jsonl"
    check_files(folders.data, name)
    return load_problems(folders.data / name, make_task(config.task))


_FIGURES = ("eval/", "latency/", "votes/", "slots/", "report")
_ENDS = 3  # Steps at the beginning and at the end of a training whose means are shown.


def _model(stage: Stage) -> str:
    """Returns the model that a stage evaluates; "" if it needs nothing."""
    return stage.needs[0] if stage.needs else ""


def _has_model(stage: Stage, models: Path) -> bool:
    """Returns whether the model that a stage evaluates exists; data and report need none."""
    from apr_jax.paper.suite import model_of

    return stage.name in ("data", "report") or model_of(models, _model(stage)) is not None


def write_report(folders: Folders) -> None:
    """Writes results.json from the evaluations of a run.

    A run of the paper's task also gets its figures and report.html.

    Args:
      folders: where the parts of the run are.

    Raises:
      UserError: there is no evaluation.
    """
    from apr_jax.paper import methods
    from apr_jax.paper.results import read_config
    from apr_jax.paper.run_report import write_run_report

    out = folders.out
    if not out.is_dir():
        raise UserError(
            f"{out}: no such folder; finish the run with `apr reproduce --out {out}` first"
        )
    with (
        Lease(out, "report"),
        Mirror(
            out, ("config.json", "stages.json", "*.safetensors", "eval/*/*", "*/*/metrics.jsonl")
        ) as mirror,
    ):
        models = mirror.local if folders.models == out else folders.models
        record = read_record(mirror.local)
        seconds = {name: stage["seconds"] for name, stage in record.items() if stage["done"]}
        config = read_config(mirror.local)
        if _is_of_the_paper(config):
            numbers = write_run_report(mirror.local, folders.data, models)
        else:
            numbers = methods.results(config, mirror.local, models)
        numbers["problems"] = _facts_of_problems(config, folders.data)
        write_json(mirror.local / "results.json", {"seconds": seconds} | numbers)


def _facts_of_problems(config: Experiment, data: Path) -> dict[str, Any]:
    """Returns which test problems a run has answered: their seed and number, and what is excluded.

    The last two say whether two runs have answered the same ones; they are left out where the data
    are gone.
    """
    facts: dict[str, Any] = {"seed": config.data.seed, "test": config.data.heldout}
    if (data / "data.json").is_file():
        record = read_json(data / "data.json")
        facts["excluded"] = record["settings"]["exclude"]
        facts["sha256"] = record["sha256"]["test.jsonl"]
    return facts


def show_results(out: Path) -> None:
    """Prints a finished run: what the models solve, how they compare, and where the rest is.

    A run of the paper's task begins with the trees of one problem before and after RL.

    Raises:
      UserError: there are no results, or an earlier version of this library wrote them.
    """
    from apr_jax.paper.opening import FIGURE
    from apr_jax.paper.results import read_config

    results = read_json(out / "results.json")
    console = Terminal(highlight=False, soft_wrap=True, markup=False)
    if _is_of_the_paper(read_config(out)):
        _show_opening(out, results, console)
    else:
        print_table({row["label"]: row for row in results["main"].values()})
    if results["comparisons"]:
        console.print()
        print_comparisons(results["comparisons"], console)
    # Each evaluation printed its warnings already, but nobody has seen them who only starts a
    # finished run again.
    print_warnings(results["warnings"])
    for line in results["missing"]:
        console.print(f"not run  {line}")

    minutes = sum(results["seconds"].values()) / 60
    console.print(f"time     {minutes:.1f} minutes ({out / 'stages.json'})")
    console.print(f"results  {out / 'results.json'}")
    for name, path in (
        ("figure", out / "figures" / f"{FIGURE}.png"),
        ("report", out / "report.html"),
    ):
        if path.exists():
            console.print(f"{name:9}{path}")


def _show_opening(out: Path, results: dict[str, Any], console: Terminal) -> None:
    """Prints what the report of a run of the paper's task opens with.

    Raises:
      UserError: an earlier version of this library wrote the results.
    """
    first = results.get("opening")
    if first is None:
        raise UserError(
            f"{out / 'results.json'}: an earlier version wrote it; `apr report {out}` draws it anew"
        )
    _show_trees(out, first)
    console.print(f"\nRight answers and their cost, {first['answers']}:")
    print_table(first["rows"], SOLVED)
    for sentence in first["gains"]:
        console.print(sentence)


def _show_trees(out: Path, first: dict[str, Any]) -> None:
    """Prints the trees of one problem that the report opens with, in the order of training."""
    from apr_jax.evaluate.folder import TRACES, read_traces
    from apr_jax.evaluate.trace import to_forest
    from apr_jax.report.solve import show_tree

    console = Terminal(highlight=False)
    if first["trees"]:
        console.print(f"\nOf the test problems {first['why']}:", markup=False)
    for when, name in reversed(first["trees"].items()):
        traces = read_traces(out / "eval" / name / TRACES)
        trace = next(trace for trace in traces if trace["id"] == first["problem"])
        console.print(f"\n{first['title']}  {when}", markup=False)
        show_tree(to_forest(trace), trace, console)
