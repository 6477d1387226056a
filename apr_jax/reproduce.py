"""A whole experiment from nothing to its report, stage after stage, in one process.

The life of a run (OUT is its folder):
  1. data         OUT/data: problems, tokenizer, demonstrations of APR and SoS+
  2. <method>/sft OUT/<method>/sft: supervised training
  3. <method>/rl  OUT/<method>/rl: reinforcement learning from there
  4. eval/NAME    OUT/eval/NAME: answers to held-out test problems, one folder an evaluation of `evaluate/suite.py`
  5. latency/NAME OUT/eval/NAME/latency.json, lanes/NAME OUT/eval/NAME/lanes.json: seconds of one problem
  6. report       OUT/results.json, OUT/figures/*.{png,svg}, OUT/report.html

A finished stage is noted in OUT/stages.json, with the seconds it took, and never runs again; an unfinished one goes
on from its own checkpoint. So the same command can be stopped and started at will, and when all is done it only shows
the results. `--only training` is stages 1 to 3, so that a pod need not wait for one host's evaluations; `--only figures`
takes the checkpoints that are there: stages 1 and 4 to 6.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from apr_jax.config import Experiment, to_dict
from apr_jax.errors import UsageError, UserError
from apr_jax.flags import Only
from apr_jax.runtime import alone_fails, first_decides, is_first
from apr_jax.storage import Mirror, write_text
from apr_jax.table import print_claims, print_table

METHODS = ("sos+", "apr")  # The serial baseline first: the table reads from worse to better.
_LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: in stages.json and on the screen.
      makes: a file or folder that is there when the stage is done.
      run: does the work, or goes on with it.
      needs: names of stages; when one of them runs again, so does this one.
      kind: stages of one kind take the same time for the same work.
      work: how much there is to do, in any unit of its kind.
      together: by all processes; else by the first one.
    """

    name: str
    makes: Path
    run: Callable[[], object]
    needs: tuple[str, ...] = ()
    kind: str = ""
    work: float = 1.0
    together: bool = False


def experiment_file(scale: str) -> Path:
    """The experiment file of a scale, from the current folder or from the clone that this package was installed from.

    Raises:
      UsageError: there is no such scale.
    """
    folders = (Path("experiments"), Path(__file__).parent.parent / "experiments")
    for folder in folders:
        if (folder / f"{scale}.py").is_file():
            return folder / f"{scale}.py"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")} - {"launch"})
    raise UsageError(
        f"--scale {scale!r}: must be one of {', '.join(known) or 'those of experiments/ (run in the clone)'}"
    )


def reproduce(config: Experiment, out: Path, data: Path | None = None, only: Only | None = None) -> None:
    """Runs every stage that is not done yet.

    Args:
      out: folder of the run.
      data: where its data are, or will be built; by default out/data.
      only: "training" ends before the first evaluation, which needs no pod; "figures" trains nothing, and draws in any case.

    Raises:
      UsageError: OUT holds a run of other settings, or the suite asks for what the models cannot do.
      UserError: a stage failed; what was finished before is kept.
    """
    from apr_jax.evaluate.suite import check

    check(config)
    _claim(out, config)
    stages = stages_of(config, out, data)
    if only == "training":
        stages = [stage for stage in stages if not stage.name.startswith(_FIGURES)]
    elif only == "figures":
        stages = [stage for stage in stages if stage.name.startswith(("data", *_FIGURES)) and _has_models(stage, out)]
        if [stage.name for stage in stages] == ["data", "report"]:
            raise UserError(f"{out}: has no model to evaluate; train with `apr reproduce --out {out}` first")
    run_stages(stages, out, again=("report",) if only == "figures" else ())


def stages_of(config: Experiment, out: Path, data: Path | None = None) -> list[Stage]:
    """The stages in their order."""
    built = data or out / "data"

    def build_data() -> None:
        from apr_jax.data.build import build

        build(config, built, methods=METHODS)

    def supervise(method: str) -> None:
        from apr_jax.learn.sft import train_sft

        train_sft(config, built, out / method / "sft", method)

    def reinforce(method: str) -> None:
        from apr_jax.learn.rl import train_rl

        train_rl(config, built, out / method / "rl", out / method / "sft")

    def bind(function: Callable[..., None], *arguments: str) -> Callable[[], None]:
        return lambda: function(*arguments)

    sft, rl = config.learn.sft, config.learn.rl
    trained = [
        Stage("data", built / "data.json", build_data, kind="data"),
        *(
            Stage(f"{m}/sft", out / m / "sft" / "checkpoints", bind(supervise, m), ("data",), "sft", sft.steps, True)
            for m in METHODS
        ),
        *(
            Stage(
                f"{m}/rl", out / m / "rl" / "checkpoints", bind(reinforce, m), (f"{m}/sft",), f"rl {m}", rl.steps, True
            )
            for m in METHODS
        ),
    ]
    known = {stage.name for stage in trained}
    measured = [
        stage for stage in _evaluations(config, out, built) if _model(stage) in known or _has_models(stage, out)
    ]
    names = tuple(stage.name for stage in (*trained, *measured))
    return [
        *trained,
        *measured,
        Stage("report", out / "report.html", lambda: write_report(out, built), names, "report"),
    ]


