"""What a run's evaluations found, read back from its folder: the one source of figures, tables and
comparisons.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apr_jax.config import ConfigError, Experiment, from_dict
from apr_jax.data.build import check_files
from apr_jax.data.statistics import wilson
from apr_jax.errors import UserError
from apr_jax.evaluate import failures
from apr_jax.evaluate.intervals import mean_interval
from apr_jax.evaluate.latency import LATENCY, SLOTS
from apr_jax.evaluate.runner import SUMMARY, Decoding, read_answers
from apr_jax.evaluate.scores import Trace, by_problem, consensus, mean
from apr_jax.paper import suite
from apr_jax.paper.oracle import demonstrated
from apr_jax.tasks import METHODS, Countdown, load_problems
from apr_jax.text.tokenizer import Tokenizer

# Measure -> that of several trees which are drawn side by side.
_TOGETHER: dict[str, Callable[..., float]] = {
    "total_tokens": sum,
    "sequential_tokens": max,
    "children": sum,
    "max_thread_tokens": max,
}


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over problems with its 95% interval.

    Attributes:
      values: problem -> its share of right answers, or its tokens.
    """

    mean: float
    low: float
    high: float
    values: dict[str, float]


def share(values: dict[str, float]) -> Score:
    """Of right answers: Wilson's interval over the number of problems (samples of one problem are
    not independent).
    """
    mean = sum(values.values()) / len(values)
    return Score(mean, *wilson(round(mean * len(values)), len(values)), values)


def average(values: dict[str, float]) -> Score:
    """Of any measure: a bootstrap over problems."""
    return Score(sum(values.values()) / len(values), *mean_interval(list(values.values())), values)


@dataclasses.dataclass(frozen=True)
class Answered:
    """An evaluation that was run.

    Attributes:
      traces: all its trees; those of the plain evaluations, greedy and at the highest temperature,
        have a `failure`.
      latency: what `latency.json` holds, if it was measured; decode slots: the same of
        `slots.json`.
      validated: the same evaluation of validation problems, which chooses where comparisons take
        the best of several; None if it was not run.
    """

    evaluation: suite.Evaluation
    traces: list[Trace]
    summary: dict[str, Any]
    latency: dict[str, Any] | None = None
    slots: dict[str, Any] | None = None
    validated: Answered | None = None

    @functools.cached_property
    def groups(self) -> dict[str, list[Trace]]:
        """Problem -> its samples, in order."""
        return by_problem(self.traces)

    @property
    def label(self) -> str:
        """For legends and tables."""
        return label(self.evaluation)

    def accuracy(self) -> Score:
        """Share of right answers."""
        return share(
            {name: mean([tree["correct"] for tree in trees]) for name, trees in self.groups.items()}
        )

    def mean(self, name: str) -> float:
        """Of a measure of the traces."""
        return mean([tree[name] for tree in self.traces])

    def measure(self, name: str) -> Score:
        """The same with its interval, over problems."""
        return average(
            {key: mean([tree[name] for tree in trees]) for key, trees in self.groups.items()}
        )

    def spent(self, problems: Iterable[str], votes: int | None = None) -> dict[str, float]:
        """What an answer to these problems took: means of the measures.

        Args:
          votes: an answer is the vote of so many samples, drawn side by side: their tokens add up,
            their longest chain counts.
        """
        groups = [self.groups[name] for name in problems]
        if votes is None:
            return {
                key: mean(mean(tree[key] for tree in group) for group in groups)
                for key in _TOGETHER
            }
        return {
            key: mean(together(tree[key] for tree in group[:votes]) for group in groups)
            for key, together in _TOGETHER.items()
        }

    def thread_tokens(self) -> float:
        """Mean sampled tokens of a thread."""
        threads = sum(len(tree["threads"]) for tree in self.traces)
        return sum(tree["total_tokens"] for tree in self.traces) / max(1, threads)

    @functools.cached_property
    def by_n(self) -> list[tuple[Score, Score, float]]:
        """(pass@n, cons@n, total tokens) of the first n samples, n from 1 to all."""
        return [self._of_n(n) for n in range(1, self.summary["samples"] + 1)]

    def _of_n(self, n: int) -> tuple[Score, Score, float]:
        cut = {name: trees[:n] for name, trees in self.groups.items()}
        passed = share(
            {name: float(any(tree["correct"] for tree in trees)) for name, trees in cut.items()}
        )
        agreed = share({name: float(consensus(trees)) for name, trees in cut.items()})
        return (
            passed,
            agreed,
            mean([sum(tree["total_tokens"] for tree in trees) for trees in cut.values()]),
        )


