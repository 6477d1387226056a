"""A whole experiment from nothing to its report, stage after stage, in one process.

The life of a run (OUT is its folder):
  1. data         OUT/data: problems, tokenizer, demonstrations of APR and SoS+
  2. <method>/sft OUT/<method>/sft: supervised training
  3. <method>/rl  OUT/<method>/rl: reinforcement learning from there
                  OUT/<ablation>/{data,sft,rl}, with `evaluate.ablations`: those of the suite
  4. eval/NAME    OUT/eval/NAME: answers to held-out test problems, one folder an evaluation
                  of `paper/suite.py`; and to validation problems, where these choose
  5. latency/NAME OUT/eval/NAME/latency.json, slots/NAME the same on 1, 2,
                  4, ... decode slots, OUT/eval/NAME/slots.json: seconds of one problem
  6. report       OUT/results.json, OUT/figures/*.{png,svg}, OUT/report.html

`paper/stages.py` runs them, each once, so the same command can be stopped and started at will, and
when all is done it only shows the results. `--only training` is stages 1 to 3, so that a pod need
not wait for one host's evaluations; `--only figures` takes the checkpoints that are there: stages 1
and 4 to 6."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apr_jax.config import Experiment, override
from apr_jax.errors import UserError
from apr_jax.evaluate.cells import print_warnings
from apr_jax.io.lease import Lease
from apr_jax.io.storage import Mirror
from apr_jax.io.terminal import Terminal
from apr_jax.paper import Only
from apr_jax.paper.stages import Stage, read_json, read_record, reserve, run_stages, write_json
from apr_jax.report.terminal_tables import print_comparisons, print_table

METHODS = ("sos+", "apr")  # The serial baseline first: the table reads from worse to better.


def reproduce(
    config: Experiment, out: Path, data: Path | None = None, only: Only | None = None
) -> None:
    """Runs every stage that is not done yet.

    Args:
      out: folder of the run.
      data: where its data are, or will be built; by default out/data.
      only: "training" ends before the first evaluation, which needs no pod; "figures" trains
        nothing, and draws in any case.

    Raises:
      UsageError: OUT holds a run of other settings, or the suite asks for what the models cannot
        do.
      UserError: a stage failed; what was finished before is kept.
    """
    from apr_jax.paper.suite import check, check_conditions

    check(config)
    built = data or out / "data"
    if read_record(out).get("data", {}).get("done") and (built / "data.json").is_file():
        check_conditions(config, built)  # Else as soon as the data are built.
    with Lease(out, "reproduce", together=True):
        reserve(out, config)
        stages = part_of(stages_of(config, out, data), out, only)
        if only == "figures" and [stage.name for stage in stages] == ["data", "report"]:
            raise UserError(
                f"{out}: has no model to evaluate; train with `apr reproduce --out {out}` first"
            )
        run_stages(stages, out, again=("report",) if only == "figures" else ())


def part_of(stages: list[Stage], out: Path, only: Only | None) -> list[Stage]:
    """Those of `--only`."""
    if only == "training":
        return [stage for stage in stages if not stage.name.startswith(_FIGURES)]
    if only == "figures":
        return [
            stage
            for stage in stages
            if stage.name.startswith(("data", *_FIGURES)) and _has_models(stage, out)
        ]
    return stages


def stages_of(config: Experiment, out: Path, data: Path | None = None) -> list[Stage]:
    """The stages in their order."""
    built, record = data or out / "data", read_record(out)
    trained = [
        data_stage("data", config, built, METHODS, _checks_conditions(config, built)),
        *(
            supervised_stage(f"{method}/sft", config, "data", built, out, method)
            for method in METHODS
        ),
        *(
            reinforced_stage(f"{method}/rl", f"{method}/sft", config, built, out, f"rl {method}")
            for method in METHODS
        ),
        *(_ablations(config, out, record) if config.evaluate.ablations else ()),
    ]
    known = {stage.name for stage in trained}
    # An ablation that was stopped half-way, and is not to go on now, has no model yet.
    half = {name for name, stage in record.items() if not stage["done"]}
    measured = [
        stage
        for stage in _evaluations(config, out, built)
        if _model(stage) in known or (_has_models(stage, out) and _model(stage) not in half)
    ]
    names = tuple(stage.name for stage in (*trained, *measured))
    return [
        *trained,
        *measured,
        Stage("report", out / "report.html", lambda: write_report(out, built), names, "report"),
    ]


def _ablations(config: Experiment, out: Path, record: dict[str, Any]) -> list[Stage]:
    """Data and trainings of the suite's ablations, each in a folder of its own.

    Not of one that would be the run itself over again, nor of one whose model is there, kept or
    trained by another command."""
    from apr_jax.paper.suite import ABLATIONS, MODELS, model_of

    stages = []
    for name, (method, settings) in ABLATIONS.items():
        own, data, built = override(config, list(settings)), f"{name}/data", out / name / "data"
        if (settings and own == config) or (
            f"{name}/sft" not in record and model_of(out, f"{name}/sft")
        ):
            continue
        stages += [
            data_stage(data, own, built, (method,)),
            supervised_stage(f"{name}/sft", own, data, built, out, method),
        ]
        if f"{name}/rl" in MODELS:
            stages.append(
                reinforced_stage(f"{name}/rl", f"{name}/sft", own, built, out, f"rl {method}")
            )
    return stages


def _checks_conditions(config: Experiment, built: Path) -> Callable[[], None]:
    """What is checked of the run's own data before anything is trained on them: its models will be
    swept.
    """

    def check() -> None:
        from apr_jax.paper.suite import check_conditions

        check_conditions(config, built)

    return check


def data_stage(
    name: str,
    config: Experiment,
    built: Path,
    methods: tuple[str, ...],
    check: Callable[[], None] = lambda: None,
) -> Stage:
    """Builds the data that these methods are trained on; then `check` looks at them."""

    def run() -> None:
        from apr_jax.data.build import build

        build(config, built, methods=methods)
        check()

    return Stage(name, built / "data.json", run, kind="data")


def supervised_stage(
    name: str, config: Experiment, data: str, built: Path, out: Path, method: str
) -> Stage:
    """Supervised training into the folder OUT/name, on what the stage `data` built."""

    def run() -> None:
        from apr_jax.train.sft import train_sft

        train_sft(config, built, out / name, method)

    sft = config.train.sft
    # An epoch of one method takes other steps than one of another: the time of one says nothing
    # about the other.
    kind = "sft" if sft.steps else f"sft {method}"
    return Stage(
        name, out / name / "checkpoints", run, (data,), kind, sft.steps or sft.epochs, together=True
    )


def reinforced_stage(
    name: str, start: str, config: Experiment, built: Path, out: Path, kind: str
) -> Stage:
    """Reinforcement learning into the folder OUT/name, from what the stage `start` trained into its
    own.
    """

    def run() -> None:
        from apr_jax.train.rl.trainer import train_rl

        train_rl(config, built, out / name, out / start)

    return Stage(
        name, out / name / "checkpoints", run, (start,), kind, config.train.rl.steps, together=True
    )


def _evaluations(config: Experiment, out: Path, built: Path) -> list[Stage]:
    """One stage an evaluation, for the seconds of one problem, and for its seconds on several
    numbers of decode slots.
    """
    from apr_jax.paper import suite

    def start(model: str, count: int | None) -> tuple[Any, list[Any]]:
        return load(model), problems_of("test")[:count]

    def load(model: str) -> Any:
        from apr_jax.train.checkpoint.manager import load_checkpoint

        return load_checkpoint(suite.model_of(out, model) or out / model)

    def problems_of(split: str) -> list[Any]:
        from apr_jax.data.build import check_files
        from apr_jax.tasks import load_problems

        name = f"{split}.jsonl"
        check_files(built, name)
        return load_problems(built / name)

    def answer(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.runner import evaluate

        if one.validation:
            problems = problems_of("validation")[-(one.problems or 0) :]
        else:
            problems = problems_of("test")[: one.problems]
        evaluate(load(one.model), problems, out / "eval" / one.name, one.decoding)

    def clock(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.latency import measure_latency

        restored, problems = start(one.model, timed)
        measure_latency(
            restored, problems, out / "eval" / one.name, one.decoding, config.evaluate.repeats
        )

    def slots(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.latency import measure_slots

        restored, problems = start(one.model, few)
        measure_slots(
            restored, problems, out / "eval" / one.name, one.decoding, config.evaluate.repeats
        )

    timed = config.evaluate.timed
    few = -(-timed // 3)  # On one decode slot a tree takes a step for each of its tokens.

    def stage(
        what: str,
        one: suite.Evaluation,
        run: Callable[[suite.Evaluation], None],
        makes: str,
        work: float,
    ) -> Stage:
        method = one.model.partition("/")[0]
        name = f"{what}/{one.name}"
        return Stage(
            name,
            out / "eval" / one.name / makes,
            lambda: run(one),
            (one.model,),
            f"{what} {method}",
            work,
        )

    return [
        *(
            stage(
                "eval",
                one,
                answer,
                "summary.json",
                (one.problems or config.data.heldout) * one.decoding.samples,
            )
            for one in (*suite.declare(config.evaluate), *suite.choosing(config.evaluate))
        ),
        *(
            stage("latency", one, clock, "latency.json", timed)
            for one in suite.timed(config.evaluate)
        ),
        *(stage("slots", one, slots, "slots.json", few) for one in suite.laned(config.evaluate)),
    ]


_FIGURES = ("eval/", "latency/", "slots/", "report")


def _model(stage: Stage) -> str:
    return stage.needs[0] if stage.needs else ""


def _has_models(stage: Stage, out: Path) -> bool:
    from apr_jax.paper.suite import model_of

    return stage.name in ("data", "report") or model_of(out, _model(stage)) is not None


def write_report(out: Path, data: Path | None = None) -> None:
    """Writes results.json, the figures and report.html from what the evaluations left in `out`.

    Args:
      data: of the run; by default out/data.

    Raises:
      UserError: there is no evaluation.
    """
    from apr_jax.paper.run_report import write_run_report

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
        seconds = {
            name: stage["seconds"]
            for name, stage in read_record(mirror.local).items()
            if stage["done"]
        }
        found = write_run_report(mirror.local, data or out / "data")
        write_json(mirror.local / "results.json", {"seconds": seconds} | found)


def show_results(out: Path) -> None:
    """Prints the tables of a finished run, its warnings, what it took, and where figures and report
    are.
    """
    results = read_json(out / "results.json")
    print_table({row["label"]: row for row in results["main"].values()})
    console = Terminal(highlight=False, soft_wrap=True, markup=False)
    print_comparisons(results["comparisons"], console)
    # The evaluations said them too, but not to whoever starts a finished run again.
    print_warnings(results["warnings"])
    for line in results["missing"]:
        console.print(f"not run  {line}")
    console.print(
        f"time     {sum(results['seconds'].values()) / 60:.1f} minutes ({out / 'stages.json'})"
    )
    console.print(f"figures  {out / 'figures'}")
    console.print(f"report   {out / 'report.html'}")