def _evaluations(config: Experiment, out: Path, built: Path) -> list[Stage]:
    """One stage an evaluation, for the seconds of one problem, and for its seconds on several numbers of lanes."""
    from apr_jax.evaluate import suite

    def start(model: str, count: int | None) -> tuple[Any, list[Any]]:
        from apr_jax.learn.checkpoint import load_checkpoint
        from apr_jax.tasks import load_problems

        return load_checkpoint(suite.model_of(out, model) or out / model), load_problems(built / "test.jsonl")[:count]

    def answer(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.run import evaluate

        restored, problems = start(one.model, one.problems)
        evaluate(restored, problems, out / "eval" / one.name, one.decoding)

    def clock(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.latency import measure_latency

        restored, problems = start(one.model, timed)
        measure_latency(restored, problems, out / "eval" / one.name, one.decoding, config.evaluate.repeats)

    def lanes(one: suite.Evaluation) -> None:
        from apr_jax.evaluate.latency import measure_lanes

        restored, problems = start(one.model, timed)
        measure_lanes(restored, problems, out / "eval" / one.name, one.decoding, config.evaluate.repeats)

    timed = config.evaluate.timed

    def stage(
        what: str, one: suite.Evaluation, run: Callable[[suite.Evaluation], None], makes: str, work: float
    ) -> Stage:
        method = one.model.partition("/")[0]
        name = f"{what}/{one.name}"
        return Stage(name, out / "eval" / one.name / makes, lambda: run(one), (one.model,), f"{what} {method}", work)

    return [
        *(
            stage("eval", one, answer, "summary.json", (one.problems or config.data.heldout) * one.decoding.samples)
            for one in suite.declare(config.evaluate)
        ),
        *(stage("latency", one, clock, "latency.json", timed) for one in suite.timed(config.evaluate)),
        *(stage("lanes", one, lanes, "lanes.json", timed) for one in suite.laned(config.evaluate)),
    ]


_FIGURES = ("eval/", "latency/", "lanes/", "report")


def _folder(stage: Stage) -> str:
    """Stages of one share their compiled programs: evaluations do, trainings of two methods do not."""
    return stage.name.partition("/")[0]


def _model(stage: Stage) -> str:
    return stage.needs[0] if stage.needs else ""


def _has_models(stage: Stage, out: Path) -> bool:
    from apr_jax.evaluate.suite import model_of

    return stage.name in ("data", "report") or model_of(out, _model(stage)) is not None


def run_stages(stages: list[Stage], out: Path, again: tuple[str, ...] = ()) -> None:
    """Runs the stages that are not done, those named `again`, and all that need one that had to run again."""
    console = Console(stderr=True)
    first_decides(lambda: _note_left(stages, out, again))
    record = _read_record(out)
    left = [stage for stage in stages if not _is_done(stage, record)]
    for place, stage in enumerate(left):
        if is_first():
            ahead = estimate(left[place:], stages, record)
            number = stages.index(stage) + 1
            console.print(f"[bold]stage {number} of {len(stages)}: {stage.name}[/bold] ({ahead})", soft_wrap=True)
            with alone_fails() if not stage.together else contextlib.nullcontext(), _timed(record, stage.name, out):
                stage.run()
            console.print(f"stage {stage.name}: done, {record[stage.name]['seconds']:.0f} s")
        elif stage.together:
            stage.run()
        else:
            _wait(stage.name, out)
        if place + 1 < len(left) and _folder(left[place + 1]) != _folder(stage):
            _forget_compiled()


def _note_left(stages: list[Stage], out: Path, again: tuple[str, ...]) -> int:
    """Notes as not done what has to run again, for all processes to read; returns how many stages are left."""
    record = _read_record(out)
    left: set[str] = set()
    for stage in stages:
        done = _is_done(stage, record) and stage.makes.exists()
        if not done or stage.name in again or left & set(stage.needs):
            left.add(stage.name)
    if stale := [name for name in left if record.get(name, {}).get("done", False)]:
        for name in stale:
            record[name]["done"] = False
        _write_json(out / "stages.json", record)
    return len(left)


def _read_record(out: Path) -> dict[str, Any]:
    return _read_json(out / "stages.json") if (out / "stages.json").is_file() else {}


def _is_done(stage: Stage, record: dict[str, Any]) -> bool:
    return bool(record.get(stage.name, {}).get("done", False))


def _wait(name: str, out: Path) -> None:
    """Until the first process has noted that the stage is done. If it fails instead, JAX ends this process."""
    while not _read_record(out).get(name, {}).get("done", False):
        time.sleep(_LOOK_SECONDS)


def estimate(left: list[Stage], stages: list[Stage], record: dict[str, Any]) -> str:
    """How long what is left will take, in words: from the seconds that finished stages of the same kind took for their work."""
    spent: dict[str, list[float]] = {}
    for stage in stages:
        if stage not in left and stage.name in record:
            seconds, work = spent.setdefault(stage.kind, [0.0, 0.0])
            spent[stage.kind] = [seconds + record[stage.name]["seconds"], work + stage.work]
    known = [spent[stage.kind][0] / spent[stage.kind][1] * stage.work for stage in left if stage.kind in spent]
    unknown = len(left) - len(known)
    parts = [f"about {max(1, round(sum(known) / 60))} min for {len(known)} of them"] if known else []
    parts += [f"{unknown} of a kind that was not timed yet"] if unknown else []
    return f"{len(left)} left: {', '.join(parts)}"


@contextlib.contextmanager
def _timed(record: dict[str, Any], name: str, out: Path) -> Iterator[None]:
    """Adds the seconds spent to the record on disk, finished or stopped; only a stage that came to its end is done."""
    before, start = record.get(name, {}).get("seconds", 0.0), time.monotonic()
    done = False
    try:
        yield
        done = True
    finally:
        record[name] = {"seconds": round(before + time.monotonic() - start, 1), "done": done}
        with contextlib.nullcontext() if done else contextlib.suppress(OSError):  # A full disk has its error already.
            _write_json(out / "stages.json", record)


def _forget_compiled() -> None:
    """Frees the programs of a finished stage: each has its own."""
    import jax

    jax.clear_caches()


def write_report(out: Path, data: Path | None = None) -> None:
    """Writes results.json, the figures and report.html from what the evaluations left in `out`.

    Args:
      data: of the run; by default out/data.

    Raises:
      UserError: there is no evaluation.
    """
    from apr_jax.evaluate.report import write_run_report

    with Mirror(out, ("config.json", "stages.json", "*.safetensors", "eval/*/*", "*/*/metrics.jsonl")) as mirror:
        seconds = {name: stage["seconds"] for name, stage in _read_record(mirror.local).items() if stage["done"]}
        found = write_run_report(mirror.local, data or out / "data")
        _write_json(mirror.local / "results.json", {"seconds": seconds} | found)


def show_results(out: Path) -> None:
    """Prints the tables of a finished run, what it took, and where figures and report are."""
    results = _read_json(out / "results.json")
    print_table({row["label"]: row for row in results["main"].values()})
    console = Console(highlight=False, soft_wrap=True)
    print_claims(results["claims"], console)
    for line in results["missing"]:
        console.print(f"not run  {line}")
    console.print(f"time     {sum(results['seconds'].values()) / 60:.1f} minutes ({out / 'stages.json'})")
    console.print(f"figures  {out / 'figures'}")
    console.print(f"report   {out / 'report.html'}")


def _claim(out: Path, config: Experiment) -> None:
    """Writes the config into the folder; refuses a folder of another one. What is evaluated may change."""
    values = json.loads(json.dumps(to_dict(config)))
    path = out / "config.json"
    old = _read_json(path) if path.is_file() else values
    if different := _difference(old | {"evaluate": {}}, values | {"evaluate": {}}):
        raise UsageError(f"{out}: is a run with {different}; choose another --out, or delete it")
    if is_first() and (not path.is_file() or old != values):
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, values)


def _difference(old: Any, new: Any, name: str = "") -> str:
    """The first field in which two configs differ, in words; empty if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in {**old, **new})
        return next(filter(None, found), "")
    return "" if old == new else f"{name}={old!r}, now {name}={new!r}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; finish the run with `apr reproduce --out {path.parents[0]}` first"
        ) from None
    except ValueError:
        raise UserError(f"{path}: is damaged; delete it and start again") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