@dataclasses.dataclass(frozen=True)
class Results:
    """All of a run.

    Attributes:
      answered: name -> evaluation.
      missing: why a declared evaluation is not there, one line each.
      oracle: method -> demonstrations of the test problems, in the form of traces.
    """

    config: Experiment
    answered: dict[str, Answered]
    missing: list[str]
    oracle: dict[str, list[Trace]]

    def get(self, model: str, **decoding: Any) -> Answered | None:
        """The evaluation of a model with these fields of `Decoding`, whatever its samples and
        problems; None if not run.
        """
        wanted = dataclasses.asdict(Decoding()) | decoding
        for one in self.answered.values():
            found = dataclasses.asdict(one.evaluation.decoding) | {"samples": 1}
            if one.evaluation.model == model and found == wanted:
                return one
        return None

    def sweep(self, method: str, temperature: float = 0.0) -> list[Answered]:
        """The swept model's evaluations by condition, the smallest first."""
        config = self.config.evaluate
        model = f"{method}/{config.sweep}"
        if method == "apr":
            found = [
                self.get(model, temperature=temperature, condition=count)
                for count in config.children
            ]
        else:
            found = [self.get(model, temperature=temperature, bins=bins) for bins in config.bins]
        return [one for one in found if one]

    def plain(self, temperature: float = 0.0) -> dict[str, Answered]:
        """The plain evaluations at a temperature; by default the greedy ones."""
        return {
            name: one
            for name, one in self.answered.items()
            if one.evaluation.plain and one.evaluation.decoding.temperature == temperature
        }


def read_run(run: Path, data: Path) -> Results:
    """Reads what is there, and demonstrates the test problems of `data`.

    Raises:
      UserError: there is no config or no evaluation, or a file is damaged.
    """
    config = _config(run)
    task = Countdown(config.task, config.solver, config.limits.children, config.limits.max_depth)
    answered, missing = {}, []
    untrained = set()
    for evaluation in suite.declare(config.evaluate):
        folder = run / "eval" / evaluation.name
        if (folder / SUMMARY).is_file():
            summary, traces = read_answers(folder)
            if evaluation.plain and evaluation.decoding.temperature in suite.compared_temperatures(
                config.evaluate
            ):
                traces = failures.label(traces, task)
            latency, slots = (
                _read(folder / name, "delete its folder and evaluate again")
                for name in (LATENCY, SLOTS)
            )
            validated = _validated(run, suite.validated(evaluation, config.evaluate))
            answered[evaluation.name] = Answered(
                evaluation, traces, summary, latency, slots, validated
            )
        elif not (
            suite.model_of(run, evaluation.model)
            or (run / evaluation.model / "metrics.jsonl").is_file()
        ):
            untrained.add(evaluation.model)
        else:
            missing.append(f"{label(evaluation)}: not evaluated yet")
    if not answered:
        raise UserError(
            f"{run}: has no evaluation of its suite; run `apr reproduce --out {run}` first"
        )
    missing += [
        f"{suite.MODELS[model]}: there is no trained model ({model})"
        for model in suite.MODELS
        if model in untrained
    ]
    return Results(config, answered, missing, _oracle(data, config))


def _validated(run: Path, evaluation: suite.Evaluation) -> Answered | None:
    """An evaluation of validation problems, if the run has it."""
    folder = run / "eval" / evaluation.name
    if not (folder / SUMMARY).is_file():
        return None
    summary, traces = read_answers(folder)
    return Answered(evaluation, traces, summary)


def label(evaluation: suite.Evaluation) -> str:
    """An evaluation in words: the model, then what differs from one greedy answer."""
    d = evaluation.decoding
    parts = [
        suite.MODELS[evaluation.model],
        f"T = {d.temperature:g}" if d.temperature else "",
        f"asked for {d.condition} children" if d.condition is not None else "",
        f"asked for {d.bins} window bins" if d.bins is not None else "",
        f"held to {d.forced} children" if d.forced is not None else "",
    ]
    return ", ".join(filter(None, parts))


def problems_of(shown: Iterable[Answered | None]) -> str:
    """How many problems these answered, in words: `160 problems`."""
    counts = sorted({len(one.groups) for one in shown if one})
    return " or ".join(f"{count:,}" for count in counts or [0]) + " problems"


def _oracle(data: Path, config: Experiment) -> dict[str, list[Trace]]:
    """The demonstrations of the test problems, if its tokenizer and problems are still there.

    Without conditions, as the models are asked: a stated number of children may be any, and would
    search less."""
    tokenizer, problems = data / "tokenizer.model", data / "test.jsonl"
    if not (tokenizer.is_file() and problems.is_file()):
        return {}
    check_files(data, tokenizer.name, problems.name)
    depth = config.limits.max_depth
    methods = [method for method in METHODS if method != "apr-nested" or depth > 1]
    task = Countdown(
        config.task,
        dataclasses.replace(config.solver, condition=0.0),
        config.limits.children,
        depth,
    )
    return demonstrated(
        task, load_problems(problems), Tokenizer.from_bytes(tokenizer.read_bytes()), methods
    )


def _config(run: Path) -> Experiment:
    path = run / "config.json"
    values = _read(path, f"delete it; `apr reproduce --out {run}` writes it again")
    if values is None:
        raise UserError(f"{run}: has no config.json; run `apr reproduce --out {run}` first")
    try:
        return from_dict(values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path, remedy: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    except ValueError:
        raise UserError(f"{path}: is damaged; {remedy}") from None
