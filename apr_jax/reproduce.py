"""A whole experiment from nothing to its report, stage after stage, in one process or in the several of a pod.

The life of a run (OUT is its folder, on a disk that all processes share, or in a bucket):
  1. data         OUT/data: problems, tokenizer, demonstrations of APR and SoS+
  2. <method>/sft OUT/<method>/sft: supervised training
  3. <method>/rl  OUT/<method>/rl: reinforcement learning from there
  4. eval         OUT/eval/<method>-<stage>: greedy answers to the held-out test problems
  5. report       OUT/results.json, OUT/accuracy_against_window.{png,svg}, OUT/report.html

A finished stage is noted in OUT/stages.json, with the seconds it took, and never runs again; an unfinished one goes
on from its own checkpoint. So the same command can be stopped and started at will, and when all is done it only shows
the results. Of several processes all train; the first alone builds data, evaluates and reports, on its own devices, while
the others wait for its note in stages.json.
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
from apr_jax.runtime import alone_fails, first_decides, is_first
from apr_jax.storage import Mirror, write_text
from apr_jax.table import print_table

METHODS = ("sos+", "apr")  # The serial baseline first: the table reads from worse to better.
LEARNED = ("sft", "rl")
_LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: in stages.json and on the screen.
      makes: a file or folder that is there when the stage is done.
      run: does the work, or goes on with it.
      together: by all processes; else by the first one.
    """

    name: str
    makes: Path
    run: Callable[[], object]
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


def reproduce(config: Experiment, out: Path, data: Path | None = None) -> None:
    """Runs every stage that is not done yet.

    Args:
      out: folder of the run.
      data: where its data are, or will be built; by default out/data.

    Raises:
      UsageError: OUT holds a run of other settings.
      UserError: a stage failed; what was finished before is kept.
    """
    _claim(out, config)
    run_stages(stages_of(config, out, data), out)


def stages_of(config: Experiment, out: Path, data: Path | None = None) -> list[Stage]:
    """The stages in their order. Heavy imports wait until a stage runs."""
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

    def answer(method: str, learned: str) -> None:
        from apr_jax.evaluate.run import evaluate
        from apr_jax.learn.checkpoint import load_checkpoint
        from apr_jax.tasks import load_problems

        problems = load_problems(built / "test.jsonl")
        evaluate(load_checkpoint(out / method / learned), problems, out / "eval" / f"{method}-{learned}")

    def bind(function: Callable[..., None], *arguments: str) -> Callable[[], None]:
        return lambda: function(*arguments)

    evaluated = [(method, learned) for method in METHODS for learned in LEARNED]
    return [
        Stage("data", built / "data.json", build_data),
        *(
            Stage(f"{method}/{learned}", out / method / learned / "checkpoints", bind(train, method), together=True)
            for learned, train in zip(LEARNED, (supervise, reinforce), strict=True)
            for method in METHODS
        ),
        *(
            Stage(
                f"eval/{method}-{learned}",
                out / "eval" / f"{method}-{learned}" / "summary.json",
                bind(answer, method, learned),
            )
            for method, learned in evaluated
        ),
        Stage("report", out / "report.html", lambda: write_report(out)),
    ]


def run_stages(stages: list[Stage], out: Path) -> None:
    """Runs the stages that are not done, and all that come after one that had to run again."""
    console = Console(stderr=True)
    record = _read_json(out / "stages.json") if (out / "stages.json").is_file() else {}
    begin = first_decides(lambda: _first_to_run(stages, record, out))
    for number, stage in enumerate(stages[begin:], start=begin + 1):
        if is_first():
            console.print(f"[bold]stage {number} of {len(stages)}: {stage.name}[/bold]")
            with alone_fails() if not stage.together else contextlib.nullcontext(), _timed(record, stage.name, out):
                stage.run()
            console.print(f"stage {stage.name}: done, {record[stage.name]['seconds']:.0f} s")
        elif stage.together:
            stage.run()
        else:
            _wait(stage.name, out)
        _forget_compiled()


def _first_to_run(stages: list[Stage], record: dict[str, Any], out: Path) -> int:
    """The place of the first stage that is not done. What comes after it is noted as not done either."""
    done = [record.get(stage.name, {}).get("done", False) and stage.makes.exists() for stage in stages]
    begin = done.index(False) if False in done else len(stages)
    if any(done[begin:]):
        for stage in stages[begin:]:
            record.get(stage.name, {})["done"] = False
        _write_json(out / "stages.json", record)
    return begin


def _wait(name: str, out: Path) -> None:
    """Until the first process has noted that the stage is done. If it fails instead, JAX ends this process."""
    path = out / "stages.json"
    while not (path.is_file() and _read_json(path).get(name, {}).get("done", False)):
        time.sleep(_LOOK_SECONDS)


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


def write_report(out: Path) -> None:
    """Writes results.json, the figures and report.html from what the evaluations left in `out`.

    Raises:
      UserError: an evaluation is missing.
    """
    with Mirror(out, ("config.json", "stages.json", "eval/*/*", "*/*/metrics.jsonl")) as mirror:
        _write_report(mirror.local)


def _write_report(out: Path) -> None:
    from apr_jax.evaluate.report import write_run_report

    results = {
        "experiment": _read_json(out / "config.json")["name"],
        "seconds": {name: stage["seconds"] for name, stage in _read_json(out / "stages.json").items() if stage["done"]},
        "summaries": {
            f"{method}-{learned}": _read_json(out / "eval" / f"{method}-{learned}" / "summary.json")
            for method in METHODS
            for learned in LEARNED
        },
    }
    _write_json(out / "results.json", results)
    write_run_report(out)


def show_results(out: Path) -> None:
    """Prints the table of a finished run, what it took, and where plot and report are."""
    results = _read_json(out / "results.json")
    print_table({name.replace("-", " after "): summary for name, summary in results["summaries"].items()})
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"time     {sum(results['seconds'].values()) / 60:.1f} minutes ({out / 'stages.json'})")
    console.print(f"plot     {out / 'accuracy_against_window.png'}")
    console.print(f"report   {out / 'report.html'}")


def _claim(out: Path, config: Experiment) -> None:
    """Writes the config into a fresh folder; refuses a folder of another config."""
    values = json.loads(json.dumps(to_dict(config)))
    path = out / "config.json"
    if not path.is_file():
        if is_first():
            out.mkdir(parents=True, exist_ok=True)
            _write_json(path, values)
        return
    if different := _difference(_read_json(path), values):
        raise UsageError(f"{out}: is a run with {different}; choose another --out, or delete it")


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
